"""`python -m metrics_pipeline` and `metrics-pipeline`: the command line, in an interpreter that nothing of the shell has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metrics_pipeline.surroundings import needs_another_interpreter, without_python


def main() -> None:
    """Begin again without the shell's Python variables where there are any, then run the command."""
    if needs_another_interpreter(os.environ, Path(__file__).resolve().parent):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], without_python(os.environ))  # noqa: S606  # there is no shell
    from metrics_pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
