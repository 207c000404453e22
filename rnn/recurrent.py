"""What RNN, GRU and LSTM share: layers, directions, dropout, packed sequences, checks."""

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .autograd import autocast_enabled, needs_plain_operations, run
from .cells import CELLS
from .dispatch import BACKENDS
from .functional import State, check_lengths, own_lengths
from .kernels.limits import NoPlan
from .layer import Spec
from .rows import Rows
from .torch_path import can_pack


class Mode(NamedTuple):
    """What torch.nn calls a cell, its own operator for it, and its own module."""

    cell: str
    operator: Callable[..., Any]
    twin: Callable[..., torch.nn.RNNBase]


MODES = {
    "RNN_TANH": Mode("rnn_tanh", torch._VF.rnn_tanh, torch.nn.RNN),
    "RNN_RELU": Mode(
        "rnn_relu",
        torch._VF.rnn_relu,
        partial(torch.nn.RNN, nonlinearity="relu"),
    ),
    "GRU": Mode("gru", torch._VF.gru, torch.nn.GRU),
    "LSTM": Mode("lstm", torch._VF.lstm, torch.nn.LSTM),
}


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype that all layers compute in: the input's, unless autocast asks for another. It
    leaves float64 as it is."""
    if input.dtype != torch.float64 and autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def skipped_by_compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile leaves the call alone, as it leaves torch.nn's modules: traced, the loop over
    time would be compiled anew for each length. torch._dynamo, which takes a second to import, is
    asked only where something else has imported it."""
    uncompiled = torch._disable_dynamo(forward)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = uncompiled if "torch._dynamo" in sys.modules else forward
        return run(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


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
    lengths: Tensor | None
    packed: PackedSequence | None
    unbatched: bool = False


class Recurrent(torch.nn.RNNBase):
    """The base of rnn.RNN, rnn.GRU and rnn.LSTM, as torch.nn.RNNBase is of torch.nn's."""

    backend = "auto"  # of instances that were pickled as torch.nn's

    def __init__(self, mode: str, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        super().__init__(mode, *args, **kwargs)
        self.backend = backend

    @property
    def cell(self) -> str:
        """The name of the cell in rnn.cells.CELLS."""
        return MODES[self.mode].cell

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _weights(self) -> list[Tensor]:
        return cast(list[Tensor], self._flat_weights)

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each weight where it lies."""

    def extra_repr(self) -> str:
        return super().extra_repr() + f", backend={self.backend}"

    def __prepare_scriptable__(self) -> torch.nn.RNNBase:
        """torch.jit.script compiles torch.nn's module in place of this one, on the same weights."""
        twin = MODES[self.mode].twin(
            self.input_size,
            self.hidden_size,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device="meta",
            **({"proj_size": self.proj_size} if self.proj_size else {}),
        )
        for name in self._flat_weights_names:
            setattr(twin, name, getattr(self, name))
        return twin.train(self.training)

    @skipped_by_compile
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run all layers.

        Args:
            input: (T, B, I), (B, T, I) if batch_first, (T, I) without a batch, or packed.
            hx: (L*D, B, H), or (L*D, H) without a batch; of an LSTM the pair (h0, c0) of such;
                zeros if None.
            lengths: (B,), int32 or int64, any device, in any order, zeros included: row b ends
                after lengths[b] steps. Its output is zero from there on, its h_n the state after
                its last step (hx if it has none), and the reverse direction starts at its end.
                What the input holds past the end is never read.

        Returns:
            output (T, B, D*H), laid out as input is, and h_n, shaped as hx is.

        Raises:
            what torch.nn raises for the same misuse: ValueError for a wrong dtype or a wrong
            number of dimensions, RuntimeError for a wrong shape or device or an empty sequence;
            for lengths, see rnn.recurrence.
        """
        if isinstance(input, torch.fx.Proxy):  # a leaf of the traced graph, as torch.nn's modules
            path = input.tracer.path_of_module(self)
            given = {"hx": hx, "lengths": lengths}
            return input.tracer.create_proxy(
                "call_module", path, (input,), {k: v for k, v in given.items() if v is not None}
            )
        p = self._prepare(input, hx, lengths)
        in_pytorch = self.why_pytorchs_operator(p)
        output: Any
        output, state_n = self._by_operator(p) if in_pytorch else self._by_layers(p)
        traced = torch._C._get_tracing_state() is not None  # the same graph with and without grad
        if in_pytorch and self.mode == "LSTM" and output.requires_grad and not traced:
            # oneDNN keeps its output for the backward pass: the caller may change this one.
            output = output.clone()
        if p.packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = p.packed
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                state_n = tuple(s.index_select(1, unsorted_indices) for s in state_n)
        elif p.unbatched:
            output = output.squeeze(0 if p.batch_first else 1)
            state_n = tuple(s.squeeze(1) for s in state_n)
        return output, state_n if len(state_n) > 1 else state_n[0]

    def _prepare(
        self, input: Tensor | PackedSequence, hx: State | None, lengths: Tensor | None
    ) -> Prepared:
        """The checks of torch.nn, and in Python those that it leaves to its C++ part."""
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("a PackedSequence has its own lengths; got lengths as well")
            x, sorted_indices = input.data, input.sorted_indices
            self.check_input(x, input.batch_sizes)
            batch = int(input.batch_sizes[0])
            state0 = self._check_states(x, hx, batch, 3)
            if state0 is not None and sorted_indices is not None:
                state0 = tuple(s.index_select(1, sorted_indices) for s in state0)
            return Prepared(x, False, state0, batch, None, input)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        x = input if input.dim() == 3 else input.unsqueeze(0 if self.batch_first else 1)
        self.check_input(x, None)
        T, batch = x.size(1 if self.batch_first else 0), x.size(0 if self.batch_first else 1)
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        state0 = self._check_states(x, hx, batch, input.dim())
        if lengths is not None:
            if input.dim() == 2:
                raise ValueError("lengths needs batched, 3-D input, got 2-D")
            check_lengths(lengths, T, batch)
            lengths = own_lengths(lengths, T, x.device)
        return Prepared(x, self.batch_first, state0, batch, lengths, None, input.dim() == 2)

    def _check_states(
        self, x: Tensor, hx: State | None, batch: int, dim: int
    ) -> tuple[Tensor, ...] | None:
        """hx as a tuple of (L * D, B, H), checked against x; and the weights against both."""
        self._check_weights(x)
        if hx is None:
            return None
        cell, given = CELLS[self.cell], cast(Any, hx)
        try:  # what torch.nn asks of hx, for its very exceptions
            state0: tuple[Tensor, ...] = (given,) if cell.states == 1 else (given[0], given[1])
            dims = [s.dim() for s in state0]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            want = "a Tensor" if cell.states == 1 else "the pair (h0, c0)"
            raise type(error)(f"hx of {self.mode} must be {want}, got {_said(hx)}") from error
        if cell.states > 1 and isinstance(hx, Tensor):
            raise TypeError(f"hx of {self.mode} must be the pair (h0, c0), got {_said(hx)}")
        if cell.states > 1 and len(hx) != cell.states:
            raise RuntimeError(f"hx must be {cell.states} tensors, got {len(hx)}")
        if any(d != dim for d in dims):
            kind = "batched" if dim == 3 else "unbatched"
            found = (
                f"{dims[0]}-D tensor" if len(dims) == 1 else f"({dims[0]}-D, {dims[1]}-D) tensors"
            )
            raise RuntimeError(
                f"For {kind} {dim}-D input, {' and '.join(('hx', 'cx')[: len(dims)])} should also "
                f"be {dim}-D but got {found}"
            )
        layers = self.num_layers * self.directions
        for k, s in enumerate(state0):
            s = s if dim == 3 else s.unsqueeze(1)
            width = self.proj_size if k == 0 and self.proj_size else self.hidden_size
            name = "hidden" if cell.states == 1 else f"hidden[{k}]"
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

    def _check_weights(self, x: Tensor) -> None:
        """Shape, dtype and device of every weight; nothing after this looks at them again."""
        if torch._C._get_tracing_state() is not None:  # sizes are being recorded
            return
        rows, width = CELLS[self.cell].gates * self.hidden_size, self.proj_size or self.hidden_size
        rest = [(rows, width)] + [(rows,)] * (2 * self.bias)
        rest += [(width, self.hidden_size)] * bool(self.proj_size)
        shapes = [(rows, self.input_size), *rest] * self.directions
        shapes += [(rows, self.directions * width), *rest] * (
            self.directions * (self.num_layers - 1)
        )
        mixed = autocast_enabled(x.device.type)
        for name, weight, shape in zip(self._flat_weights_names, self._weights, shapes):
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

    def why_pytorchs_operator(self, p: Prepared) -> str:
        """Why torch.nn's own operator runs the whole call; empty where rnn's layers do."""
        why = ""
        if self.proj_size:
            why = "proj_size: no layer of ours has a projection"
        elif p.lengths is None and torch.compiler.is_exporting():
            why = "torch.export takes the operator that other programs know"
        elif p.lengths is None and torch._C._get_tracing_state() is not None:
            why = "torch.jit.trace and ONNX know this operator"
        elif p.lengths is None and torch.overrides.has_torch_function(tuple(self._weights)):
            why = "the weights are of a class with operators of its own (per-sample gradients)"
        elif self.backend == "auto" and p.lengths is None and p.packed is None:
            why = self._why_operator_is_faster(p)
        if why and self.backend == "triton":
            raise RuntimeError(f'backend="triton" cannot run here: {why}')
        return why

    def _why_operator_is_faster(self, p: Prepared) -> str:
        """Where PyTorch's own operator was measured faster on a CPU, in float32.

        On 2 cores of an Intel Xeon, with PyTorch 2.13; medians of calls in turns, as
        `python -m bench` takes them.
        """
        x = p.x
        if x.device.type != "cpu" or x.dtype != torch.float32 or compute_dtype(x) != x.dtype:
            return ""
        differentiated = (x, *(p.state0 or ()), *self._weights)
        if needs_plain_operations(self.cell, NoPlan(""), differentiated):
            return ""
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
        if self.mode == "LSTM" and torch.backends.mkldnn.is_available():
            # oneDNN runs all steps in one call: 1.1 (H = 1024) to 2.2 times as fast as ours.
            return "oneDNN's LSTM is faster on a CPU"
        if not trained and not can_pack(self._weights[1], p.batch):
            # 1.1 to 3 times, the most where there is little work
            return "faster on a CPU where no gradient is wanted"
        if trained and x.size(1 if p.batch_first else 0) < 16:  # 1.1 to 2.5 times
            return "faster on a CPU in training on fewer than 16 steps"
        return ""

    def _by_layers(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer by layer on this library's backends."""
        cell, D, H = CELLS[self.cell], self.directions, self.hidden_size
        x, dtype = p.x, compute_dtype(p.x)
        x = x.to(dtype)
        sizes = None if p.packed is None else tuple(p.packed.batch_sizes.tolist())
        spec = Spec(cell.name, D, False, p.batch_first, sizes, True, self.bias)
        last = []
        for layer in range(self.num_layers):
            if p.state0 is None:
                state0: tuple[Tensor, ...] = (x.new_zeros(D, p.batch, H),) * cell.states
            else:
                of_layer = slice(layer * D, (layer + 1) * D)
                state0 = tuple(s[of_layer].to(dtype) for s in p.state0)
            weights = self._layer_weights(layer, dtype)
            x, state_n = run(spec, self.backend, x, p.lengths, (*state0, *weights))
            last.append(state_n)
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if len(last) == 1:
            return x, last[0]
        return x, tuple(torch.cat(states) for states in zip(*last))

    def _layer_weights(self, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """The weights of a layer, direction by direction, in the dtype of the computation."""
        each = len(self._weights) // self.num_layers
        weights = self._weights[layer * each : (layer + 1) * each]
        return [w if w.dtype == dtype else w.to(dtype) for w in weights]

    def _by_operator(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers by PyTorch's own operator."""
        x, batch_first, batch = p.x, p.batch_first, p.batch
        batch_sizes = None if p.packed is None else p.packed.batch_sizes
        layers, states = self.num_layers * self.directions, CELLS[self.cell].states
        widths = [self.proj_size or self.hidden_size, self.hidden_size][:states]
        state0 = p.state0 or tuple(x.new_zeros(layers, batch, width) for width in widths)
        rows = None
        if p.lengths is not None:
            steps = x.transpose(0, 1) if batch_first else x
            rows = Rows.of_lengths(p.lengths, steps.size(0))
            n = rows.sizes[0] if rows.sizes else 0
            if n == 0:
                return x.new_zeros(*x.shape[:2], self.directions * widths[0]), state0
            x, batch_sizes = rows.gather(steps), torch.tensor(rows.sizes, device="cpu")
            assert rows.order is not None
            longest = rows.order[:n]
            state0, whole = tuple(s[:, longest] for s in state0), state0
        given = state0[0] if states == 1 else state0
        options = (self._flat_weights, self.bias, self.num_layers, self.dropout, self.training)
        operator = MODES[self.mode].operator
        if batch_sizes is None:
            output, *state_n = operator(x, given, *options, self.bidirectional, batch_first)
        else:
            output, *state_n = operator(x, batch_sizes, given, *options, self.bidirectional)
        if rows is not None:
            padded = output.new_zeros(*steps.shape[:2], output.size(1))
            output = rows.scatter_(output, padded)
            output = output.transpose(0, 1) if batch_first else output
            state_n = [s.index_copy(1, longest, e) for s, e in zip(whole, state_n)]
        return output, tuple(state_n)
