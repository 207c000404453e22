"""What RNN, GRU and LSTM share: layers, directions, dropout, packed and cut sequences."""

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cells import CELLS
from .checked import MODES, Checked, Prepared, batch_of_packed, compute_dtype
from .checkpointing import check_checkpoint_every, run_in_pieces
from .dispatch import BACKENDS, Backend
from .functional import State
from .kernels.limits import NoPlan
from .layer import Spec
from .nested import Nested
from .operators import Stack, run_stack, why_faster
from .padding import pays, run_padded_lstm
from .run import can_be_op, needs_plain_operations, run, values_are_hidden
from .segments import Segments, check_resets

S = TypeVar("S")  # the type of a module's state: Tensor, or of an LSTM the pair


def exported_with_fixed_steps(p: Prepared) -> bool:
    """Whether torch.export is tracing a call whose number of steps is no symbol."""
    if not torch.compiler.is_exporting():
        return False
    # It imports sympy, so it is asked where torch.export has done so.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return p.packed is None and has_static_value(p.x.size(1 if p.batch_first else 0))


def have_own_operators(tensors: tuple[Any, ...]) -> bool:
    """Whether the class of one says by itself what torch's functions do with it."""
    if not torch.overrides.has_torch_function(tensors):
        return False
    if torch.compiler.is_compiling():  # under a mode of the tracer's, everything has
        return False
    common: Any = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    owns: list[Any] = [type(t).__torch_function__ for t in tensors]
    return any(getattr(own, "__func__", own) not in (common[0].__func__, common[1]) for own in owns)


class Recurrent(Checked, Generic[S]):
    """The base of rnn.RNN, rnn.GRU and rnn.LSTM, as torch.nn.RNNBase is of torch.nn's."""

    backend: Backend = "auto"  # of instances that were pickled as torch.nn's
    checkpoint_every: int | None = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: Backend = "auto",
        checkpoint_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        super().__init__(mode, *args, **kwargs)
        self.backend = backend
        self.checkpoint_every = check_checkpoint_every(checkpoint_every, self.proj_size)

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each weight where it lies."""

    def extra_repr(self) -> str:
        every = self.checkpoint_every
        more = "" if every is None else f", checkpoint_every={every}"
        return super().extra_repr() + f", backend={self.backend}" + more

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
        in_graph = batch_of_packed(input, hx) and can_be_op(self.cell)
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
        if type(self).check_forward_args is not Recurrent.check_forward_args:
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

    def why_pytorchs_operator(self, p: Prepared) -> str:
        """Why torch.nn's own operator runs the whole call; empty where rnn's layers do."""
        why = ""
        if self.proj_size:
            why = "proj_size: no layer of ours has a projection"
        elif p.lengths is None and exported_with_fixed_steps(p):
            why = "torch.export takes the operator that other programs know"
        elif p.lengths is None and torch._C._get_tracing_state() is not None:
            why = "torch.jit.trace and ONNX know this operator"
        elif p.lengths is None and have_own_operators((p.x, *(p.state0 or ()), *p.weights)):
            why = "a tensor is of a class with operators of its own (per-sample gradients)"
        elif self.backend == "auto" and p.lengths is None:
            why = self._why_operator_is_faster(p)
        if why and self.backend == "triton":
            raise RuntimeError(f'backend="triton" cannot run here: {why}')
        return why

    def _projects_in_a_graph(self, p: Prepared) -> bool:
        """A graph gets our op, which runs PyTorch's operator: traced, that unrolls its steps."""
        return (
            self.proj_size > 0
            and torch.compiler.is_compiling()
            and not exported_with_fixed_steps(p)
        )

    def _why_operator_is_faster(self, p: Prepared) -> str:
        """In a graph that is compiled each layer decides, when it runs and its steps are known."""
        x = p.x
        if torch.compiler.is_compiling() or compute_dtype(x) != x.dtype:
            return ""
        if self.checkpoint_every is not None and torch.is_grad_enabled():
            return ""
        differentiated = (x, *(p.state0 or ()), *p.weights)
        if needs_plain_operations(self.cell, NoPlan(""), differentiated):
            return ""
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
        if p.packed is None:
            T = x.size(1 if p.batch_first else 0)
        elif self.mode == "LSTM":
            sizes = p.packed.batch_sizes.tolist()
            if self.bidirectional and p.state0 is not None:  # past the padding lies hx
                return ""
            if not pays(sizes, self.hidden_size, trained):
                return ""
            T = len(sizes)
        elif trained:  # 1.1 to 3 times slower on packed rows than on padded ones
            return ""
        else:
            T = len(p.packed.batch_sizes)
        return why_faster(self.cell, p.weights[1], T, p.batch, trained)

    def _by_layers(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer by layer on this library's backends."""
        cell, D = CELLS[self.cell], self.directions
        x, dtype = p.x, compute_dtype(p.x)
        x = x if x.dtype == dtype else x.to(dtype)
        batch_sizes = None if p.packed is None else p.packed.batch_sizes
        sizes = None
        if batch_sizes is not None and not torch.compiler.is_compiling():
            sizes = tuple(batch_sizes.tolist())
        projected = self.proj_size > 0
        spec = Spec(cell.name, D, False, p.batch_first, sizes, True, self.bias, projected=projected)
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
            tensors = (*state0, *weights)
            x, state_n = run_layer(spec, self.backend, x, p.lengths, tensors, batch_sizes)
            last.append(state_n)
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if len(last) == 1:
            return x, last[0]
        return x, tuple(torch.cat(states) for states in zip(*last))

    def _zeros(self, x: Tensor, layers: int, batch: int) -> tuple[Tensor, ...]:
        """The states that a call without hx starts from."""
        h = x.new_zeros(layers, batch, self.proj_size or self.hidden_size)
        if CELLS[self.cell].states == 1:
            return (h,)
        return h, x.new_zeros(layers, batch, self.hidden_size) if self.proj_size else h

    def _layer_weights(self, p: Prepared, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """The weights of a layer, direction by direction, in the dtype of the computation."""
        each = len(p.weights) // self.num_layers
        weights = p.weights[layer * each : (layer + 1) * each]
        return [w if w.dtype == dtype else w.to(dtype) for w in weights]

    def _by_operator(self, p: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers by PyTorch's own operator."""
        state0 = p.state0 or self._zeros(p.x, self.num_layers * self.directions, p.batch)
        stack = Stack(
            self.cell,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            p.batch_first,
        )
        batch_sizes = None if p.packed is None else p.packed.batch_sizes
        if batch_sizes is not None and self.mode == "LSTM" and not self.proj_size:
            if self.backend == "auto" and self._why_operator_is_faster(p):
                sizes = batch_sizes.tolist()
                return run_padded_lstm(stack, p.x, sizes, state0, p.weights)
        return run_stack(stack, p.x, batch_sizes, p.lengths, state0, p.weights)


@torch._disable_dynamo
def _packed_rows_run_outside_of_graphs(
    module: Recurrent, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None
) -> tuple[Any, Any]:
    """Of sequences whose number is data, packed or cut by resets: a graph cannot make states."""
    return module.forward(input, hx, lengths=lengths, resets=resets)
