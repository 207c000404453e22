"""What a module and its calls must be given: the weights, and the checks of torch.nn in Python."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from . import layer_norm
from .autograd import autocast_enabled
from .cells import CELLS, Cell
from .functional import State, check_lengths, own_lengths


class Mode(NamedTuple):
    """What torch.nn calls a cell, and its own module for it."""

    cell: str
    twin: Callable[..., torch.nn.RNNBase]


MODES = {
    "RNN_TANH": Mode("rnn_tanh", torch.nn.RNN),
    "RNN_RELU": Mode("rnn_relu", partial(torch.nn.RNN, nonlinearity="relu")),
    "GRU": Mode("gru", torch.nn.GRU),
    "LSTM": Mode("lstm", torch.nn.LSTM),
}


def mode_of(cell: Cell) -> str:
    """The mode of a module: torch.nn's name of the cell or, where torch.nn has none, its own."""
    if cell.name in MODES:
        raise ValueError(f"{cell.name!r} is a mode of torch.nn, and no name for a cell of your own")
    return next((mode for mode, known in MODES.items() if known.cell == cell.name), cell.name)


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype that all layers compute in: the input's, unless autocast asks for another. It
    leaves float64 as it is."""
    if input.dtype != torch.float64 and autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _said(hx: Any) -> str:
    """hx in an error message."""
    if isinstance(hx, tuple | list):
        return f"{type(hx).__name__} of {', '.join(type(s).__name__ for s in hx) or 'nothing'}"
    return f"Tensor of {tuple(hx.shape)}" if isinstance(hx, Tensor) else type(hx).__name__


class Prepared(NamedTuple):
    """The arguments of forward, checked: a batch or packed rows, and states for all layers."""

    x: Tensor  # (T, B, I), (B, T, I) if batch_first, or packed (N, I)
    batch_first: bool
    state0: tuple[Tensor, ...] | None  # each (L * D, B, H), the rows in the order of x
    batch: int
    weights: list[Tensor]  # in the order of torch.nn's _flat_weights
    lengths: Tensor | None
    packed: PackedSequence | None
    unbatched: bool = False


def batch_of_packed(input: PackedSequence, hx: State | None) -> int:
    """How many sequences are packed, from shapes alone, as a graph needs it; 0 if they do not say.
    batch_sizes, which does, is data."""
    if input.sorted_indices is not None:
        return input.sorted_indices.size(0)
    state = hx[0] if isinstance(hx, tuple | list) and len(hx) > 0 else hx
    return state.size(1) if isinstance(state, Tensor) and state.dim() == 3 else 0


class Checked(torch.nn.RNNBase):
    """torch.nn.RNNBase for any cell, with all checks of a call in Python."""

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        if mode in MODES:
            super().__init__(mode, *args, **kwargs)
            return
        # torch.nn.RNNBase takes its own modes alone. It checks the arguments; its weights, of one
        # gate and without memory, make room for those of the cell.
        super().__init__("RNN_TANH", *args, **{**kwargs, "device": "meta"})
        self.mode = mode
        own = [name for name, _ in CELLS[mode].learned]
        names = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * self.bias, *own]
        ends = [f"_l{k}{d}" for k in range(self.num_layers) for d in ("", "_reverse")]
        self._all_weights = [[n + end for n in names] for end in ends[:: 3 - self.directions]]
        self._flat_weights_names = [name for each in self._all_weights for name in each]
        self._parameters.clear()
        for name, shape in zip(self._flat_weights_names, self._shapes(), strict=True):
            empty = torch.empty(shape, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
            self.register_parameter(name, torch.nn.Parameter(empty))
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as torch.nn does, and set the cell's own params as it says."""
        super().reset_parameters()
        own = CELLS[self.cell].learned
        for names in self._all_weights:
            for name, (_, initial) in zip(names[len(names) - len(own) :], own):
                weight = getattr(self, name)
                with torch.no_grad():
                    initial(weight) if callable(initial) else weight.fill_(initial)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.mode.endswith("_norm"):
            layer_norm.register()
        if self.cell not in CELLS:
            raise RuntimeError(
                f"this module's cell {self.cell!r} is not in rnn.cells.CELLS: import what defines "
                "it before the module is loaded"
            )

    @property
    def cell(self) -> str:
        """The name of the cell in rnn.cells.CELLS."""
        return MODES[self.mode].cell if self.mode in MODES else self.mode

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _init_flat_weights(self) -> None:
        """torch.nn's list beside the parameters, of which check_input alone reads a dtype here.
        A computed weight is there without its graph, so that the module can be copied."""
        with torch.no_grad():
            super()._init_flat_weights()

    def _prepare(
        self, input: Tensor | PackedSequence, hx: State | None, lengths: Tensor | None
    ) -> Prepared:
        """The checks of torch.nn, and in Python those that it leaves to its C++ part."""
        computed = is_parametrized(self) and not torch.compiler.is_compiling()
        if computed:
            # torch.nn looks at such a weight twice, by hasattr and getattr, and then once more so.
            # Each look computes it: looked at likewise, one seed draws the same masks.
            self._weights_have_changed()
        weights: list[Any] = [
            None if computed and not hasattr(self, name) else getattr(self, name)
            for name in self._flat_weights_names
        ]
        listed = self._flat_weights[0]
        if isinstance(listed, Tensor) and getattr(weights[0], "dtype", None) != listed.dtype:
            self._init_flat_weights()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("a PackedSequence has its own lengths; got lengths as well")
            x, sorted_indices = input.data, input.sorted_indices
            self.check_input(x, input.batch_sizes)
            if torch.compiler.is_compiling():
                batch = batch_of_packed(input, hx)
            else:
                batch = int(input.batch_sizes[0])
            self._check_weights(x, weights)
            state0 = self._check_states(x, hx, batch, 3)
            if state0 is not None and sorted_indices is not None:
                state0 = tuple(s.index_select(1, sorted_indices) for s in state0)
            return Prepared(x, False, state0, batch, weights, None, input)
        if input.dim() not in (2, 3):
            name = self.mode.split("_")[0] if self.mode in MODES else self.mode
            kind = f"{input.dim()}D"
            kind += " tensor" if name == "RNN" else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {kind} instead")
        x = input if input.dim() == 3 else input.unsqueeze(0 if self.batch_first else 1)
        self.check_input(x, None)
        T, batch = x.size(1 if self.batch_first else 0), x.size(0 if self.batch_first else 1)
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        self._check_weights(x, weights)
        state0 = self._check_states(x, hx, batch, input.dim())
        if lengths is not None:
            if input.dim() == 2:
                raise ValueError("lengths needs batched, 3-D input, got 2-D")
            check_lengths(lengths, T, batch)
            lengths = own_lengths(lengths, T, x.device)
        unbatched = input.dim() == 2
        return Prepared(x, self.batch_first, state0, batch, weights, lengths, None, unbatched)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Check an input and its states, as hx, as torch.nn's method of this name does. forward
        calls that of a subclass, after its own checks."""
        self.check_input(input, batch_sizes)
        layers, batch, width = self.get_expected_hidden_size(input, batch_sizes)
        states = CELLS[self.cell].states
        if states == 1:
            self.check_hidden_size(hidden, (layers, batch, width))
            return
        for k in range(states):
            size = layers, batch, self.hidden_size if k else width
            self.check_hidden_size(hidden[k], size, f"Expected hidden[{k}] size {{}}, got {{}}")

    def _zeros(self, x: Tensor, layers: int, batch: int) -> tuple[Tensor, ...]:
        """The states that a call without hx starts from."""
        h = x.new_zeros(layers, batch, self.proj_size or self.hidden_size)
        other = x.new_zeros(layers, batch, self.hidden_size) if self.proj_size else h
        return (h, *[other] * (CELLS[self.cell].states - 1))

    def _check_as_the_subclass_asks(self, p: Prepared) -> None:
        state0 = p.state0 or self._zeros(p.x, self.num_layers * self.directions, p.batch)
        batch_sizes = None if p.packed is None else p.packed.batch_sizes
        self.check_forward_args(p.x, state0 if len(state0) > 1 else state0[0], batch_sizes)

    def _check_states(
        self, x: Tensor, hx: State | None, batch: int, dim: int
    ) -> tuple[Tensor, ...] | None:
        """hx as a tuple of (L * D, B, H), checked against x."""
        if hx is None:
            return None
        states, given = CELLS[self.cell].states, cast(Any, hx)
        want = "a Tensor" if states == 1 else f"a tuple of {states} Tensors"
        want = f"hx of {self.mode} must be {'the pair (h0, c0)' if self.mode == 'LSTM' else want}"
        try:  # what torch.nn asks of hx, for its very exceptions
            state0 = (given,) if states == 1 else tuple(given[k] for k in range(states))
            dims = [s.dim() for s in state0]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise type(error)(f"{want}, got {_said(hx)}") from error
        if states > 1 and isinstance(hx, Tensor):
            raise TypeError(f"{want}, got {_said(hx)}")
        if states > 1 and len(hx) != states:
            raise RuntimeError(f"hx must be {states} tensors, got {len(hx)}")
        if any(d != dim for d in dims):
            kind = "batched" if dim == 3 else "unbatched"
            found = ", ".join(f"{d}-D" for d in dims)
            found = f"{found} tensor" if states == 1 else f"({found}) tensors"
            names = "hx and cx" if self.mode == "LSTM" else "hx"
            raise RuntimeError(
                f"For {kind} {dim}-D input, {names} should also be {dim}-D but got {found}"
            )
        layers = self.num_layers * self.directions
        for k, s in enumerate(state0):
            s = s if dim == 3 else s.unsqueeze(1)
            width = self.proj_size if k == 0 and self.proj_size else self.hidden_size
            name = "hidden" if states == 1 else f"hidden[{k}]"
            self.check_hidden_size(
                s, (layers, batch, width), f"Expected {name} size {{}}, got {{}}"
            )
            if s.device != x.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, found input tensor at "
                    f"{x.device} and hidden tensor at {s.device}"
                )
            if s.dtype != x.dtype and not autocast_enabled(x.device.type):
                raise RuntimeError(f"hx must be {x.dtype} as input is, got {s.dtype}")
        return state0 if dim == 3 else tuple(s.unsqueeze(1) for s in state0)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of all weights, in the order of torch.nn's _flat_weights."""
        cell, width = CELLS[self.cell], self.proj_size or self.hidden_size
        rows = cell.gates * self.hidden_size
        rest: list[tuple[int, ...]] = [(rows, width)] + [(rows,)] * (2 * self.bias)
        rest += [(width, self.hidden_size)] * bool(self.proj_size)
        rest += [(self.hidden_size,)] * len(cell.learned)
        first, deeper = (rows, self.input_size), (rows, self.directions * width)
        shapes = [first, *rest] * self.directions
        return shapes + [deeper, *rest] * (self.directions * (self.num_layers - 1))

    def _check_weights(self, x: Tensor, weights: list[Any]) -> None:
        """Shape, dtype and device of every weight; nothing after this looks at them again."""
        if torch._C._get_tracing_state() is not None:  # sizes are being recorded
            return
        mixed = autocast_enabled(x.device.type)
        for name, weight, shape in zip(self._flat_weights_names, weights, self._shapes()):
            if not isinstance(weight, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
            if tuple(weight.shape) != shape:
                raise RuntimeError(f"{name} must be {shape}, got {tuple(weight.shape)}")
            if weight.device != x.device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor "
                    f"at {x.device} and parameter tensor {name} at {weight.device}"
                )
            if weight.dtype != x.dtype and not mixed:
                raise RuntimeError(f"{name} must be {x.dtype} as input is, got {weight.dtype}")
