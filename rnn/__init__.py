"""Recurrent networks whose recurrent matrix stays in on-chip memory across all time steps."""

from . import _start  # noqa: F401  # first: it heeds Ctrl-C while the next lines import torch
from .functional import recurrence
from .modules import RNN, explain
from .patterns import EncoderDecoder, ManyToMany, ManyToOne, OneToMany, OneToOne

__all__ = [
    "RNN",
    "EncoderDecoder",
    "ManyToMany",
    "ManyToOne",
    "OneToMany",
    "OneToOne",
    "explain",
    "recurrence",
]
__version__ = "0.1.0"
