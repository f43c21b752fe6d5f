"""What has to be so of a stack that runs. Each says what is not, and is written down here, not read from the compose files."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import requests

from metrics_pipeline_tests.compose_files import project
from metrics_pipeline_tests.containers.deployment import Deployment, ProblemError, long_running, wait_until
from metrics_pipeline_tests.containers.events import Events

HEALTHY_SECONDS: Final = 300.0
"""A machine that is used for other things as well needs minutes for what takes seconds."""
ONE_SHOTS: Final = ("secrets", "postgres-conf", "databases", "provision")
ORDER: Final = (
    ("secrets", "postgres-conf"),
    ("secrets", "postgres"),
    ("postgres-conf", "postgres"),
    ("postgres", "databases"),
    ("databases", "connect"),
    ("databases", "code"),
    ("databases", "watcher"),
    ("databases", "pgadmin"),
    ("redpanda", "connect"),
    ("redpanda", "code"),
    ("redpanda", "watcher"),
    ("connect", "provision"),
    ("connect", "console"),
    ("code", "webserver"),
    ("code", "daemon"),
    ("provision", "daemon"),
)
"""What has to be healthy, or to have ended well, before the other one starts."""
STOPS: Final = (
    ("daemon", "code"),
    ("webserver", "code"),
    ("code", "redpanda"),
    ("code", "postgres"),
    ("connect", "redpanda"),
    ("connect", "postgres"),
    ("watcher", "redpanda"),
    ("watcher", "postgres"),
)
"""What has to have ended before the other one does."""
JAVA: Final = (143,)
"""What a JVM that was asked to end returns when it has done all it has to."""
WRITER: Final = {"metrics_writer_password"}
ROLES: Final = ("owner", "writer", "summarizer", "reader", "producer")
ALL: Final = {"postgres_password", "dagster_password", "pgpass", *(f"metrics_{role}_password" for role in ROLES)}
SECRETS: Final = {
    "postgres": {"postgres_password"},
    "connect": WRITER,
    "watcher": WRITER,
    "pgadmin": {"pgadmin_password", "pgpass"},
    "grafana": {"grafana_password"},
    **dict.fromkeys(("code", "webserver", "daemon", "sink", "exporter"), ALL),
}
"""The files that each service may see; the others none."""


def healthy(deployment: Deployment, services: Iterable[str] | None = None, seconds: float = HEALTHY_SECONDS) -> None:
    """Every service that is to stay is up and content, and what is to end has ended well."""
    wanted = set(services) if services is not None else _started(deployment)

    def unwell() -> list[str]:
        found = deployment.containers()
        said = []
        for name in wanted:
            for one in found.get(name, []):
                state = one["State"]
                if name in ONE_SHOTS:
                    if state["Running"] or state["ExitCode"]:
                        said.append(f"{name}: {state['Status']}, exit {state['ExitCode']}")
                elif (state.get("Health") or {}).get("Status") != "healthy":
                    said.append(f"{name}: {state['Status']}, {(state.get('Health') or {}).get('Status')}")
        return said + [f"{name}: no container" for name in wanted if name not in found]

    def well() -> bool:
        if said := unwell():
            raise ProblemError("; ".join(said))
        return True

    try:
        wait_until("every service is healthy", well, seconds)
    except ProblemError as error:
        raise ProblemError(f"{error}\n{deployment.troubles()}") from error


def _started(deployment: Deployment) -> set[str]:
    services = project(deployment.checkout / "docker-compose.yaml")
    return {name for name, one in services.items() if not one.get("profiles")}


def nothing_was_restarted(deployment: Deployment) -> None:
    """No container has ended by itself, and none for want of memory."""
    for name, ones in deployment.containers().items():
        for one in ones:
            if one["RestartCount"] or one["State"]["OOMKilled"]:
                raise ProblemError(f"{name} was restarted {one['RestartCount']} times\n{deployment.troubles()}")


def order_of_start(events: Events) -> None:
    """Each service began when what it needs was there."""
    for first, then in ORDER:
        ready = events.first(first, "die" if first in ONE_SHOTS else "healthy")
        began = events.first(then, "start")
        if ready is None or began is None or ready.at > began.at or ready.code:
            raise ProblemError(f"{then} started before {first} was there: {began}, {ready}")


def order_of_stop(events: Events, since: int) -> None:
    """Each service ended by itself, and before what it writes to."""
    ends = {event.service: event for event in reversed(events.all()) if event.action == "die" and event.at >= since}
    killed = {name: end.code for name, end in ends.items() if end.code not in (0, *(JAVA if name == "connect" else ()))}
    if killed:
        raise ProblemError(f"ended otherwise than by themselves: {killed}")
    for first, then in STOPS:
        if first not in ends or then not in ends or ends[first].at > ends[then].at:
            raise ProblemError(f"{then} ended before {first}: {ends.get(then)}, {ends.get(first)}")


def rows(deployment: Deployment) -> int:
    """How many there are."""
    return int(deployment.sql("SELECT count(*) FROM metrics"))


def rows_rise(deployment: Deployment, seconds: float = 240) -> int:
    """Readings arrive, and go on to."""
    before = wait_until("there are rows", lambda: rows(deployment), seconds)
    return int(wait_until("rows rise", lambda: (now := rows(deployment)) > before and now, seconds))


def verify(deployment: Deployment, command: str = "docker compose exec code metrics-pipeline verify") -> str:
    """Topic, table and ledger hold the same."""
    return deployment.type(command, 600)


def status(deployment: Deployment) -> None:
    """`status` in the container of the code says that all is healthy."""
    command = "docker compose exec code metrics-pipeline status"
    wait_until("status is healthy", lambda: deployment.type(command, 120), HEALTHY_SECONDS, 2)


def graphql(deployment: Deployment, query: str) -> dict[str, Any]:
    """What Dagster's webserver answers on its published port."""
    url = f"http://127.0.0.1:{deployment.port('webserver', 3070)}/graphql"
    answer = requests.post(url, json={"query": query}, timeout=30)
    answer.raise_for_status()
    return dict(answer.json()["data"])


