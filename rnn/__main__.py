"""`python -m rnn [COMMAND]`: the jobs of rnn/jobs, the character language model by default."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

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


def main_of_process() -> int:
    """main, and what it printed is written out: an error then is one line, and a reader that has
    gone, as `| head -1` goes, is none."""
    try:
        try:
            status = main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        print(end="", flush=True)
    except OSError as error:
        if sys.stdout is not None:
            # What is left in its buffer: Python would try once more, at its own end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"python -m rnn: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main_of_process())
