"""The documentation says what is true: tables, commands, links, names and messages are held against the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.exceptions import TyperException

from metrics_pipeline import reference
from metrics_pipeline.settings import ROOT, Settings
from metrics_pipeline_tests.documents import DOCUMENTS, PAGES, anchors, fences, inline, page, prose, table

README = ROOT / "README.md"
SOURCES = sorted((ROOT / "metrics_pipeline").rglob("*.py"))
OUTSIDE = {"PIPELINE_ENV_FILE", "LOG_LEVEL", "DAGSTER_HOME", "DAGSTER_POSTGRES_URL"}
"""Environment variables that are no settings."""


def test_tables_are_those_of_the_code() -> None:
    texts = [path.read_text("utf-8") for path in reference.PAGES]
    for path, text in zip(reference.PAGES, texts, strict=True):
        assert reference.rewritten(text) == text, f"{path.name}: run `python -m metrics_pipeline.reference`"
    for group in reference.GROUPS:
        made = f"<!-- made from the code: settings {group} -->\n\n{reference.settings_table(group)}"
        assert sum(made in text for text in texts) == 1, group
    assert sum(reference.commands_table() in text for text in texts) == 1


def test_every_setting_belongs_to_a_group_of_the_documentation() -> None:
    listed = [name for group in reference.GROUPS for name in Settings.group(group)]
    assert sorted(listed) == sorted(Settings.model_fields)


def test_env_example_is_that_of_the_code() -> None:
    assert reference.ENV_EXAMPLE.read_text("utf-8") == reference.env_example(), (
        "run `python -m metrics_pipeline.reference`"
    )


def test_env_example_used_as_env_file_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings.load()
    monkeypatch.setenv("PIPELINE_ENV_FILE", str(reference.ENV_EXAMPLE))
    assert Settings.load() == defaults


def test_env_example_shows_every_setting_and_no_secret() -> None:
    lines = reference.ENV_EXAMPLE.read_text("utf-8").splitlines()
    assert {line.lstrip("# ").partition("=")[0] for line in lines if re.match(r"(# )?[A-Z0-9_]+=", line)} == {
        name.upper() for name in Settings.model_fields
    }
    for name in Settings.group("secrets"):
        assert f"{name.upper()}=" in lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        place = (document.parent / name).resolve() if name else document
        assert place.is_relative_to(ROOT), target
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


def test_the_readme_is_for_a_newcomer() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 200


def unreached(readme: Path, pages: Iterable[Path]) -> set[str]:
    """Names of the pages that no chain of links leads to from the README."""
    reached, waiting = set[Path](), [readme]
    while waiting:
        document = waiting.pop()
        if document in reached:
            continue
        reached.add(document)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", document.read_text("utf-8")):
            if not target.startswith("https://"):
                waiting.append((document.parent / target).resolve())
    return {path.name for path in set(pages) - reached}


def test_every_page_is_linked_from_the_readme_or_from_one_that_is() -> None:
    assert not unreached(README, PAGES)


def test_a_page_that_nothing_links_to_would_be_found(tmp_path: Path) -> None:
    for name, text in (("README.md", "[a](a.md)"), ("a.md", "[b](b.md#x)"), ("b.md", ""), ("c.md", "[a](a.md)")):
        (tmp_path / name).write_text(text)
    assert unreached(tmp_path / "README.md", tmp_path.glob("?.md")) == {"c.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document: Path) -> None:
    top = {path.name for path in ROOT.iterdir()}
    for text in inline(document):
        first = text.split("/")[0]
        if "/" in text and first in top - {".local", ".venv"} and re.fullmatch(r"[a-z0-9_./-]+", text):
            assert (ROOT / text).exists(), text


def test_the_drawn_layout_exists() -> None:
    _, _, section = page("architecture").read_text("utf-8").partition("\n    metrics_pipeline/  ")
    assert section
    parent = "metrics_pipeline/"
    for line in section.partition("\n\n")[0].splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        parent = name if indent == 4 else parent
        assert (ROOT / (name if indent == 4 else parent + name)).exists(), name


def test_the_map_names_every_package_and_every_module() -> None:
    package = ROOT / "metrics_pipeline"
    _, _, drawn = page("architecture").read_text("utf-8").partition("\n    metrics_pipeline/  ")
    first = drawn.partition("\n    metrics_pipeline_tests/")[0]
    named = {line.split()[0].rstrip("/") for line in first.splitlines()[1:]}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert named == packages | {path.name for path in package.glob("*.py")} - {"__init__.py"}
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", page("architecture").read_text("utf-8"), re.MULTILINE)
    assert {name: sorted(re.findall(r"\w+", modules)) for name, modules in rows} == {
        name: sorted(path.stem for path in (package / name).glob("*.py") if path.stem != "__init__")
        for name in packages
    }


def test_the_places_that_a_column_touches_are_all_named() -> None:
    _, _, section = page("architecture").read_text("utf-8").partition("\n**Another column**")
    named = {
        path
        for path in re.findall(r"`((?:metrics_pipeline|sql|connect)/[^`]+\.\w+)`", section.partition("\n## ")[0])
        if "_tests" not in path
    }
    files = [path for folder in ("metrics_pipeline", "sql/queries", "connect") for path in (ROOT / folder).rglob("*.*")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files if path.suffix != ".pyc"}
    column = {name for name, text in texts.items() if "published_at" in text}
    assert column <= named, f"not on the page: {column - named}"
    assert all(re.search("published_at|tags", texts[name]) for name in named), "on the page, and without a column"


def test_the_glossary_has_the_words() -> None:
    words = {word for row in table(page("architecture"), "## What the words mean") for word in row[0].split(", ")}
    assert words >= {"reading", "message", "record", "row", "reject", "fast road", "producer run", "ledger"}
    assert words >= {"offset range", "sink", "spill", "metric", "lag", "keeper"}


def test_modules_and_pages_that_are_named_anywhere_exist() -> None:
    """In messages, comments, the Makefile, the images and the workflows, as well as in the documents."""
    folders = ("metrics_pipeline", "metrics_pipeline_tests", "sql", "connect", "compose", ".ci", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in {".yaml", ".yml", ".toml"}]
    files += [ROOT / "Makefile", ROOT / "Dockerfile", ROOT / ".env.example", *DOCUMENTS]
    seen = 0
    for path in files:
        if not path.is_file() or path.suffix == ".pyc" or path.name in {"test_documents.py", "test_site.py"}:
            continue
        text = path.read_text("utf-8")
        for name in re.findall(r"(?<![\w/])docs/[\w-]+\.\w+", text):
            seen += 1
            assert (ROOT / name).exists(), f"{path}: {name}"
        for name in re.findall(r"(?<![\w/])metrics_pipeline(?:_tests)?/[\w/]+\.py", text):
            seen += 1
            assert (ROOT / name).exists(), f"{path}: {name}"
        for name in re.findall(r"-m (metrics_pipeline[\w.]*\w)", text):
            seen += 1
            assert find_spec(name), f"{path}: {name}"
    assert seen > 30


def calls() -> list[str]:
    """Every call of the command line in the documents, those with an ellipsis left out."""
    found = []
    for document in DOCUMENTS:
        for block in fences(document, "sh"):
            found += [line for line in block.replace("\\\n", " ").splitlines() if "metrics-pipeline " in line]
        found += [text for text in inline(document) if text.startswith("metrics-pipeline ")]
    return [call for call in found if "…" not in call]


@pytest.mark.parametrize("call", calls())
def test_every_call_of_the_command_line_parses(call: str) -> None:
    words = shlex.split(call, comments=True)
    rest = words[next(index for index, word in enumerate(words) if word.endswith("metrics-pipeline")) + 1 :]
    name = next(
        (
            name
            for name in sorted(reference.commands(), key=len, reverse=True)
            if rest[: len(name.split())] == name.split()
        ),
        None,
    )
    assert name is not None, f"no such command: {call}"
    if rest == name.split():  # a mention
        return
    try:
        reference.commands()[name].make_context(name, rest[len(name.split()) :])
    except TyperException as error:
        pytest.fail(f"{call}: {error}")


def test_logs_that_are_named_are_written_by_some_part() -> None:
    (argument,) = [given for given in reference.commands()["logs"].params if given.name == "service"]
    parts = set(re.findall(r"\w+", getattr(argument, "help", "")))
    named = {match[1] for call in calls() if (match := re.fullmatch(r"metrics-pipeline logs ([a-z]+)(-\d)?", call))}
    assert named
    assert named <= parts
    shown = {
        match for row in table(README, "## Five commands that matter") for match in re.findall(r"logs (\w+)", row[0])
    }
    assert shown <= parts - {"sink"}, "the stack as it comes runs no COPY sink, so there is no such log"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = "\n".join([*inline(document), *(block for block in fences(document, "sh"))])
        for arguments in re.findall(r"^make( .+)", text, re.MULTILINE):
            for word in shlex.split(arguments):
                assert "=" in word or word in targets, f"make{arguments}"


def test_jobs_and_sensors_are_those_of_dagster() -> None:
    from metrics_pipeline.definitions import defs

    repository = defs.get_repository_def()
    rows = table(page("dagster"), "# Dagster")
    named = {kind: {row[1].strip("`") for row in rows if row[0] == kind} for kind in ("job", "sensor")}
    assert named["job"] == {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
    assert named["sensor"] == {sensor.name for sensor in repository.sensor_defs}
    for document in DOCUMENTS:
        for job in re.findall(r"-j (\w+)", document.read_text("utf-8")):
            assert job in named["job"]


def test_run_configurations_are_accepted() -> None:
    import dagster as dg

    from metrics_pipeline.definitions import defs

    blocks = [block for document in DOCUMENTS for block in fences(document, "yaml") if block.startswith("ops:")]
    assert blocks
    for block in blocks:
        config = yaml.safe_load(block)
        (op,) = config["ops"]
        job = next(
            job
            for job in defs.get_repository_def().get_all_jobs()
            if op in {node.name for node in job.nodes} and not job.name.startswith("__")
        )
        dg.validate_run_config(job, config)


def test_variables_that_are_named_exist() -> None:
    worker = (ROOT / "metrics_pipeline/local/connect_worker.py").read_text()
    known = (
        {name.upper() for name in Settings.model_fields}
        | OUTSIDE
        | set(re.findall(r"\b(?:SINK_PG|CONNECT)_[A-Z_]+", worker))
    )
    for document in DOCUMENTS:
        for text in inline(document):
            for name in re.findall(r"^[A-Z]+(?:_[A-Z]+)+\b", text):
                assert name in known, f"{document.name}: {name}"


def test_variables_that_are_read_are_documented() -> None:
    read = {
        name
        for path in SOURCES
        for name in re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']""", path.read_text("utf-8"))
    }
    assert read
    for name in read:
        assert f"`{name}`" in page("settings").read_text("utf-8"), name


