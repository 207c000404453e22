"""What RNN, GRU and LSTM share: layers, directions, dropout, packed and cut sequences."""

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .by_operator import ByOperator
from .cells import CELLS
from .checked import Prepared, batch_of_packed, compute_dtype
from .checkpointing import check_checkpoint_every, run_in_pieces
from .dispatch import BACKENDS, Backend
from .functional import State
from .layer import Spec
from .nested import Nested
from .regularisers import (
    check_grad_clip,
    check_probability,
    check_zoneout,
    draw_h_mask,
    draw_keep,
    of_each_state,
)
from .run import run, transformed, values_are_hidden
from .segments import Segments, check_resets

S = TypeVar("S")  # the type of a module's state: Tensor, or of an LSTM the pair


class RecurrentBase(ByOperator, Generic[S]):
    """The base of rnn.RNN, rnn.GRU and rnn.LSTM, as torch.nn.RNNBase is of torch.nn's."""

    backend: Backend = "auto"  # of instances that were pickled as torch.nn's
    checkpoint_every: int | None = None
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    recurrent_grad_clip: float | None = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: Backend = "auto",
        checkpoint_every: int | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        recurrent_grad_clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        super().__init__(mode, *args, **kwargs)
        self.backend = backend
        self.checkpoint_every = check_checkpoint_every(checkpoint_every, self.proj_size)
        self.recurrent_dropout = check_probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = check_zoneout(zoneout, CELLS[self.cell].states)
        self.recurrent_grad_clip = check_grad_clip(recurrent_grad_clip)
        if self.proj_size and self.regularisers:
            names = ", ".join(self.regularisers)
            raise ValueError(f"{names} needs proj_size=0, got proj_size={self.proj_size}")

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each weight where it lies."""

    def extra_repr(self) -> str:
        every = self.checkpoint_every
        said = (
            self.regularisers if every is None else self.regularisers | {"checkpoint_every": every}
        )
        more = "".join(f", {name}={value}" for name, value in said.items())
        return super().extra_repr() + f", backend={self.backend}" + more

    @overload
    def forward(
        self,
        input: Tensor,
        hx: S | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, S]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: S | None = None, *, lengths: None = None
    ) -> tuple[PackedSequence, S]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run all layers.

        Args:
            input: (T, B, I), (B, T, I) if batch_first, (T, I) without a batch, or packed. With
                batch_first also a nested tensor (B, j, I) of layout torch.jagged; its output has
                the same offsets.
            hx: (L*D, B, H), or (L*D, H) without a batch; of an LSTM the pair (h0, c0) of such;
                zeros if None.
            lengths: (B,), int32 or int64, any device, in any order, zeros included: row b ends
                after lengths[b] steps. Its output is zero from there on, its h_n the state after
                its last step (hx if it has none), and the reverse direction starts at its end.
                What the input holds past the end is never read.
            resets: (T, B) bool, any device, laid out as input is, (T,) without a batch: where it
                is set, a new segment begins (a document, an episode) that nothing reaches from
                the steps before: the state is zero before that step, and no gradient crosses.
                The reverse direction, too, begins anew in each segment; it reaches hx at the end
                of the last one, and its h_n is the state after the first. Segments run side by
                side, so a call takes as many steps as the longest of them.

        Returns:
            output (T, B, D*H), laid out as input is, and h_n, shaped as hx is.

        Raises:
            what torch.nn raises for the same misuse: ValueError for a wrong dtype or a wrong
            number of dimensions, RuntimeError for a wrong shape or device or an empty sequence;
            for lengths and resets, see rnn.recurrence.
        """
        if isinstance(input, torch.fx.Proxy):  # a leaf of the traced graph, as torch.nn's modules
            path = input.tracer.path_of_module(self)
            given = {"hx": hx, "lengths": lengths, "resets": resets}
            return input.tracer.create_proxy(
                "call_module", path, (input,), {k: v for k, v in given.items() if v is not None}
            )
        if torch.compiler.is_compiling() and self._needs_values(input, hx, resets):
            return _packed_rows_run_outside_of_graphs(self, input, hx, lengths, resets)
        if isinstance(input, Tensor) and input.is_nested:
            if lengths is not None or resets is not None:
                raise ValueError("a nested tensor has its own lengths; got lengths or resets too")
            nested = Nested.of(input, self.batch_first)
            output, state = self._forward(nested.pad(), hx, nested.lengths)
            return nested.unpad(output), state
        return self._forward(input, hx, lengths, resets)

    def _needs_values(self, input: Any, hx: Any, resets: Tensor | None) -> bool:
        """Whether a graph cannot hold the call, since numbers of rows are data."""
        if resets is not None:
            return True
        if not isinstance(input, PackedSequence):
            return input.is_nested
        in_graph = batch_of_packed(input, hx) and not transformed()
        return not in_graph or self.checkpoint_every is not None

    def step(self, x_t: Tensor, state: S | None = None) -> tuple[Tensor, S]:
        """Run one step of time, for streams and generation.

        Args:
            x_t: (B, I), or (I,) without a batch.
            state: as hx of forward, and as this returns it; zeros if None.

        Returns:
            output_t, (B, H) or (H,), and the state after the step. Step after step they are what
            forward gives for the whole sequence: to rounding, and in float64 on the PyTorch path
            to the last bit. In training mode dropout draws a mask for each step, as forward does,
            though not the same numbers.

        The host never waits for the device, so a CUDA graph can capture it.

        Raises:
            ValueError: the module is bidirectional, or x_t has a wrong number of dimensions; and
            what forward raises.

        Example:
            >>> model, state = rnn.GRU(5, 7), None
            >>> for x_t in torch.randn(6, 3, 5):
            ...     output_t, state = model.step(x_t, state)
        """
        if self.bidirectional:
            raise ValueError(
                "step needs a module of one direction: the reverse one of a bidirectional module "
                "begins at the end of the sequence"
            )
        if x_t.dim() not in (1, 2):
            raise ValueError(f"x_t must be (B, I) or (I,), got {tuple(x_t.shape)}")
        time = int(self.batch_first and x_t.dim() == 2)
        output, after = self(x_t.unsqueeze(time), state)
        return output.squeeze(time), after

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        lengths: Tensor | None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        p = self._prepare(input, hx, lengths)
        if type(self).check_forward_args is not RecurrentBase.check_forward_args:
            self._check_as_the_subclass_asks(p)
        output: Any
        output, state_n = self._run(p) if resets is None else self._in_segments(p, resets)
        if p.packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = p.packed
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                state_n = tuple(s.index_select(1, unsorted_indices) for s in state_n)
        elif p.unbatched:
            output = output.squeeze(0 if p.batch_first else 1)
            state_n = tuple(s.squeeze(1) for s in state_n)
        return output, state_n if len(state_n) > 1 else state_n[0]

    def _run(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers of what was prepared."""
        batch = self._as_batch(p)
        if batch is not p:
            output, state_n = self._run(batch)
            return output.flatten(0, 1), state_n
        in_pytorch = bool(self.why_pytorchs_operator(p)) and not self._projects_in_a_graph(p)
        output, state_n = self._by_operator(p) if in_pytorch else self._by_layers(p)
        traced = torch._C._get_tracing_state() is not None  # the same graph with and without grad
        if in_pytorch and self.mode == "LSTM" and output.requires_grad and not traced:
            # oneDNN keeps its output for the backward pass: the caller may change this one.
            output = output.clone()
        return output, state_n

    @staticmethod
    def _as_batch(p: Prepared) -> Prepared:
        """Packed sequences that are equally long as the batch (T, B, I) that they are."""
        if p.packed is None or values_are_hidden((p.packed.batch_sizes,)):
            return p
        if int(p.packed.batch_sizes[-1]) < p.batch:
            return p
        x = p.x.reshape(len(p.packed.batch_sizes), p.batch, p.x.size(1))
        return p._replace(x=x, packed=None)

    def _cut(self, p: Prepared, resets: Tensor) -> tuple[Segments, Prepared]:
        """The segments of the batch, and these as packed rows; p if there are none."""
        if p.packed is not None:
            raise ValueError("resets need padded input, got a PackedSequence as well")
        shape = tuple(p.x.shape[:2])
        check_resets(resets, (shape[p.batch_first],) if p.unbatched else shape)
        x, resets = p.x, resets.to(p.x.device).view(shape)
        if p.batch_first:
            x, resets = x.transpose(0, 1), resets.transpose(0, 1)
        segments = Segments.of(resets, p.lengths)
        if segments.total == 0:
            return segments, p
        rows, sizes = segments.gather(x), torch.tensor(segments.sizes, device="cpu")
        state0 = p.state0 and tuple(segments.enter(s, self._backwards()) for s in p.state0)
        return segments, p._replace(
            x=rows,
            batch_first=False,
            state0=state0,
            batch=segments.total,
            lengths=None,
            packed=PackedSequence(rows, sizes),
            unbatched=False,
        )

    def _backwards(self) -> list[bool]:
        """Whether the direction of each of the states (L * D, B, H) is the reverse one."""
        return [False, True][: self.directions] * self.num_layers

    def _in_segments(self, p: Prepared, resets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `_run`, of the segments of the batch side by side."""
        segments, cut = self._cut(p, resets)
        output, state_n = self._run(cut)
        if segments.total == 0:
            return output, state_n
        output = segments.scatter(output)
        before = p.state0 or (None,) * len(state_n)
        last = (segments.leave(s, b, self._backwards()) for s, b in zip(state_n, before))
        return output.transpose(0, 1) if p.batch_first else output, tuple(last)

    if TYPE_CHECKING:  # of torch.nn.Module it is Any

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: S | None = None,
            *,
            lengths: Tensor | None = None,
            resets: Tensor | None = None,
        ) -> tuple[Tensor, S]: ...

        @overload
        def __call__(
            self, input: PackedSequence, hx: S | None = None, *, lengths: None = None
        ) -> tuple[PackedSequence, S]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _by_layers(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer by layer on this library's backends."""
        D = self.directions
        x, dtype = p.x, compute_dtype(p.x)
        x = x if x.dtype == dtype else x.to(dtype)
        batch_sizes = None if p.packed is None else p.packed.batch_sizes
        sizes = None
        if batch_sizes is not None and not torch.compiler.is_compiling():
            sizes = tuple(batch_sizes.tolist())
        spec = self._spec(p, sizes)
        run_layer, last = run, []
        if self.checkpoint_every is not None and torch.is_grad_enabled():
            run_layer = partial(run_in_pieces, self.checkpoint_every)
        for layer in range(self.num_layers):
            if p.state0 is None:
                state0 = self._zeros(x, D, p.batch)
            else:
                of_layer = slice(layer * D, (layer + 1) * D)
                state0 = tuple(s[of_layer].to(dtype) for s in p.state0)
            weights = self._layer_weights(p, layer, dtype)
            tensors = (*state0, *self._masks(spec, x, p.batch), *weights)
            x, state_n = run_layer(spec, self.backend, x, p.lengths, tensors, batch_sizes)
            last.append(state_n)
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if len(last) == 1:
            return x, last[0]
        return x, tuple(torch.cat(states) for states in zip(*last))

    def _masks(self, spec: Spec, x: Tensor, batch: int) -> list[Tensor]:
        """Those of a layer whose input is x, by torch's generator on its device."""
        masks, D, H = [], self.directions, self.hidden_size
        if spec.h_mask:
            masks.append(draw_h_mask(self.recurrent_dropout, x, D, batch, H))
        if spec.zoneout:
            zoneout = of_each_state(self.zoneout, CELLS[self.cell].states)
            masks.append(draw_keep(zoneout, x, D, H, self.training))
        return masks

    def _layer_weights(self, p: Prepared, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """The weights of a layer, direction by direction, in the dtype of the computation."""
        each = len(p.weights) // self.num_layers
        weights = p.weights[layer * each : (layer + 1) * each]
        return [w if w.dtype == dtype else w.to(dtype) for w in weights]


@torch._disable_dynamo
def _packed_rows_run_outside_of_graphs(
    module: RecurrentBase, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Any, Any]:
    """Of sequences whose number is data, packed or cut by resets: a graph cannot make states."""
    return module.forward(input, hx, lengths=lengths, resets=resets)
