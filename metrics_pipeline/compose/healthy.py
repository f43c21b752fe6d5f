"""`python -m metrics_pipeline.compose.healthy URL…`: exit code 0 when each URL answers with 2xx.

For the health checks of images that have no curl. It imports nothing of the package: it runs every few seconds.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5


def main(*urls: str) -> int:
    """Ask each once; the first reason goes to standard error, where `docker inspect` shows it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for url in urls:
        try:
            opener.open(url, timeout=TIMEOUT_SECONDS).close()
        except (urllib.error.URLError, OSError) as error:
            sys.stderr.write(f"{url}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
