"""An env file is read the same way by all its readers, or refused by the setting's name."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from dotenv import dotenv_values

from metrics_pipeline.dotenv_file import can_hold, problems
from metrics_pipeline.errors import SettingError
from metrics_pipeline.local.environment import remember
from metrics_pipeline.settings import Settings

NAME = "DAGSTER_PASSWORD"

SAME = [
    "plain", "", "''", '""', "'a$b'", "'a$$b'", "'$'", "$", "a$ b", "a$1b", "a b", "a #c", "a#c", "'a #c'", "#a", "a'b", 'a"b',
    "'a\"b'", "\"a'b\"", r"'it\'s'", r'"q\"q"', r"back\slash", r"'back\slash'", r'"back\slash"', r'"b\\s"', r'"a\nb"', r"'a\nb'",
    r"a\nb", "ünï", "'a' # c", "a%b", "`id`", "a=b", "a;b", "!a", "~", "a*", "a&b?c=d/e:f@g,h", "'a}b{c'", " 'a'", "trail  ",
    r"'a\$b'", r'"a\tb"', "a # $b",
]  # fmt: skip
"""What stands behind `NAME=`."""

DIFFERENT = [
    ("a$b", "write the value in single quotes"),
    ('"a$b"', "write the value in single quotes"),
    ("a$$b", "write the value in single quotes"),
    ("$HOME/x", "write the value in single quotes"),
    (r"a\$b", "write the value in single quotes"),
    (r'"a\$b"', "write the value in single quotes"),
    ("'a${b}c'", "no quotes keep"),
    ("a${b}c", "is replaced"),
    ('"a${b}c"', "is replaced"),
    (r"'b\\s'", "two backslashes"),
    ('"a\\\'b"', "remove it"),
    ("'a'b", "close its quotes, and write nothing after them"),
    ("'a' b", "close its quotes, and write nothing after them"),
    ('"a"b', "close its quotes, and write nothing after them"),
    ("'unterminated", "close its quotes, and write nothing after them"),
    ("'x\\'", "close its quotes, and write nothing after them"),
]
LINES = [
    (f"{NAME}: plain", f"write {NAME}=VALUE"),
    (f"{NAME} : 'a'", f"write {NAME}=VALUE"),
    (f"'{NAME}'=a", "without"),
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / ".env"
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(path))
    return path


def write(file: Path, line: str) -> None:
    file.write_text(f"# ours\nLAG_LIMIT=7\n{line}\nKAFKA_PORT=1\n", "utf-8")


@pytest.mark.parametrize("value", SAME)
@pytest.mark.parametrize("form", ["{}={}", "export {}={}", "  {} = {}"])
def test_what_is_read_the_same_way_is_taken(value: str, form: str, file: Path) -> None:
    write(file, form.format(NAME, value))
    assert problems(file, {NAME}) == []
    settings = Settings.load()
    assert settings.dagster_password.get_secret_value() == (dotenv_values(file, interpolate=False)[NAME] or "")
    assert (settings.lag_limit, settings.kafka_port) == (7, 1)


@pytest.mark.parametrize(("line", "way"), [*((f"{NAME}={value}", way) for value, way in DIFFERENT), *LINES])
def test_what_is_read_in_two_ways_is_refused_by_name_with_the_way_out(line: str, way: str, file: Path) -> None:
    write(file, line)
    with pytest.raises(SettingError) as caught:
        Settings.load()
    message = str(caught.value)
    assert message.startswith(f"{NAME} in line 3 of {file}: ")
    assert way in message
    assert "a$b" not in message, "a secret stands in it"


def test_what_is_no_setting_of_ours_is_nobodys_business(file: Path) -> None:
    file.write_text("MY_OWN=a$b\nOTHER: x\nsome words\nLAG_LIMIT=7\n")
    assert Settings.load().lag_limit == 7


def test_a_setting_may_be_made_of_variables_in_the_one_form_that_all_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "/somewhere")
    file.write_text('PIPELINE_DATA_DIR="${SOMEWHERE}/data"\nPOSTGRES_DB=${NOT_SET:-other}\n')
    settings = Settings.load()
    assert (settings.data_dir, settings.postgres_db) == (Path("/somewhere/data"), "other")
    file.write_text("PIPELINE_DATA_DIR=${SOMEWHERE-x}/data\n")
    with pytest.raises(SettingError, match=r"^PIPELINE_DATA_DIR in line 1"):
        Settings.load()


@pytest.mark.parametrize(
    "value", ["plain", "with space", "p'q\"r", "a#b", "$HOME", "back\\slash", "ünï", "a$$b", "'", "#"]
)
def test_what_we_write_is_read_the_same_way(value: str, file: Path) -> None:
    assert can_hold(value)
    remember({NAME: value})
    assert problems(file, {NAME}) == []
    assert dotenv_values(file)[NAME] == value
    if has_compose():
        assert by_compose(file) == value


@pytest.mark.parametrize("value", ["a${b}", "a\\\\b", "a\\"])
def test_what_cannot_be_written_so_is_known(value: str) -> None:
    assert not can_hold(value)


def test_docker_compose_reads_it_so_and_the_rest_otherwise(file: Path) -> None:
    """The asserter of both tables: what is taken is read the same way there, and what is refused is not."""
    if not has_compose():
        pytest.skip("no Docker Compose here")
    for value in SAME:
        write(file, f"{NAME}={value}")
        assert by_compose(file) == dotenv_values(file)[NAME], value
    for line in [*(f"{NAME}={value}" for value, _ in DIFFERENT), *(line for line, _ in LINES)]:
        write(file, line)
        literal = dotenv_values(file, interpolate=False).get(NAME)
        assert not (by_compose(file) == dotenv_values(file).get(NAME) == literal), line


def has_compose() -> bool:
    """Whether this user has it; `docker` alone is not enough."""
    return (
        bool(shutil.which("docker"))
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )


def by_compose(file: Path) -> str:
    """The value as containers get it."""
    (file.parent / "compose.yaml").write_text(
        f'services: {{a: {{image: x, environment: {{V: "${{{NAME}-not set}}"}}}}}}\n'
    )
    done = subprocess.run(
        ["docker", "compose", "config", "--format", "json"],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return f"refused: {done.stderr}"
    return str(json.loads(done.stdout)["services"]["a"]["environment"]["V"]).replace("$$", "$")
