"""Where PyTorch's own operator runs a whole call in place of rnn's layers."""

from typing import Any

import torch
from torch import Tensor

from .cells import CELLS
from .checked import MODES, Checked, Prepared, compute_dtype
from .dispatch import Backend
from .layer import Spec
from .operators import OPERATORS, Stack, run_stack, why_faster
from .padding import pays, run_padded_lstm
from .regularisers import of_each_state
from .run import needs_plain_operations


def exported_with_fixed_steps(p: Prepared) -> bool:
    """Whether torch.export is tracing a call whose number of steps is no symbol."""
    # is_exporting() returns this flag. In a graph Dynamo of torch 2.11 takes that call for True.
    if not torch.compiler._is_exporting_flag:
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


class ByOperator(Checked):
    """What only torch.nn's operators can do, and where they are the better choice."""

    backend: Backend
    checkpoint_every: int | None
    recurrent_dropout: float
    zoneout: float | tuple[float, ...]
    recurrent_grad_clip: float | None

    @property
    def regularisers(self) -> dict[str, Any]:
        """Those of the recurrence that are set, by name: no operator of torch.nn has them."""
        said: dict[str, Any] = {}
        if self.recurrent_dropout > 0:
            said["recurrent_dropout"] = self.recurrent_dropout
        if self.zoneout and any(of_each_state(self.zoneout, CELLS[self.cell].states)):
            said["zoneout"] = self.zoneout
        if self.recurrent_grad_clip is not None:
            said["recurrent_grad_clip"] = self.recurrent_grad_clip
        if self.mode.endswith("_norm"):
            said["layer_norm"] = True
        return said

    def _spec(self, p: Prepared, sizes: tuple[int, ...] | None) -> Spec:
        """How every layer of a call is run."""
        clip = self.recurrent_grad_clip
        return Spec(
            self.cell,
            self.directions,
            False,
            p.batch_first,
            sizes,
            bias=self.bias,
            projected=self.proj_size > 0,
            h_mask=self.training and self.recurrent_dropout > 0,
            zoneout="zoneout" in self.regularisers,
            grad_clip=clip if torch.is_grad_enabled() else None,
        )

    def __prepare_scriptable__(self) -> torch.nn.RNNBase:
        """torch.jit.script compiles torch.nn's module in place of this one, on the same weights."""
        if self.mode not in MODES:
            raise RuntimeError(
                "torch.jit.script compiles the module of torch.nn in place of one of rnn, and "
                f"there is none of the cell {self.cell!r}: use torch.compile or torch.export"
            )
        if self.regularisers:
            raise RuntimeError(
                "torch.jit.script compiles the module of torch.nn in place of one of rnn, and that "
                f"has no {', '.join(self.regularisers)}: use torch.compile or torch.export"
            )
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

    def why_pytorchs_operator(self, p: Prepared) -> str:
        """Why torch.nn's own operator runs the whole call; empty where rnn's layers do."""
        why = ""
        if self.cell not in OPERATORS or (self.regularisers and self._spec(p, None).regularised):
            return why
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
        if needs_plain_operations(differentiated):
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