def test_messages_under_troubleshooting_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text("utf-8") for path in [*SOURCES, ROOT / "Makefile"])
    rows = table(page("troubleshooting"), "# Troubleshooting")
    messages = [text for row in rows if row[0].startswith("`") for text in re.findall(r"`([^`]+)`", row[0])]
    assert len(messages) > 10
    for message in messages:
        for piece in message.split("…"):
            assert piece.strip() in source, f"{message}: {piece!r}"


def test_what_make_up_prints_is_what_it_prints() -> None:
    """Each line of the README's output, but for figures and addresses."""
    source = "\n".join(path.read_text("utf-8") for path in [*SOURCES, ROOT / "Makefile"])
    (block,) = [block for block in fences(README, "text") if "PostgreSQL is up" in block]
    for line in filter(None, block.splitlines()):
        piece = re.split(r" \.venv|[:\d]| is up| has started", line)[0]
        assert piece in source, line


def test_the_readme_s_figures_are_those_of_the_benchmarks() -> None:
    text = page("benchmarks").read_text("utf-8")
    figures = table(README, "## How fast")
    assert len(figures) == 5
    for path, rate, share in figures:
        assert re.search(rf"^\| `[\w-]+` \| {rate} \| [^|]+ \| {share} \|", text, re.MULTILINE), path


def test_changelog_has_this_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
