"""The command line: its help, its errors (one line and an exit code), and the commands that need no service."""

from __future__ import annotations

import logging
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from metrics_pipeline import cli, postgres
from metrics_pipeline.errors import ServiceError
from metrics_pipeline.local import lock as data_lock
from metrics_pipeline.local.ports import free_ports
from metrics_pipeline.reference import commands
from metrics_pipeline.settings import ROOT, Settings


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failed command, which is all that it prints."""
        assert self.code != 0
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip()


Run = Callable[..., Ended]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, not made yet."""
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """What the installed command does, in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["metrics-pipeline", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return Ended(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    yield call
    logging.getLogger("metrics_pipeline.librdkafka").setLevel(logging.NOTSET)


def test_help_lists_every_command_with_a_sentence(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    for name, command in commands().items():
        assert command.help, name
        if " " not in name:
            assert re.search(rf"\b{name} +{re.escape(command.help.split()[0])}", ended.out), name


@pytest.mark.parametrize("name", commands())
def test_every_option_and_argument_is_explained(name: str, run: Run) -> None:
    assert run(*name.split(), "--help").code == 0
    for parameter in commands()[name].params:
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name


def test_without_arguments_it_helps(run: Run) -> None:
    assert "Usage" in run().out


def test_its_version_is_that_of_the_project(run: Run) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert run("--version") == Ended(0, f"{project['name']} {project['version']}\n", "")


@pytest.mark.parametrize("arguments", [["nonsense"], ["status", "--nonsense"], ["migrate", "sideways"]])
def test_what_does_not_exist_is_a_usage_error(arguments: list[str], run: Run) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert arguments[-1] in ended.err


CALLS = [
    ["up"],
    ["up", "--detach"],
    ["down"],
    ["status", "--json"],
    ["logs"],
    ["doctor"],
    ["reset", "--yes"],
    ["migrate", "up"],
    ["migrate", "status"],
    ["migrate", "rollback"],
    ["produce"],
    ["sql", "SELECT 1"],
    ["verify"],
    ["archive", "list"],
    ["archive", "verify"],
    ["archive", "make"],
    ["archive", "restore", "2026-11-27"],
]


@pytest.mark.parametrize("arguments", CALLS, ids=" ".join)
def test_a_bad_setting_ends_every_command_with_one_line_and_exit_code_2(
    arguments: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRODUCER_MIN_METRICS", "9000")
    ended = run(*arguments)
    assert ended.error == "PRODUCER_MIN_METRICS is 9000, above PRODUCER_MAX_METRICS (7500): lower it or raise the other"
    assert ended.code == 2


def test_down_where_nothing_runs_makes_nothing(run: Run, data: Path) -> None:
    ended = run("down")
    assert (ended.code, ended.out) == (0, "Nothing was running.\n")
    assert not data.exists()


def test_logs_of_a_part_that_has_none(run: Run, data: Path) -> None:
    (data / "logs").mkdir(parents=True)
    assert run("logs", "broker").error == f"no log of 'broker' in {data / 'logs'}: there are none yet"
    (data / "logs" / "connect.log").touch()
    ended = run("logs", "brokr")
    assert ended.error == f"no log of 'brokr' in {data / 'logs'}: there are connect"
    assert ended.code == 2


def test_logs_print_what_stands_there(run: Run, data: Path) -> None:
    (data / "logs").mkdir(parents=True)
    awkward = r"a [red]word[/] in C:\[x] :warning: " + "x" * 300
    (data / "logs" / "broker.log").write_text(f"first\n{awkward}\n")
    (data / "logs" / "connect.log").write_text("third\n")
    assert run("logs", "broker", "--lines", "1").out == f"{awkward}\n"
    assert run("logs").out == f"broker: first\nbroker: {awkward}\nconnect: third\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either a query or --file"),
        (["SELECT 1", "--file", "x.sql"], "give either a query or --file"),
        (["--file", "no-such.sql"], "--file no-such.sql: No such file or directory"),
        (["SELECT 1", "--plain", "--csv"], "give one of --plain, --csv and --json"),
    ],
)
def test_sql_arguments(arguments: list[str], says: str, run: Run) -> None:
    ended = run("sql", *arguments)
    assert ended.error == says
    assert ended.code == 2


def test_sql_file_that_is_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.sql").write_bytes(b"SELECT '\xff'")
    assert run("sql", "--file", str(tmp_path / "x.sql")).error.endswith("it is not UTF-8 text")


@pytest.mark.parametrize(
    ("option", "printed"),
    [
        ("--plain", "[b]x[/]\t1\n\t\n"),
        ("--csv", "name,n\n[b]x[/],1\n,\n"),
        ("--json", '[\n {\n  "name": "[b]x[/]",\n  "n": 1\n },\n {\n  "name": null,\n  "n": null\n }\n]\n'),
    ],
)
def test_sql_output(option: str, printed: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(_settings: Settings, text: str) -> SimpleNamespace:
        asked.append(text)
        return SimpleNamespace(columns=["name", "n"], rows=[("[b]x[/]", 1), (None, None)])

    monkeypatch.setattr(postgres, "run_sql", answer)
    ended = run("sql", "SELECT whatever", option)
    assert (ended.code, ended.out.replace("\r\n", "\n")) == (0, printed)
    assert "[b]x[/]" in run("sql", "SELECT whatever").out
    assert asked == ["SELECT whatever"] * 2


def test_an_error_is_printed_as_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = r"cannot read [b]C:\[x][/b] :warning: " + "x" * 300

    def fail(_settings: Settings, _text: str) -> None:
        raise ServiceError(text)

    monkeypatch.setattr(postgres, "run_sql", fail)
    ended = run("sql", "SELECT 1")
    assert (ended.code, ended.error) == (1, text)


def test_postgresql_that_does_not_answer_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("POSTGRES_PORT", str(port))
    ended = run("sql", "SELECT 1")
    assert ended.code == 1
    assert str(port) in ended.error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "PRODUCER_FLEET=3"], r"--set PRODUCER_FLEET=3: there is no producer setting 'PRODUCER_FLEET'"),
        (["--set", "postgres_port=3"], r"there is no producer setting 'postgres_port'"),
        (["--set", "PRODUCER_FLEET_SIZE=few"], r"^PRODUCER_FLEET_SIZE=few: Input should be a valid integer"),
        (["--seconds", "0"], r"^PRODUCER_RUN_SECONDS=0: "),
    ],
)
def test_produce_arguments(arguments: list[str], says: str, run: Run) -> None:
    ended = run("produce", *arguments)
    assert re.search(says, ended.error), ended.error
    assert ended.code == 2


def test_reset_asks_first_and_deletes_the_data_only(data: Path, tmp_path: Path) -> None:
    (data / "kafka").mkdir(parents=True)
    (tmp_path / "env").touch()
    runner = CliRunner()
    refused = runner.invoke(cli.app, ["reset"], input="n\n")
    assert (refused.exit_code, data.exists()) == (1, True)
    agreed = runner.invoke(cli.app, ["reset"], input="y\n")
    assert (agreed.exit_code, data.exists(), (tmp_path / "env").exists()) == (0, False, True)


def test_reset_of_a_running_stack_is_refused(run: Run, data: Path) -> None:
    lock = data_lock.take(data)
    assert "is running already" in run("reset", "--yes").error
    lock.close()
    assert data.exists()


def test_doctor_names_what_is_in_the_way(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken, *others = free_ports(len(Settings.group("ports")))
    for name, port in zip(Settings.group("ports"), [taken, *others], strict=True):
        monkeypatch.setenv(name.upper(), str(port))
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIPELINE_MEMORY_GB", "1")
    monkeypatch.setenv("DISK_FREE_LIMIT_GB", "0")
    ended = run("doctor")
    assert ended.code == 1
    assert re.search(r"no +memory +1\.0 GiB \(PIPELINE_MEMORY_GB\): the stack needs about 3 GiB", ended.out)
    assert re.search(rf"ok +port {taken} +{Settings.group('ports')[0].upper()}", ended.out)
    assert re.search(r"PostgreSQL shared_buffers +256MB", ended.out)
    assert not (tmp_path / "cache").exists()


def test_doctor_asks_a_postgresql_of_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody,) = free_ports(1)
    monkeypatch.setenv("POSTGRES_URL", f"postgresql://me:tell-nobody@127.0.0.1:{nobody}/readings")
    ended = run("doctor")
    assert ended.code == 1
    assert re.search(rf"no +postgres +PostgreSQL at 127.0.0.1:{nobody} cannot be reached", ended.out)
    assert "tell-nobody" not in ended.out + ended.err


def test_doctor_says_what_a_day_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_MEMORY_GB", "24")
    assert (
        "at 20,000 readings/s a partition gets 1,728.0 million rows, 320.3 GiB; a day is 320.3 GiB" in run("doctor").out
    )
    assert "with many devices `hour` keeps the speed" in run("doctor").out
    monkeypatch.setenv("METRICS_PARTITION", "hour")
    assert "a partition gets 72.0 million rows, 13.3 GiB; a day is 320.3 GiB" in run("doctor").out
    assert "keeps the speed" not in run("doctor").out
    monkeypatch.setenv("METRICS_RETENTION", "36h")
    assert "a day is 320.3 GiB, METRICS_RETENTION=36h keeps 480 GiB" in run("doctor").out
    monkeypatch.setenv("PRODUCER_PUBLISH_INTERVAL", "0")
    assert "METRICS_PARTITION=hour; the producer's rate is what the broker takes" in run("doctor").out


def test_doctor_looks_at_the_archive(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not re.search(r"(ok|no) +archive ", run("doctor").out)
    monkeypatch.setenv("METRICS_ARCHIVE", str(tmp_path / "archive"))
    assert re.search(rf"ok +archive +{tmp_path / 'archive'}: 0 partitions in it", run("doctor").out)
    (tmp_path / "archive" / "metrics_p20261127").mkdir(parents=True)
    assert re.search(rf"ok +archive +{tmp_path / 'archive'}: 1 partitions in it", run("doctor").out)
    monkeypatch.setenv("METRICS_ARCHIVE", "/proc/archive")
    monkeypatch.setattr("os.access", lambda place, _mode: str(place) != "/proc")
    assert re.search(
        r"no +archive +METRICS_ARCHIVE=/proc/archive: /proc cannot be written by this user", run("doctor").out
    )


def test_doctor_counts_further_brokers_and_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIPELINE_MEMORY_GB": "4", "KAFKA_BROKERS": "3", "CONNECT_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    ended = run("doctor")
    assert re.search(r"no +memory +4\.0 GiB \(PIPELINE_MEMORY_GB\): the stack needs about 4\.5 GiB", ended.out)
    assert re.search(r"JVM heaps +3 x broker 240 MiB, 2 x Connect 384 MiB", ended.out)
    monkeypatch.setenv("CONNECT_WORKERS", "1")
    assert re.search(r"ok +memory", run("doctor").out)


def test_doctor_looks_at_the_folder_of_files(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "replay folder" not in run("doctor").out
    folder = tmp_path / "inbox"
    monkeypatch.setenv("REPLAY_FOLDER", str(folder))
    assert re.search(rf"no +replay folder +REPLAY_FOLDER={folder}: it does not exist; make it", run("doctor").out)
    folder.mkdir()
    (folder / "a.csv").touch()
    assert re.search(rf"ok +replay folder +{folder}: 1 files in it", run("doctor").out)
    (folder / "b.csv").symlink_to("nowhere")
    assert re.search(
        r"no +replay folder .*: 1 files in it; b\.csv is a link: put the file itself there", run("doctor").out
    )
    monkeypatch.setenv("REPLAY_RECIPE", "nowhere")
    assert re.search(r"no +replay folder +REPLAY_RECIPE=nowhere: No such file or directory; it is", run("doctor").out)
    assert {path.name for path in folder.iterdir()} == {"a.csv", "b.csv"}, "it changes nothing"


def test_up_refuses_a_folder_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path / "file" / "data"))
    assert re.match(r"cannot write the data folder .*file/data: .*set PIPELINE_DATA_DIR", run("up").error)


def test_up_refuses_a_disk_that_is_too_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_FREE_LIMIT_GB", "1000000")
    assert re.match(r"[\d.]+ GiB are free for .*: free some space, set PIPELINE_DATA_DIR", run("up").error)


def test_up_refuses_a_number_of_brokers_that_makes_no_quorum(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BROKERS", "1")  # given back after the test, as the option is a variable of the process
    assert run("up", "--brokers", "2").error.startswith("KAFKA_BROKERS=2: must be 1 or 3: two brokers cannot lose one")


@pytest.mark.parametrize(
    ("made", "asked", "error"),
    [
        ("kafka/meta.properties", "3", r"is that of 1 broker, and KAFKA_BROKERS is 3: go on with KAFKA_BROKERS=1"),
        ("kafka-cluster/cluster-id", "1", r"is that of 3 brokers, and KAFKA_BROKERS is 1: go on with KAFKA_BROKERS=3"),
    ],
)
def test_up_changes_no_topic_of_another_number_of_brokers(
    run: Run, monkeypatch: pytest.MonkeyPatch, data: Path, made: str, asked: str, error: str
) -> None:
    monkeypatch.setenv("KAFKA_BROKERS", asked)
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(data.parent / "env"))
    (data / made).parent.mkdir(parents=True)
    (data / made).write_text("kept")
    said = run("up", "--brokers", asked).error
    assert re.search(
        rf"{error}, or take another folder \(PIPELINE_DATA_DIR\), or delete .*`metrics-pipeline reset`", said
    )
    assert (data / made).read_text() == "kept"
    assert not (data.parent / "env").exists()


def test_up_beside_a_running_keeper_is_refused(run: Run, data: Path) -> None:
    lock = data_lock.take(data)
    for arguments in (["up"], ["up", "--detach"]):
        assert "is running already" in run(*arguments).error
    lock.close()


def test_the_command_is_installed_from_this_checkout() -> None:
    assert Path(cli.__file__).is_relative_to(ROOT)
