"""The command line of all commands: how arguments are parsed, and how a command ends."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .interrupts import Raising, handled_by

CHECKPOINT = "checkpoint.pt"
SAVE_EVERY = 30.0  # seconds


class JobError(Exception):
    """A command cannot do what was asked; the first line of the message says why."""

    def __str__(self) -> str:
        return super().__str__().splitlines()[0]


class Stderr:
    """Standard error, as long as somebody reads it: a training does not end with its terminal. Of
    the processes that torchrun starts, the first alone writes."""

    def write(self, text: str) -> int:
        if os.environ.get("RANK", "0") != "0":
            return 0
        try:
            return sys.stderr.write(text) if sys.stderr else 0
        except (OSError, ValueError):  # a broken pipe, a terminal that hung up, a closed file
            return 0

    def flush(self) -> None:
        try:
            if sys.stderr:
                sys.stderr.flush()
        except (OSError, ValueError):
            pass  # as in write

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Parser(argparse.ArgumentParser):
    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.flags: dict[str, argparse.Action] = {}  # those of `add`, by the setting's name

    def error(self, message: str) -> NoReturn:
        """One line on stderr, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def add(self, name: str, help: str, default: object, **how: Any) -> None:
        """A flag for a setting. If it is left out, it is absent from the result: a checkpoint or
        the defaults then give the value."""
        flag, help = "--" + name.replace("_", "-"), f"{help} (default: {default})"
        self.flags[name] = self.add_argument(
            flag, help=help, **{"default": argparse.SUPPRESS, **how}
        )

    def add_out(self, out: Path, help: str) -> None:
        self.add("out", help, out, type=Path, metavar="DIR")
        self.set_defaults(out=out)

    def add_saving(self) -> None:
        """The flags that say when a checkpoint is saved."""
        every = "between the checkpoints while it trains; one more is saved at the end"
        self.add("save_every", every, SAVE_EVERY, type=duration, metavar="S")
        overwrite = "replace the checkpoint in --out, if there is one"
        self.add("overwrite", overwrite, "keep it as checkpoint-1.pt", action="store_true")

    def add_where(self) -> None:
        """The flags that say where it runs."""
        self.add("backend", "of the recurrence", "auto", choices=("auto", "triton", "torch"))
        self.add(
            "device", "auto takes a GPU where there is one", "auto", choices=("auto", "cpu", "cuda")
        )

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless value is what the flag of this setting gives for some
        argument."""
        flag = self.flags[name]
        try:
            given = flag.type(str(value)) if callable(flag.type) else str(value)
            right = isinstance(value, int | float | str) and given == value
        except (ValueError, argparse.ArgumentTypeError):
            right = False
        if flag.choices is not None:
            if not right or value not in flag.choices:
                known = ", ".join(map(str, flag.choices))
                raise ValueError(f"its setting {name} is {value!r}, not one of {known}")
        elif not right:
            raise ValueError(f"its setting {name} cannot be {value!r}")


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


def execute(
    parser: Parser, argv: Sequence[str], start: Callable[[dict[str, Any], Path], None]
) -> int:
    """Run a command line: start(the parsed arguments, out), where out is --out, or the folder of
    the checkpoint for a command without a default for --out. Returns its exit status: 0, or
    128 + the signal that ended it. An error ends the process with status 2."""
    given = vars(parser.parse_args(argv))
    path = (out := given.pop("out", None) or given["checkpoint"].parent) / CHECKPOINT
    before, raising = version(path), Raising()
    with handled_by(raising):
        try:
            start(given, out)
            return 0
        except JobError as error:
            raising.done = True
            parser.error(str(error))
        except KeyboardInterrupt as interrupt:
            raising.done = True
            after, number = version(path), getattr(interrupt, "signal", 2)
            if after is None:
                where = "there is no checkpoint yet"
            else:
                where = f"the checkpoint is {path}"
                where += ", as it was before this run" if after == before else ""
            print(f"interrupted; {where}", file=Stderr())
            return 128 + number


def version(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file is replaced; None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def find_device(name: str) -> str:
    """The device that --device asks for, or JobError where there is none."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise JobError("--device cuda: PyTorch finds no GPU here")
    return name if name != "auto" else "cuda" if cuda else "cpu"
