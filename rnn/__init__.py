"""Recurrent networks whose recurrent matrix stays in on-chip memory across all time steps."""

from .functional import recurrence
from .modules import RNN, explain

__all__ = ["RNN", "explain", "recurrence"]
__version__ = "0.1.0"
