"""The files of a run: whole at every moment, in a folder that one run owns."""

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from .cli import JobError

if sys.platform != "win32":
    import fcntl

UNFINISHED = "unfinished-"  # begins the names of files that are being written


def make_folder(out: Path) -> None:
    """Make the folder and see that it can be written to: better now than after the training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise JobError(f"cannot write to {out}: {error}") from error


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder: JobError if another live run does. What a killed run left half-written there
    is removed. On Windows, and on file systems without locks, nothing is owned."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the lock is on the folder itself: it leaves no file
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise JobError(f"another run is using {folder}: give another --out") from error
        except OSError:  # this file system has no locks
            locked = False
        for path in folder.glob(f"{UNFINISHED}*.tmp") if locked else ():
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)  # which gives the lock back


def replace_file(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that at every moment path is whole: the old or the new one. The old one is
    kept under the name `keep`, if given. After an OSError nothing has changed."""
    # A name of its own: another process may be writing the same file.
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.rename(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """replace_file, or JobError."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise JobError(f"cannot write {path}: {error}") from error


def write_figure(path: Path, figure: Figure, dpi: float) -> None:
    """Write a picture as PNG, or JobError."""
    figure.savefig(image := BytesIO(), format="png", dpi=dpi)
    write_file(path, image.getvalue())
