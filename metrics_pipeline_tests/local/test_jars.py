"""Jars: only what was locked is ever used. Downloads come through jgo from a repository on loopback."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from jgo.maven import MavenContext

from metrics_pipeline.errors import InstallError
from metrics_pipeline.local import jars
from metrics_pipeline.local.jars import LockedJar
from metrics_pipeline.settings import Settings
from metrics_pipeline_tests.fake_http import Request, listening

CONTENT = {"org.example:first:jar::1.0": b"first" * 1000, "org.example:second:jar:plugin:2.0": b"second" * 1000}


class Repository:
    """A Maven repository on loopback. `change` alters what a file's request is answered with; None breaks the answer off."""

    server: ThreadingHTTPServer

    def __init__(self) -> None:
        self.change: Callable[[str, bytes], bytes | None] = lambda _name, content: content
        self.asked: list[str] = []
        self._files = {_file_name(coordinate): content for coordinate, content in CONTENT.items()}

    def respond(self, request: Request) -> None:
        name = request.path.rpartition("/")[2]
        if name not in self._files:  # a checksum, for one
            request.send_error(404)
            return
        self.asked.append(name)
        content = self.change(name, self._files[name])
        request.send_response(200)
        request.send_header("Content-Length", str(len(self._files[name] if content is None else content)))
        request.end_headers()
        request.wfile.write(self._files[name][:100] if content is None else content)


def _file_name(coordinate: str) -> str:
    return LockedJar("any", coordinate, "", 0).file_name


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repository]:
    """Two jars, locked for use `kafka`, that only this repository has."""
    repository = Repository()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    lock = tmp_path / "jars.lock"
    lock.write_text(
        "# use, coordinate, sha256, bytes\n"
        + "".join(f"kafka {name} {hashlib.sha256(data).hexdigest()} {len(data)}\n" for name, data in CONTENT.items())
    )
    monkeypatch.setattr(jars, "LOCK_FILE", lock)
    resolve = jars._artifact

    def artifact(context: MavenContext, coordinate: str) -> Any:
        here = MavenContext(
            repo_cache=context.repo_cache,
            local_repos=[],
            remote_repos={"test": f"http://127.0.0.1:{repository.server.server_port}"},
            resolver=context.resolver,
        )
        return resolve(here, coordinate)

    monkeypatch.setattr(jars, "_artifact", artifact)
    with listening(repository.respond) as repository.server:
        yield repository


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load(pipeline_cache_dir=tmp_path / "cache")


def cached(settings: Settings) -> list[str]:
    return sorted(path.name for path in (jars.cache_dir(settings) / "jars").iterdir())


def fetch(settings: Settings) -> list[Path]:
    return jars.fetch(settings, ["kafka"], quiet=True)["kafka"]


def test_the_committed_lock_is_whole() -> None:
    locked = jars.read_lock()
    assert {jar.use for jar in locked} == {
        "kafka",
        "debezium",
        "jmx",
        *(f"postgres-{name}" for name in jars.POSTGRES_PLATFORMS),
    }
    for jar in locked:
        assert re.fullmatch(r"[0-9a-f]{64}", jar.sha256), jar
        assert jar.size > 0, jar
        assert jar.coordinate.count(":") == 4, jar
    assert len({jar.file_name for jar in locked}) == len(locked)
    versions = {tuple(jar.coordinate.split(":")[i] for i in (0, 1, 4)) for jar in locked}
    for root in jars.KAFKA_ROOTS:
        assert tuple(root.split(":")) in versions
    assert ("io.debezium", "debezium-connector-jdbc", jars.DEBEZIUM) in versions


def test_the_lock_has_one_version_of_each_jar_on_the_class_path() -> None:
    names = [jar.coordinate.rpartition(":")[0] for jar in jars.read_lock() if jar.use == "kafka"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("Linux", "x86_64", "linux-amd64"),
        ("Linux", "aarch64", "linux-arm64v8"),
        ("Darwin", "arm64", "darwin-arm64v8"),
        ("Darwin", "x86_64", "darwin-amd64"),
    ],
)
def test_platform_names(system: str, machine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert jars.postgres_platform() == name
    assert any(jar.use == f"postgres-{name}" for jar in jars.needed(["postgres"]))


def test_a_platform_without_postgresql_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(InstallError, match="no embedded PostgreSQL for Linux on riscv64: set POSTGRES_URL"):
        jars.postgres_platform()


def test_a_first_fetch_keeps_exactly_the_locked_files(repository: Repository, settings: Settings) -> None:
    paths = fetch(settings)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert cached(settings) == ["first-1.0.jar", "second-2.0-plugin.jar"]


def test_a_second_fetch_asks_nobody(repository: Repository, settings: Settings) -> None:
    first = fetch(settings)
    repository.server.shutdown()
    repository.asked.clear()
    assert fetch(settings) == first
    assert repository.asked == []


def test_a_flipped_byte_in_the_cache_is_found_named_and_mended(repository: Repository, settings: Settings) -> None:
    path = fetch(settings)[0]
    content = bytearray(path.read_bytes())
    content[2500] ^= 1
    path.write_bytes(content)
    with pytest.raises(InstallError, match=rf"{re.escape(str(path))} was altered: .*run the command again"):
        fetch(settings)
    assert cached(settings) == ["second-2.0-plugin.jar"]
    repository.asked.clear()
    assert fetch(settings)[0].read_bytes() == next(iter(CONTENT.values()))
    assert repository.asked == ["first-1.0.jar"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda content: content[:-1] + b"?", "cut off or altered", id="altered"),
        pytest.param(lambda content: content[:100], "100 bytes; locked is .* 6000 bytes", id="shortened by the server"),
        pytest.param(lambda _content: None, "cut off or altered|cannot download", id="connection cut"),
        pytest.param(lambda _content: b"", "cut off or altered|cannot download", id="empty"),
    ],
)
def test_a_bad_download_is_named_and_nothing_of_it_kept(
    change: Callable[[bytes], bytes | None], says: str, repository: Repository, settings: Settings
) -> None:
    repository.change = lambda name, content: change(content) if name.startswith("second") else content
    with pytest.raises(InstallError, match=says) as caught:
        fetch(settings)
    assert "org.example:second:jar:plugin:2.0" in str(caught.value)
    assert "run the command again" in str(caught.value)
    assert set(cached(settings)) <= {"first-1.0.jar"}
    repository.change = lambda _name, content: content
    assert len(fetch(settings)) == 2


