"""What the commands share: how arguments are parsed and refused, and what a run leaves behind."""

import argparse
import math
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NoReturn
from zipfile import BadZipFile, ZipFile

import torch

CHECKPOINT = "checkpoint.pt"


class JobError(Exception):
    """What was asked for cannot be done; the first line of the message says why."""

    def __str__(self) -> str:
        return super().__str__().splitlines()[0]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def add(self, name: str, help: str, default: object, **how: Any) -> None:
        """A flag for a setting. One that is left out is absent from the result: what it is then,
        a checkpoint or the defaults say."""
        flag, help = "--" + name.replace("_", "-"), f"{help} (default: {default})"
        self.add_argument(flag, help=help, **{"default": argparse.SUPPRESS, **how})

    def add_out(self, out: Path, help: str) -> None:
        self.add("out", help, out, type=Path, metavar="DIR")
        self.set_defaults(out=out)

    def add_where(self) -> None:
        """The flags that say where it runs."""
        self.add("backend", "of the recurrence", "auto", choices=("auto", "triton", "torch"))
        self.add(
            "device", "auto takes a GPU where there is one", "auto", choices=("auto", "cpu", "cuda")
        )


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
    """Run a command line: start(what was given, --out), where a command without a default for --out
    has a checkpoint to write beside. Returns its exit status: 0, or 130 after
    an interrupt; an error ends the process with status 2."""
    given = vars(parser.parse_args(argv))
    out = given.pop("out", None) or given["checkpoint"].parent
    try:
        start(given, out)
    except JobError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        path = out and out / CHECKPOINT
        where = (
            f"the checkpoint is {path}" if path and path.exists() else "there is no checkpoint yet"
        )
        print(f"interrupted; {where}", file=sys.stderr)
        return 130
    return 0


def find_device(name: str) -> str:
    """The device that --device asks for, or JobError where there is none."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise JobError("--device cuda: PyTorch finds no GPU here")
    return name if name != "auto" else "cuda" if cuda else "cpu"


def make_folder(out: Path) -> None:
    """Make the folder and see that it can be written to: better now than after the training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise JobError(f"cannot write to {out}: {error}") from error


@contextmanager
def interrupts_held() -> Iterator[Event]:
    """Turn Ctrl-C into an event, so that it cuts neither a training step nor a save in two."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def format_of(job: str) -> str:
    """What a checkpoint of this job calls itself."""
    return f"fused-rnn {job} 1"


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write to a file beside path, then rename: at every moment path is a whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, *jobs: str) -> dict[str, Any]:
    """Read a checkpoint of one of these jobs, on the CPU, once the checksums that torch.load skips
    are found right. Raises JobError where it is none, or damaged."""
    try:
        with ZipFile(path) as archive:
            if archive.testzip():
                raise BadZipFile("its checksums are wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise JobError(f"there is no checkpoint {path}") from error
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise JobError(f"cannot read the checkpoint {path}: {error}") from error
    known = [format_of(job) for job in jobs]
    if not isinstance(checkpoint, dict) or checkpoint.get("format") not in known:
        raise JobError(f"{path} is no checkpoint of {' or '.join(jobs)}")
    return checkpoint
