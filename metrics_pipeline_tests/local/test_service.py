"""A service as a real child process: its session, its end, its adoption, its log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from starlette.responses import Response
from starlette.routing import Route

from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import service as module
from metrics_pipeline.local.java import first_cause
from metrics_pipeline.local.processes import ProcessId, identify
from metrics_pipeline.local.service import CancelledError, Service, http_problem, tail
from metrics_pipeline.web import WebServer
from metrics_pipeline_tests.fakes import until
from metrics_pipeline_tests.patience import deadline

READY = "print('ready', flush=True)\n"
SLEEP = f"import time\n{READY}time.sleep(60)\n"
POLITE = f"import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('bye', flush=True)))\n{READY}time.sleep(60)\n"
STUBBORN = f"import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}time.sleep(60)\n"
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'])\n"
    "print(child.pid)\n" + READY + "time.sleep(60)\n"
)
GRANDPARENT = (
    "import subprocess, sys, time\n"
    'middle = \'import subprocess, sys; print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)\'\n'
    "subprocess.run([sys.executable, '-c', middle])\n" + READY + "time.sleep(60)\n"
)

Make = Callable[..., Service]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A service that runs Python code; healthy once it said `ready`."""
    made: list[Service] = []

    def build(code: str = SLEEP, *, name: str = "part", stop_seconds: float = 5, start_seconds: float = 10) -> Service:
        log = tmp_path / "logs" / f"{name}.log"
        service = Service(
            name=name,
            title="The part",
            url="",
            command=[sys.executable, "-c", code],
            environment={"PATH": os.defpath},
            log=log,
            check=lambda: None if "ready" in tail(log, 10) else "not ready",
            stop_seconds=stop_seconds,
            start_seconds=start_seconds,
        )
        made.append(service)
        return service

    yield build
    for service in made:
        service.stop()


def running(service: Service) -> psutil.Process:
    service.start()
    service.wait_until_healthy()
    assert service.process is not None
    return service.process


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_child_has_a_session_of_its_own_so_that_ctrl_c_reaches_the_keeper_alone(make: Make) -> None:
    process = running(make())
    assert os.getsid(process.pid) == process.pid
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_a_child_gets_the_given_environment_and_no_other(make: Make) -> None:
    assert set(running(make()).environ()) - {"LC_CTYPE"} == {"PATH"}  # Python itself may add LC_CTYPE


def test_a_graceful_end(make: Make) -> None:
    service = make(POLITE)
    process = running(service)
    service.stop()
    assert gone(process)
    assert not service.alive()
    assert tail(service.log, 1) == ["bye"]


def test_a_child_that_does_not_listen_is_killed_after_its_time(make: Make) -> None:
    service = make(STUBBORN, stop_seconds=0.3)
    process = running(service)
    began = time.monotonic()
    service.stop()
    assert 0.3 <= time.monotonic() - began < 5
    assert gone(process)


@pytest.mark.parametrize("code", [PARENT, GRANDPARENT], ids=["its parent there", "its parent gone"])
def test_grandchildren_end_too(code: str, make: Make) -> None:
    service = make(code)
    running(service)
    grandchild = psutil.Process(int(tail(service.log, 2)[0]))
    service.stop()
    give_up = deadline(5)
    while not gone(grandchild) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert gone(grandchild)


def test_stopping_twice_or_before_a_start_does_nothing(make: Make) -> None:
    service = make()
    service.stop()
    running(service)
    service.stop()
    service.stop()
    assert not service.alive()


def test_a_start_waits_until_healthy_and_can_be_repeated(make: Make) -> None:
    service = make()
    first = running(service)
    service.stop()
    service.log.unlink()
    assert running(service).pid != first.pid
    assert service.alive()


def test_a_child_that_ends_while_starting_is_reported_with_its_last_words(make: Make) -> None:
    service = make("print('INFO begins')\nprint('ERROR the disk is on fire')\nprint('INFO ends')\nraise SystemExit(3)")
    service.start()
    with pytest.raises(ServiceError) as caught:
        service.wait_until_healthy()
    assert str(caught.value) == (
        f"The part ended while starting (exit code 3): ERROR the disk is on fire; full log: {service.log}"
    )


def test_a_child_that_never_gets_healthy_is_reported_with_the_reason(make: Make) -> None:
    service = make("import time; time.sleep(60)", start_seconds=0.4)
    service.start()
    with pytest.raises(ServiceError, match=r"The part is not healthy 0 s after its start: not ready; log: "):
        service.wait_until_healthy()


def test_a_start_that_nobody_wants_any_more_is_no_failure(make: Make) -> None:
    """Ctrl-C was told as "not healthy 90 s after its start", after a second."""
    service = make("import time; time.sleep(60)")
    service.start()
    with pytest.raises(CancelledError):
        service.wait_until_healthy(lambda: True)
    assert service.alive()


def test_an_end_by_signal_is_noticed(make: Make) -> None:
    service = make()
    process = running(service)
    process.kill()
    give_up = deadline(5)
    while service.alive() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not service.alive()
    assert service.exit_code() == -signal.SIGKILL


def test_an_adopted_process_is_watched_and_stopped_like_a_child(make: Make) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", POLITE], stdout=subprocess.PIPE)
    try:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"ready\n"
        note = identify(psutil.Process(stranger.pid))
        service = make()
        found = note.find()
        assert found is not None
        service.adopt(found)
        assert service.alive()
        service.stop()
        assert not service.alive()
        assert stranger.wait(5) == 0
    finally:
        stranger.kill()
        stranger.communicate()


