"""Checkpoints: how a run saves them, and how one is read that may be damaged, foreign or hostile.

A checkpoint is a dict of plain values and tensors, written by torch.save:
    format    "fused-rnn JOB VERSION"
    settings  the Settings of the run, as a dict
    model     the weights, as a state_dict
    losses    of each step
and what the job adds.
"""

import math
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .cli import JobError, Parser, Stderr
from .files import replace_file

VERSION = 1
FIELDS = {"settings": dict, "model": dict, "losses": list}  # of every checkpoint
T = TypeVar("T")


def format_of(job: str) -> str:
    """The `format` of a checkpoint of this job."""
    return f"fused-rnn {job} {VERSION}"


# Saving


class Saver:
    """Saves the checkpoint of a run: after its first step, so that a disk without room is seen at
    once; every so many seconds; and at its end. Unless it is to be overwritten, the checkpoint of
    an earlier run is kept under another name."""

    def __init__(self, path: Path, every: float, overwrite: bool) -> None:
        self.path, self.every = path, every
        self.saved_at: float | None = None
        self.tried_at = -math.inf
        self.keep: Path | None = None
        if path.exists() and not overwrite:
            names = (path.with_stem(f"{path.stem}-{n}") for n in range(1, 10**9))
            self.keep = next(name for name in names if not name.exists())
            print(f"{path} is of an earlier run: it will be kept as {self.keep}")

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.tried_at >= self.every

    def after_step(self, make: Callable[[], dict[str, Any]]) -> None:
        """Save make() if it is time to. JobError if the first save fails. A later one that fails
        is tried again in its time: until then the training goes on."""
        if not self.due():
            return
        try:
            self._save(make())
        except OSError as error:
            if self.saved_at is None:
                raise JobError(f"cannot save {self.path}: {error}") from error
            tqdm.write(f"cannot save {self.path}, will try again: {error}", file=Stderr())
        self.tried_at = time.monotonic()

    def at_end(self, make: Callable[[], dict[str, Any]]) -> None:
        """Save make(). If that fails, save it among the temporary files; JobError says where."""
        checkpoint = make()
        try:
            self._save(checkpoint)
        except OSError as error:
            failure = f"cannot save {self.path}: {error}"
            if self.saved_at is not None:
                failure += f"; it is {time.monotonic() - self.saved_at:.0f} s old"
            try:
                folder = Path(tempfile.mkdtemp(prefix="fused-rnn-"))
                replace_file(folder / self.path.name, as_bytes(checkpoint))
            except OSError as again:
                raise JobError(f"{failure}; nor among the temporary files: {again}") from error
            raise JobError(f"{failure}; saved as {folder / self.path.name} instead") from error

    def _save(self, checkpoint: dict[str, Any]) -> None:
        replace_file(self.path, as_bytes(checkpoint), keep=self.keep)
        self.keep, self.saved_at = None, time.monotonic()


def as_bytes(checkpoint: dict[str, Any]) -> memoryview:
    torch.save(checkpoint, buffer := BytesIO())
    return buffer.getbuffer()


# Reading


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a ValueError, which says what is wrong with a checkpoint, into a JobError."""
    try:
        yield
    except ValueError as error:
        raise JobError(f"cannot read the checkpoint {path}: {error}") from error


def load_checkpoint(path: Path, *jobs: str) -> dict[str, Any]:
    """Read a checkpoint of one of these jobs, on the CPU, and check FIELDS. Raises JobError where
    it is none, damaged, or of a newer version. Code that it may hold is not run."""
    try:
        with ZipFile(path) as archive:  # torch.load skips the checksums
            if archive.testzip():
                raise BadZipFile("its checksums are wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise JobError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        reason = "it holds something else than tensors and plain values, which could run code"
        raise JobError(f"cannot read the checkpoint {path}: {reason}") from error
    except Exception as error:  # a damaged file may make the unpickler raise anything
        reason = str(error) or type(error).__name__
        raise JobError(f"cannot read the checkpoint {path}: {reason}") from error
    name = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    match = re.fullmatch(r"fused-rnn (\S+) (\d+)", str(name))
    if match is None or match[1] not in jobs:
        raise JobError(f"{path} is no checkpoint of {' or '.join(jobs)}")
    with reading(path):
        if match[2] != str(VERSION):
            raise ValueError(f"its format is {name}, and this program reads version {VERSION}")
        check_fields(checkpoint, FIELDS)
        if not checkpoint["losses"] or not all(map(is_finite, checkpoint["losses"])):
            raise ValueError("its 'losses' are not those of a training")
    return checkpoint


def is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def check_fields(checkpoint: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """ValueError unless the checkpoint has these fields, each of its type."""
    for name, kind in types.items():
        if name not in checkpoint:
            raise ValueError(f"it has no {name!r}")
        value = checkpoint[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            found = type(value).__name__
            raise ValueError(f"its {name!r} is of type {found}, not {kind.__name__}")


def read_settings(saved: dict[Any, Any], kind: type[T], parser: Parser) -> T:
    """The settings of a checkpoint, checked as their flags are. Only kind.ADDED may be missing:
    they are newer than the oldest checkpoints, and stand for what was done before."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in saved.items():
        if name not in known:
            raise ValueError(f"it has a setting that this version does not know: {name!r}")
        if value is None and known[name].default is None:
            continue
        parser.check(name, value)
    for name in known:
        if name not in saved and name not in kind.ADDED:  # type: ignore[attr-defined]
            raise ValueError(f"it has no setting {name!r}")
    return kind(**saved)


def fits(found: object, expected: Tensor) -> bool:
    """Whether it is a finite tensor of the shape and dtype of another one."""
    return (
        isinstance(found, Tensor)
        and found.layout == torch.strided
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        and bool(found.isfinite().all())
    )


def check_weights(
    saved: dict[Any, Any], settings: Any, make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    """ValueError unless these are finite weights, of this dtype, of the model that make() makes.
    No memory is taken for that model."""
    s = settings
    model = f"a model with cell {s.cell}, hidden_size {s.hidden_size} and {s.num_layers} layers"
    if len(saved) < s.num_layers:
        raise ValueError(f"it has {len(saved)} weights: too few for {model}")
    with torch.device("meta"):
        try:
            expected = make().to(dtype).state_dict()
        except RuntimeError as error:  # more weights than can be counted
            raise ValueError(f"its settings are those of no model: {error}") from error
    for name, weight in expected.items():
        if name not in saved:
            raise ValueError(f"it lacks the weight {name} of {model}")
        found = saved[name]
        if not fits(found, weight):
            if isinstance(found, Tensor) and found.shape == weight.shape and found.dtype == dtype:
                raise ValueError(f"its weight {name} is not finite: the training had diverged")
            raise ValueError(f"its weight {name} does not fit {model}")
    if unknown := [name for name in saved if name not in expected]:
        raise ValueError(f"it has a weight {unknown[0]!r}, unknown to {model}")
