"""`python requirements/pip.py install …`: pip, as the Makefile needs it whatever its user has told pip in general.

Of the user's variables and files counts what says where packages come from and how that is reached: index, certificate, proxy. What
says where packages go, or which are taken (`user`, `target`, `prefix`, `constraint`, …), was meant for something else.
Only the standard library is there when it runs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

KEPT = frozenset(
    [
        "index-url",
        "extra-index-url",
        "no-index",
        "find-links",
        "trusted-host",
        "cert",
        "client-cert",
        "proxy",
        "keyring-provider",
        "timeout",
        "default-timeout",
        "retries",
        "resume-retries",
        "cache-dir",
        "no-cache-dir",
        "use-feature",
        "use-deprecated",
    ]
)
PLAIN = dict.fromkeys(("PIP_USER", "PIP_GLOBAL", "PIP_SITE", "PIP_QUIET", "PIP_VERBOSE", "PIP_REQUIRE_VIRTUALENV"), "0")
"""Over the user's files: `user = true`, meant for `install`, would make `config list` show the user's own file alone."""
SECTIONS = ("global", "install", ":env:")
"""Where pip finds what it does with `install`, each over the one before."""


def environment(given: dict[str, str]) -> dict[str, str]:
    """What pip is started with, out of what it would find by itself."""
    clean = {
        name: value
        for name, value in given.items()
        if not name.startswith(("PIP_", "PYTHON")) and name not in ("VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    }
    own = {name: value for name, value in given.items() if name.startswith("PIP_")}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=clean | own | PLAIN,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        sys.exit(f"pip cannot read its own configuration: {listed.stderr.strip()}")
    found = {}
    for section in SECTIONS:
        for line in listed.stdout.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}.") and (key := name.removeprefix(f"{section}.")) in KEPT:
                found[f"PIP_{key.upper().replace('-', '_')}"] = str(ast.literal_eval(value))
    return clean | found | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


if __name__ == "__main__":
    made = environment(dict(os.environ))
    os.execve(sys.executable, [sys.executable, "-m", "pip", *sys.argv[1:]], made)  # noqa: S606  # there is no shell
