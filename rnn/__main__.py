"""`python -m rnn`: train a deep RNN character language model (rnn/charlm.py)."""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

try:
    from .charlm import CHECKPOINT, LOSS_CURVE, STDLIB, JobError, Settings, load_checkpoint, run
except ModuleNotFoundError as error:
    if error.name not in ("tqdm", "matplotlib"):
        raise
    print(f"python -m rnn needs {error.name}: pip install tqdm matplotlib", file=sys.stderr)
    sys.exit(2)

SHAPE = ("hidden_size", "num_layers", "dtype", "seed")  # what no resumed run can change
OUT = Path("runs/charlm")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least: int) -> Callable[[str], int]:
    def parse(argument: str) -> int:
        if not least <= int(argument) < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {argument}")
        return int(argument)

    parse.__name__ = "whole number"  # argparse puts it into its message
    return parse


def duration(argument: str) -> float:
    if not 0 < float(argument) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {argument}")
    return float(argument)


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m rnn",
        description="Train a deep RNN character language model, and hold it against count models.",
        argument_default=argparse.SUPPRESS,  # what is absent comes from a checkpoint or Settings
    )

    def add(name: str, help: str, default: object = None, **how: Any) -> None:
        help = f"{help} (default: {default or getattr(Settings, name)})"
        parser.add_argument("--" + name.replace("_", "-"), help=help, **how)

    add("hidden_size", "units in a layer", type=whole(1), metavar="H")
    add("num_layers", "layers", type=whole(1), metavar="L")
    add("dtype", "of weights and states; the loss is never 16-bit", choices=DTYPES)
    add("backend", "of the recurrence", choices=("auto", "triton", "torch"))
    add("device", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    add("seconds", "of training, all resumed runs together", type=duration, metavar="S")
    add("seed", "of the weights and the sample", type=whole(0), metavar="N")
    add("text", "UTF-8 text to learn", default=STDLIB, type=os.path.abspath, metavar="FILE")
    add("out", f"folder for {CHECKPOINT} and {LOSS_CURVE}", default=OUT, type=Path, metavar="DIR")
    resume = "go on from the checkpoint in --out; a flag left out keeps the value it had there"
    add("resume", resume, default="start afresh", action="store_true")
    return parser


def settle(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """The settings of a run: those given, else those of its checkpoint, else the defaults."""
    for name in SHAPE:
        if name in saved and given.get(name, saved[name]) != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise JobError(
                f"the checkpoint is of another shape: {flag} {saved[name]}, not {given[name]}"
            )
    return Settings(**{**saved, **given})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0, or 130 after an interrupt (an error: 2)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    out, resume = given.pop("out", OUT), given.pop("resume", False)
    try:
        checkpoint = load_checkpoint(out / CHECKPOINT) if resume else None
        run(settle(given, checkpoint["settings"] if checkpoint else {}), out, checkpoint)
    except JobError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        path = out / CHECKPOINT
        where = f"the checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        print(f"interrupted; {where}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
