"""Recurrent networks whose recurrent matrix stays in on-chip memory across all time steps."""

from .functional import recurrence
from .modules import GRU, LSTM, RNN, explain
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
    "explain",
    "recurrence",
]
__version__ = "0.1.0"