def runs(deployment: Deployment) -> dict[str, tuple[str, str, dict[str, str]]]:
    """Job, state and tags of each run, by id."""
    query = "query { runsOrError(limit: 200) { ... on Runs { results { runId jobName status tags { key value } } } } }"
    found = graphql(deployment, query)["runsOrError"]["results"]
    return {
        one["runId"]: (one["jobName"], one["status"], {tag["key"]: tag["value"] for tag in one["tags"]})
        for one in found
    }


def producer_was_launched_by_its_sensor(deployment: Deployment) -> None:
    """The UI answers, and Dagster has started the producer."""

    def launched() -> bool:
        return any(
            job == "produce_metrics" and state == "STARTED" and "dagster/sensor_name" in tags
            for job, state, tags in runs(deployment).values()
        )

    wait_until("a sensor launched the producer", launched, 240)
    page = requests.get(f"http://127.0.0.1:{deployment.port('webserver', 3070)}/", timeout=30)
    if page.status_code != 200 or "Dagster" not in page.text:
        raise ProblemError(f"the UI answers {page.status_code}: {page.text[:200]}")


def every_run_ends(deployment: Deployment, ids: Iterable[str], seconds: float = 420) -> None:
    """Runs whose parent was killed are ended, by run monitoring, and do not stay STARTED."""

    def ended() -> bool:
        known = runs(deployment)
        left = {name: known[name][:2] for name in ids if known[name][1] in ("STARTED", "STARTING", "CANCELING")}
        if left:
            raise ProblemError(f"still under way: {left}")
        return True

    wait_until("runs end whose parent was killed", ended, seconds, 3)


def secrets(deployment: Deployment) -> None:
    """Each service sees its own secrets, can read them, and no others; none stands in an environment."""
    values = set(deployment.inside("code", "sh", "-c", "cat /run/metrics-secrets/*_password | fold -w 32").split())
    list_them = 'cd /run/metrics-secrets && for file in $(ls -A); do test -r "$file" && echo "$file" || echo "$file unreadable"; done'
    for name, ones in deployment.containers().items():
        for variable in ones[0]["Config"]["Env"] or ():
            if variable.partition("=")[2] in values:
                raise ProblemError(f"{name} has a password in {variable.partition('=')[0]}")
        if name in ONE_SHOTS:
            continue
        mounted = any(mount["Destination"] == "/run/metrics-secrets" for mount in ones[0]["Mounts"])
        found = set(deployment.inside(name, "sh", "-c", list_them).splitlines()) if mounted else set()
        if found != SECRETS.get(name, set()):
            raise ProblemError(f"{name} sees {sorted(found)}, and should {sorted(SECRETS.get(name, set()))}")


