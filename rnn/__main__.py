"""`python -m rnn [COMMAND]`: the jobs of rnn/jobs, the character language model by default."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from .jobs import COMMANDS

DEFAULT = "charlm"
EXTRA = {"tqdm": "tqdm", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # module: package
BROKEN_PIPE = 128 + 13  # the exit status of a program that SIGPIPE ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0, or 128 + the signal that ended it (an error:
    2)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot
    name, *rest = (sys.argv[1:] if argv is None else argv) or [DEFAULT]
    if name == "--list":
        for command in COMMANDS:
            print(f"python -m rnn {command:16} {COMMANDS[command].about}")
        return 0
    if name.startswith("-"):
        name, rest = DEFAULT, [name, *rest]
    if name not in COMMANDS:
        print(f"python -m rnn: no {name!r}, but {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = import_module(f"rnn.jobs.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        needed = " ".join(EXTRA.values())
        print(f"python -m rnn needs {EXTRA[error.name]}: pip install {needed}", file=sys.stderr)
        return 2
    return module.main(name, rest)


def discard(stream: TextIO | None) -> None:
    """Drop what a stream still holds: Python would try to write it once more at its own end."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main_of_process() -> int:
    """main, and write out what it printed. An error of that is one line, and none if the reader
    has gone, as `| head -1` goes. Standard error may be lost: nobody can be told."""
    try:
        try:
            status = main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        print(end="", flush=True)
    except OSError as error:
        discard(sys.stdout)
        status = BROKEN_PIPE
        if not isinstance(error, BrokenPipeError):
            status = 2
            print(f"python -m rnn: {error}", file=sys.stderr)
    try:
        print(end="", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)
    return status


if __name__ == "__main__":
    STATUS = main_of_process()
    # All is said and saved. Python's own end would give SIGINT back its default, so that one more
    # Ctrl-C there would replace the status.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(STATUS)