def test_what_shares_a_session_with_an_adopted_process_is_left_alone(make: Make) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        service = make()
        service.adopt(psutil.Process(stranger.pid))
        service.stop()
        assert stranger.wait(5) in (-signal.SIGTERM, -signal.SIGKILL)  # by force when the machine stood still
        assert bystander.poll() is None
    finally:
        stranger.kill()
        bystander.communicate()


def test_a_pid_that_was_given_to_another_process_is_not_ours() -> None:
    me = identify(psutil.Process())
    assert me.find() is not None
    assert ProcessId(me.pid, f"{me.started}1").find() is None


def test_a_process_that_ended_is_not_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    note = identify(psutil.Process(child.pid))
    assert note.find() is not None
    assert child.stdin is not None
    child.stdin.close()
    give_up = deadline(10)
    while note.find() is not None and time.monotonic() < give_up:  # not reaped yet: a zombie is no process to adopt
        time.sleep(0.01)
    assert note.find() is None
    child.wait()
    assert note.find() is None


def test_fingerprint_changes_with_command_and_environment_only(make: Make) -> None:
    service, same, other = make(), make(), make(POLITE)
    assert service.fingerprint == same.fingerprint
    assert service.fingerprint != other.fingerprint
    same.environment = {**same.environment, "COLUMNS": "80", "SHLVL": "3"}
    assert service.fingerprint == same.fingerprint
    same.environment = {**same.environment, "POSTGRES_PORT": "1"}
    assert service.fingerprint != same.fingerprint


def test_a_log_is_rotated_while_the_child_goes_on_writing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT", 10_000)
    line = "x" * 99
    code = f"import sys\nprint('ready', flush=True)\nfor _ in sys.stdin: print({line!r}, flush=True)"
    service = make(code)
    service.log.parent.mkdir()
    with service.log.open("ab") as log:  # as `start` opens it, with an input that says when to write
        child = subprocess.Popen(service.command, stdin=subprocess.PIPE, stdout=log)
    assert child.stdin is not None

    def write(lines: int, size: int) -> None:
        assert child.stdin is not None
        child.stdin.write(b"\n" * lines)
        child.stdin.flush()
        give_up = deadline(10)
        while service.log.stat().st_size < size and time.monotonic() < give_up:
            time.sleep(0.01)

    try:
        write(99, 99 * 100)
        service.rotate_log()
        assert not service.log.with_suffix(".log.1").exists()  # below the limit
        for number in range(1, module.LOGS_KEPT + 3):
            write(110, 110 * 100)
            service.rotate_log()
            assert service.log.stat().st_size == 0
            assert service.log.with_suffix(".log.1").stat().st_size >= 110 * 100
            assert len(list(service.log.parent.glob("part.log.*"))) == min(number, module.LOGS_KEPT)
        write(1, 100)
        assert service.log.read_text() == f"{line}\n"  # no hole of zeros where the old text was
    finally:
        child.communicate()


def test_rotation_of_a_log_that_is_not_there(make: Make) -> None:
    make().rotate_log()


def test_last_words_prefer_an_error(make: Make) -> None:
    service = make()
    assert service.last_words() == "nothing was logged"
    service.log.parent.mkdir()
    service.log.write_text("one\nFATAL:  no such role\ntwo\n\n")
    assert service.last_words() == "FATAL:  no such role"
    service.log.write_text("one\ntwo\n\n")
    assert service.last_words() == "two"


def test_tail_reads_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "long.log"
    path.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert tail(path, 2) == ["line 99998", "line 99999"]
    assert tail(tmp_path / "none", 5) == []


def test_only_an_answer_of_success_is_no_problem() -> None:
    server = WebServer(
        [Route("/well", lambda _: Response()), Route("/ill", lambda _: Response(status_code=503))], 0, "-"
    )
    server.start()
    place = f"127.0.0.1:{server.port}"
    try:
        assert http_problem(f"http://{place}/well") is None
        assert http_problem(f"http://{place}/ill") == f"no answer on {place} (HTTPError)"
    finally:
        server.stop()
    assert http_problem(f"http://{place}/well") == f"no answer on {place} (ConnectionError)"


def test_a_port_that_somebody_else_took_meanwhile_is_named(make: Make) -> None:
    """Its answer is healthy, and says nothing of our part."""
    with socket.socket() as theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        service = make(start_seconds=1.5)
        service.ports = (("kafka_port", port),)
        service.start()
        with pytest.raises(
            ServiceError, match=rf"port {port} is in use by .*pid {os.getpid()}.*: set KAFKA_PORT to a free one"
        ):
            service.wait_until_healthy()
        assert service.alive()
        failing = make("raise SystemExit(3)", name="other")
        failing.ports = (("kafka_port", port),)
        failing.start()
        with pytest.raises(ServiceError, match=rf"ended while starting .exit code 3.: port {port} is in use by"):
            failing.wait_until_healthy()


def test_a_part_that_listens_itself_is_healthy(make: Make) -> None:
    code = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(60)"
    service = make(code)
    service.check = lambda: None
    service.start()
    assert until(lambda: bool(tail(service.log, 1)))
    service.ports = (("kafka_port", int(tail(service.log, 1)[0])),)
    service.wait_until_healthy()


def test_a_java_failure_shows_its_cause_and_not_the_end_of_its_trace(make: Make) -> None:
    trace = "ERROR [main] it failed (X)\\njava.lang.Y: outer\\n\\tat a.b(C.java:1)\\nCaused by: java.net.BindException: Address already in use\\n\\t... 9 more\\nINFO [main] bye (X)"
    service = make(f"print('{trace}'); raise SystemExit(1)")
    service.first_cause = first_cause
    service.start()
    with pytest.raises(ServiceError, match=r"exit code 1.: java.net.BindException: Address already in use; full log"):
        service.wait_until_healthy()
