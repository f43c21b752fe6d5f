"""What is committed: no secret, no registry's host, no path of a machine, nothing large, nothing unpinned."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copy2
from zipfile import ZipFile

import pytest

from metrics_pipeline.settings import ROOT

LARGEST = 500_000
BINARIES = {".jar", ".class", ".so", ".whl", ".zip", ".gz", ".xz", ".txz", ".tar", ".parquet", ".db", ".pyc"}

# Put together, so that this file does not hold what it looks for.
HOSTS = [
    name + end
    for name, end in (
        ("py" + "pi", ".org"),
        ("python" + "hosted", ".org"),
        ("repo1." + "maven", ".org"),
        ("repo.maven." + "apache", ".org"),
        ("maven" + "central", ""),
        ("npm" + "js", ".org"),
        ("crates" + ".", "io"),
        ("proxy." + "golang", ".org"),
        ("docker" + ".", "io/"),  # without the slash it is a package of Debian's
        ("quay" + ".", "io"),
        ("deb." + "debian", ".org"),
    )
]
SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE " + r"KEY-----",
    "an access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token": r"\b(gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|sk-[A-Za-z0-9]{20,})\b",
    "a password in a URL": r"[a-z]+://[^\s:/@'\"{}<>]+:(?!%\(|p%40ss@|tell-nobody|x@|PASSWORD@)[^\s/@'\"{}<>$]{6,}@",
    "a password that is set": r"(?i)(password|secret|token)[\"']?\s*[=:]\s*[\"']?(?=[A-Za-z0-9+/_-]{20,})(?=[^\s\"']*[0-9])(?=[^\s\"']*[A-Z])[A-Za-z0-9+/_-]{20,}",
}
MACHINE = re.compile(r"(?<![\w.~-])/(home/(?!you/)\w|Users/\w|root/|work/|mnt/\w|media/\w|tmp/\w)")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-c", "safe.directory=*", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@cache
def tracked() -> tuple[Path, ...]:
    """Every file in git's index that is there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return tuple(path for name in _git("ls-files", "-z").split("\0") if name and (path := ROOT / name).is_file())


def texts() -> Iterator[tuple[Path, str]]:
    """Every tracked text file with its text."""
    for path in tracked():
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            assert path.suffix == ".png", f"{path} is no UTF-8 text"


def matches(pattern: str | re.Pattern[str], *without: str) -> list[str]:
    """Where a pattern occurs, as `file:line: text`."""
    found = []
    for path, text in texts():
        name = path.relative_to(ROOT).as_posix()
        if name not in without:
            found += [
                f"{name}:{number}: {line.strip()[:120]}"
                for number, line in enumerate(text.splitlines(), 1)
                if re.search(pattern, line)
            ]
    return found


def test_no_registry_host() -> None:
    assert matches("|".join(map(re.escape, HOSTS))) == []


@pytest.mark.parametrize("what", SECRETS)
def test_no_secret(what: str) -> None:
    assert matches(SECRETS[what]) == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a private key", "-----BEGIN RSA PRIVATE " + "KEY-----"),
        ("an access key", "AKIA" + "ABCDEFGHIJKLMNOP"),
        ("a token", "ghp_" + "abcdefghij0123456789"),
        ("a password in a URL", "postgresql://me:" + "hunter22@host/db"),
        ("a password that is set", "POSTGRES_PASSWORD=" + "Zx81kQpLm20sUv_4TtRw"),
    ],
)
def test_a_secret_would_be_seen(what: str, text: str) -> None:
    assert re.search(SECRETS[what], text)


def test_no_path_of_a_machine() -> None:
    assert matches(MACHINE, "metrics_pipeline_tests/test_repository.py") == []


def test_nothing_beyond_the_checkout_is_referred_to() -> None:
    """But tests try such paths, and a page links to a file beside docs/, which has to exist: see test_documents.py."""
    found = matches(r"(?<![\w.])(?<!\]\()\.\./|\.\./\.\./")
    found += [line for line in matches(r"\]\(\.\./") if not line.startswith("docs/")]
    assert [line for line in found if not line.startswith("metrics_pipeline_tests/")] == []


def test_nothing_large_and_nothing_compiled() -> None:
    for path in tracked():
        assert path.stat().st_size <= LARGEST, path
        assert path.suffix not in BINARIES, path


def test_nothing_ignored_is_tracked() -> None:
    assert _git("ls-files", "--cached", "--ignored", "--exclude-standard").split() == []


@pytest.mark.parametrize("lock", ["runtime.txt", "dev.txt"])
def test_every_locked_package_has_a_version_and_a_hash(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text().replace("\\\n", " ")
    requirements = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(requirements) > 50
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+ ", requirement), requirement[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement[:80]


def test_development_adds_to_the_runtime_lock_and_changes_nothing_in_it() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[a-z0-9._-]+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))

    assert pins("runtime.txt") <= pins("dev.txt")


def test_what_is_run_can_be_run() -> None:
    for path in tracked():
        with path.open("rb") as file:
            begins = file.read(2)
        assert (begins == b"#!") == bool(path.stat().st_mode & stat.S_IXUSR), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git tracks, as a release builds it."""
    checkout = tmp_path_factory.mktemp("wheel") / "checkout"
    for path in tracked():
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy2(path, copy)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(checkout.parent), str(checkout)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = checkout.parent.glob("*.whl")
    return found


def test_the_wheel_has_every_module_and_all_that_the_package_reads(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in tracked()}
    modules = {name for name in files if name.startswith("metrics_pipeline/")}
    assets = {
        name
        for name in files
        if name.startswith(("sql/", "connect/", "compose/jmx/"))
        or name in {"dagster_home/dagster.yaml", "requirements/runtime.txt"}
    }
    assert names == modules | {f"metrics_pipeline/assets/{name}" for name in assets}


def test_the_wheel_s_contents_are_those_of_a_good_wheel(wheel: Path) -> None:
    checked = subprocess.run(
        [Path(sys.executable).with_name("check-wheel-contents"), wheel], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