def test_an_unreachable_repository_is_one_clear_error(repository: Repository, settings: Settings) -> None:
    repository.server.shutdown()
    repository.server.server_close()
    with pytest.raises(
        InstallError, match=r"cannot download org\.example:.*Check the network and run the command again"
    ):
        fetch(settings)
    assert cached(settings) == []


def test_a_cache_that_cannot_be_made_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallError, match=r"cannot write the jar cache .*PIPELINE_CACHE_DIR"):
        jars.fetch(Settings.load(pipeline_cache_dir=tmp_path / "file"), [], quiet=True)


def plugin_archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(f"debezium-connector-jdbc/{name}")
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"data"))
    return path


def test_the_plugin_loses_what_only_other_databases_need(tmp_path: Path) -> None:
    keep = ["debezium-core.jar", "postgresql-42.7.11.jar", "hibernate-core.jar", "LICENSE.txt"]
    drop = ["ojdbc11.jar", "mssql-jdbc.jar", "mysql-connector-j.jar", "kafka-clients-4.2.jar", "connect-api-4.2.jar"]
    archive = plugin_archive(tmp_path / "plugin.tar.gz", *keep, *drop)
    folder = jars.unpack_debezium(archive, tmp_path / "cache")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(keep)


def test_unpacking_happens_once(tmp_path: Path) -> None:
    archive = plugin_archive(tmp_path / "plugin.tar.gz", "debezium-core.jar")
    folder = jars.unpack_debezium(archive, tmp_path / "cache")
    archive.unlink()
    assert jars.unpack_debezium(archive, tmp_path / "cache") == folder


def test_unpacking_that_fails_leaves_nothing(tmp_path: Path) -> None:
    archive = plugin_archive(tmp_path / "plugin.tar.gz", *(f"{number}.jar" for number in range(500)))
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises((EOFError, tarfile.ReadError)):
        jars.unpack_debezium(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_that_unpack_at_once_agree(tmp_path: Path) -> None:
    archive = plugin_archive(tmp_path / "plugin.tar.gz", *(f"{number}.jar" for number in range(50)))
    found: list[int] = []

    def unpack() -> None:
        folder = jars.unpack_debezium(archive, tmp_path / "cache")
        found.append(sum(path.is_file() for path in folder.rglob("*")))

    threads = [threading.Thread(target=unpack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [50] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def postgres_archive(path: Path) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        entry = tarfile.TarInfo("bin/postgres")
        entry.size, entry.mode = 4, 0o755
        tar.addfile(entry, io.BytesIO(b"data"))
    with zipfile.ZipFile(path, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "")
        jar.writestr("postgres-linux-x86_64.txz", inner.getvalue())
    return path


def test_postgresql_comes_out_of_the_archive_within_the_jar(tmp_path: Path) -> None:
    archive = postgres_archive(tmp_path / "postgres.jar")
    home = jars.unpack_postgres(archive, tmp_path / "home")
    assert (home / "bin/postgres").stat().st_mode & 0o777 == 0o755
    assert home.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_unpacked_is_readable_by_every_account(tmp_path: Path, umask: int) -> None:
    """An image is built by root and run by another account, and PostgreSQL never runs as root."""
    before = os.umask(umask)
    try:
        plugin = jars.unpack_debezium(plugin_archive(tmp_path / "plugin.tar.gz", "lib/core.jar"), tmp_path / "cache")
        home = jars.unpack_postgres(postgres_archive(tmp_path / "postgres.jar"), tmp_path / "home")
    finally:
        os.umask(before)
    for path in (plugin, *plugin.rglob("*"), home, *home.rglob("*")):
        wanted = 0o755 if path.is_dir() or path.name == "postgres" else 0o644
        assert path.stat().st_mode & 0o777 == wanted, path