def hardened(deployment: Deployment) -> None:
    """Capabilities, privileges, roots, limits and published ports are as written, by the engine and in the kernel."""
    written = project(deployment.checkout / "docker-compose.yaml", variables=deployment.settings)
    for name, ones in deployment.containers().items():
        for one in ones:
            host, wanted = one["HostConfig"], written[name]
            limits = wanted["deploy"]["resources"]["limits"]
            unit = {"m": 2**20, "g": 2**30}[limits["memory"][-1]]
            facts = {
                "capabilities": (host["CapDrop"] or [], wanted.get("cap_drop", [])),
                "privileges": (host["SecurityOpt"] or [], wanted["security_opt"]),
                "root": (host["ReadonlyRootfs"], wanted.get("read_only", False)),
                "memory": (host["Memory"], int(limits["memory"][:-1]) * unit),
                "pids": (host["PidsLimit"], limits["pids"]),
                "restart": (host["RestartPolicy"]["Name"] or "no", wanted["restart"]),
            }
            for what, (is_so, should) in facts.items():
                if is_so != should:
                    raise ProblemError(f"{name}: {what} {is_so}, written {should}")
            published = [place for places in (one["NetworkSettings"]["Ports"] or {}).values() for place in places or []]
            if any(place["HostIp"] != "127.0.0.1" for place in published):
                raise ProblemError(f"{name} is published beyond loopback: {published}")
            if one["State"]["Running"] and Path(f"/proc/{one['State']['Pid']}/status").exists():
                lines = Path(f"/proc/{one['State']['Pid']}/status").read_text("utf-8").splitlines()
                kernel = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                if kernel["NoNewPrivs"] != "1" or (wanted.get("cap_drop") and int(kernel["CapEff"], 16)):
                    raise ProblemError(f"{name}: CapEff {kernel['CapEff']}, NoNewPrivs {kernel['NoNewPrivs']}")
    for name in ("code", "postgres", "connect"):
        tried = deployment.inside(name, "sh", "-c", "touch /here 2>&1; touch /opt/here 2>&1; true")
        if tried.count("Read-only file system") != 2:
            raise ProblemError(f"{name} can write its root: {tried}")


def nothing_is_left(deployment: Deployment) -> None:
    """No container, volume or network of the project."""
    label = f"label=com.docker.compose.project={deployment.name}"
    for kind in ("container", "volume", "network"):
        left = deployment.engine.docker(
            kind, "ls", *(["--all"] if kind == "container" else []), "--quiet", "--filter", label
        )
        if left.strip():
            raise ProblemError(f"{kind}s are left: {left.split()}")


def crash(deployment: Deployment, service: str) -> float:
    """A service dies at once; the engine starts it again, it gets healthy, and nothing is lost. Seconds to healthy."""
    # After a restart of PostgreSQL the webserver's first answer is an error.
    known = wait_until("Dagster knows of runs", lambda: runs(deployment), 120)
    under_way = [name for name, (_, state, _) in known.items() if state == "STARTED"]
    deployment.crash(service)
    began = time.monotonic()
    healthy(deployment, [service])
    took = time.monotonic() - began
    if service == "code":
        every_run_ends(deployment, under_way)
    rows_rise(deployment)
    verify(deployment)
    return took


def prometheus(deployment: Deployment, path: str, **parameters: str) -> Any:
    """An answer of Prometheus' API."""
    url = f"http://127.0.0.1:{deployment.port('prometheus', 9090)}/api/v1/{path}"
    answer = requests.get(url, params=parameters, timeout=30)
    said = answer.json()
    if said["status"] != "success":
        raise ProblemError(f"Prometheus refuses {parameters}: {said}")
    return said["data"]


def every_target_is_up(deployment: Deployment, wanted: set[str]) -> None:
    """Prometheus finds and reads each of them."""

    def up() -> bool:
        targets = prometheus(deployment, "targets")["activeTargets"]
        states = {one["labels"]["job"]: one["health"] for one in targets}
        bad = [one for one in targets if one["health"] != "up"]
        if set(states) != wanted or bad:
            raise ProblemError(f"{states}, wanted {wanted}: {[one['lastError'] for one in bad]}")
        return True

    wait_until("every target is up", up, 120)


def no_alert_fires(deployment: Deployment) -> None:
    """Not one."""
    firing = [one for one in prometheus(deployment, "alerts")["alerts"] if one["state"] == "firing"]
    if firing:
        raise ProblemError(f"alerts: {[one['labels'] | one['annotations'] for one in firing]}")


def every_query_is_answered(deployment: Deployment) -> tuple[int, int]:
    """Each query of the dashboard, by Prometheus; how many there are, and how many have data."""
    from metrics_pipeline.compose.dashboards import ROWS

    queries = [query for _, panels in ROWS for panel in panels for _, query in panel.queries]
    answers = [prometheus(deployment, "query", query=query)["result"] for query in queries]
    return len(queries), sum(1 for answer in answers if answer)


def services_of(deployment: Deployment) -> set[str]:
    """Those that stay and have a container."""
    return set(deployment.containers()) & long_running()
