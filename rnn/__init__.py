"""Recurrent networks whose recurrent matrix stays in on-chip memory across all time steps."""

from pathlib import Path as _Path

# rnn/kernels is a link to ../kernels; a checkout without symbolic links has a text file instead.
_folder = _Path(__file__).parent
if not (_folder / "kernels").is_dir():
    if not (_folder.parent / "kernels").is_dir():
        raise ImportError(f"{_folder} needs the folder {_folder.parent / 'kernels'} beside it")
    __path__.append(str(_folder.parent))

from . import _start  # noqa: F401  # first: it heeds Ctrl-C while the next lines import torch
from .check import check_cell
from .convert import convert
from .derive import cell, source, straight_through
from .functional import recurrence
from .modules import GRU, LSTM, RNN, Recurrent, explain
from .patterns import EncoderDecoder, ManyToMany, ManyToOne, OneToMany, OneToOne

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "EncoderDecoder",
    "ManyToMany",
    "ManyToOne",
    "OneToMany",
    "OneToOne",
    "Recurrent",
    "cell",
    "check_cell",
    "convert",
    "explain",
    "recurrence",
    "source",
    "straight_through",
]
__version__ = "0.1.0"
