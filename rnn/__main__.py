"""`python -m rnn [COMMAND]`: the jobs of rnn/jobs, the character language model by default."""

import io
import sys
from collections.abc import Sequence
from importlib import import_module

from .jobs import COMMANDS

DEFAULT = "charlm"
EXTRA = {"tqdm": "tqdm", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # module: package


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0, or 130 after an interrupt (an error: 2)."""
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


if __name__ == "__main__":
    sys.exit(main())
