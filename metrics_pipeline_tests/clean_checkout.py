"""A clean checkout in a folder, `make dg` in it as somebody runs it who has no settings, and what it says to the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from metrics_pipeline.local.environment import isolated
from metrics_pipeline.settings import ROOT

WATCH = """
import os, socket, sys

def told(event, host):
    host = host.decode() if isinstance(host, bytes) else host
    if host and host not in ("localhost", "::1", "0.0.0.0") and not host.startswith("127."):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(sys.argv[0], event, host, file=log)

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

def watched_connect(self, address):
    if isinstance(address, tuple):
        told("connect", address[0])
    return connect(self, address)

def watched_getaddrinfo(host, *arguments, **named):
    told("getaddrinfo", host)
    return getaddrinfo(host, *arguments, **named)

socket.socket.connect, socket.getaddrinfo = watched_connect, watched_getaddrinfo
"""
"""A `sitecustomize` for every Python below: whom but this machine it looks up or connects to."""


@dataclass(frozen=True)
class CleanCheckout:
    """A copy of what git tracks, and what it would, with a home that is empty and ports that nobody listens on.

    Attributes:
        folder: the checkout.
        environment: of who runs something in it.
    """

    folder: Path
    environment: dict[str, str]

    @classmethod
    def make(cls, place: Path) -> CleanCheckout:
        """Lay one into a folder."""
        folder, home, watch = (place / name for name in ("checkout", "home", "watch"))
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").mkdir()  # as after `make`; dg compares it with the one that is activated
        home.mkdir()
        watch.mkdir()
        (watch / "sitecustomize.py").write_text(WATCH)
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "NETWORK_LOG": str(place / "network"),
            "PYTHONPATH": str(watch),
            "PYTHONDONTWRITEBYTECODE": "1",
            **isolated(place),
        }
        return cls(folder, environment)

    def command(self, arguments: str) -> list[str]:
        """`make dg`, with the packages of who asks instead of a `.venv` that would have to be made first."""
        packages = str(Path(sys.executable).parent)
        return ["make", "--no-print-directory", "-o", ".venv/.dev", "dg", f"BIN={packages}", f"ARGS={arguments}"]

    def dg(self, arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `make dg` to its end."""
        return subprocess.run(
            self.command(arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def files(self) -> set[str]:
        """Every file in the checkout and in the home."""
        return {str(path) for place in (self.folder, self.home) for path in place.rglob("*") if path.is_file()}

    @property
    def home(self) -> Path:
        """The home of who runs it."""
        return Path(self.environment["HOME"])

    @property
    def contacted(self) -> list[str]:
        """Who, beyond this machine, was looked up or connected to."""
        log = Path(self.environment["NETWORK_LOG"])
        return log.read_text().splitlines() if log.exists() else []
