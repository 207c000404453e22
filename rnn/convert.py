"""An existing model, with this library's modules in place of torch.nn's."""

from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .dispatch import BACKENDS, Backend
from .modules import GRU, LSTM, RNN, Recurrent
from .recurrent import RecurrentBase

PAIRS: tuple[tuple[type[nn.RNNBase], type[nn.RNNBase]], ...] = (
    (nn.RNN, RNN),
    (nn.GRU, GRU),
    (nn.LSTM, LSTM),
)
TO = ("rnn", "torch")


class Conversion(NamedTuple):
    """What became of one module of a model."""

    path: str  # in the model, as of named_modules(); "" is the model itself
    was: str  # the class
    now: str  # the class; the same if it was not converted
    why_not: str  # empty if it was converted

    def __str__(self) -> str:
        path = self.path or "the model itself"
        if self.why_not:
            return f"{path}: {self.was}, not converted: {self.why_not}"
        return f"{path}: {self.was} -> {self.now}"


class Conversions(tuple[Conversion, ...]):
    """One Conversion for each recurrent module. As text, one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no recurrent module"

    __repr__ = __str__


def convert(
    model: nn.Module, *, to: Literal["rnn", "torch"] = "rnn", backend: Backend = "auto"
) -> Conversions:
    """Make every torch.nn.RNN, GRU and LSTM in a model one of this library, or the other way.

    A module stays the object that it is and changes its class. So everything that is known of it
    stays: its parameters (an optimizer goes on with its state), hooks, parametrizations, pruning,
    training mode, the names in state_dict, every place where it is registered.

    Args:
        model: any module; it may be a torch.nn.RNN, GRU or LSTM itself.
        to: "rnn", or "torch" to go back.
        backend: of the modules that become this library's, as of rnn.RNN.

    Returns:
        a line for each recurrent module found: its path (the first, if it is registered in
        several places), what it was, what it is now, and why not if it was not converted. It is
        not if its class is a subclass, which may do something else, if it is compiled by
        torch.jit, if its forward was replaced, or if it is already what is asked for.

    Raises:
        TypeError if model is no torch.nn.Module; ValueError for another `to` or `backend`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(5, 7))
        >>> rnn.convert(model)
        0: torch.nn.LSTM -> rnn.LSTM
        >>> rnn.convert(model, to="torch")
        0: rnn.LSTM -> torch.nn.LSTM
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if to not in TO:
        raise ValueError(f"to must be one of {TO}, got {to!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    classes = dict(PAIRS) if to == "rnn" else {ours: theirs for theirs, ours in PAIRS}
    found = []
    for path, module in model.named_modules():
        if not _is_recurrent(module):
            continue
        was = _plain_class(module)
        why_not = _why_not(module, was, classes)
        if not why_not:
            _set_class(module, classes[was])
            if to == "rnn":
                module.backend = backend
            else:
                vars(module).pop("backend", None)
        now = _plain_class(module)
        found.append(Conversion(path, _name(module, was), _name(module, now), why_not))
    return Conversions(found)


def _is_recurrent(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in ("RNN", "GRU", "LSTM")
    return isinstance(module, nn.RNNBase)


def _plain_class(module: nn.Module) -> Any:
    """The class, without the one that parametrize puts before it for one module."""
    kind: Any = type(module)
    if is_parametrized(module) and kind.__name__ == f"Parametrized{kind.__base__.__name__}":
        return kind.__base__
    return kind


def _set_class(module: nn.Module, plain: Any) -> None:
    kind: Any = type(module)
    if kind is not _plain_class(module):  # its properties compute the parametrized tensors
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        plain = type(f"Parametrized{plain.__name__}", (plain,), own)
    module.__class__ = plain


def _why_not(module: nn.Module, was: Any, classes: dict[Any, Any]) -> str:
    """Why a recurrent module cannot be converted; empty if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled it; convert the model before"
    if was in classes.values() or (was is Recurrent and RNN in classes.values()):
        return "it is one already"
    if was is Recurrent:
        return "torch.nn has no module of any cell"
    if was not in classes:
        return "a subclass may do something else"
    if isinstance(module, RecurrentBase) and module.regularisers:
        return f"torch.nn has no {', '.join(module.regularisers)}"
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    return ""


def _name(module: nn.Module, kind: Any) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"torch.jit {module.original_name}"
    for theirs, ours in (*PAIRS, (None, Recurrent)):
        if kind in (theirs, ours):
            return f"{'rnn' if kind is ours else 'torch.nn'}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
