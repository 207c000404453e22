"""The ops that torch.compile and torch.export put into their graphs: a layer is one node.

    fused_rnn::layer           output, the last states and what the backward pass needs
    fused_rnn::layer_backward  the gradients that are asked for

Which engine runs is settled inside, from the tensors of the call: a graph holds for every number of
steps and rows. In eager mode layers run as a Function (autograd.py): the dispatcher's way to an op
of Python costs more than the whole call of a small layer.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from . import dispatch
from .autograd import Call, backward, backward_of_plain, is_batched, without_autocast
from .cells import Tensors
from .engines import StepRows, forward_in_torch, forward_in_triton, rows_of
from .kernels.limits import KernelUnavailable, NoPlan, Plan
from .layer import Spec, by_operator, time_major
from .operators import why_faster

SAID = (
    "str cell, int directions, bool reverse, bool batch_first, bool input_product, bool bias, "
    "bool stacked, bool projected, str backend, "
    "bool h_mask=False, bool zoneout=False, float? grad_clip=None"
)
MANY_STEPS = 1 << 62
LIBRARY = torch.library.Library("fused_rnn", "DEF")
LIBRARY.define(
    "layer(Tensor x, Tensor[] tensors, Tensor? lengths, Tensor? batch_sizes, *, "
    f"{SAID}, bool save) -> Tensor[]",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
LIBRARY.define(
    "layer_backward(Tensor?[] d_outputs, Tensor x, Tensor[] tensors, Tensor? lengths, "
    f"Tensor? batch_sizes, Tensor output, Tensor kept, *, {SAID}, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


class Layer:
    """What both ops make of their arguments: how a layer is run, and on which tensors."""

    def __init__(
        self,
        x: Tensor,  # (T, B, I), (B, T, I), or packed (N, I)
        tensors: Sequence[Tensor],  # the states, then the weights, as Weights.of takes them
        lengths: Tensor | None,
        sizes: tuple[int, ...] | None,  # of packed x, where its values are known
        backend: str,
        save: bool,
        **said: Any,
    ) -> None:
        self.spec = Spec(sizes=sizes, **said)
        self.cell = self.spec.stored_cell
        self.x, self.tensors, self.lengths = x, tuple(tensors), lengths
        self.backend, self.save = backend, save
        self.weight_hh = tensors[self.spec.first_weight + self.spec.input_product]
        self.batch, self.hidden = tensors[0].size(-2), self.weight_hh.size(-1)
        if sizes is not None and sizes[0] != self.batch:
            raise RuntimeError(f"the states must have {sizes[0]} rows, got {self.batch}")

    def uses_operator(self, trained: bool) -> bool:
        """Whether PyTorch's own operator runs it. For a gradient it must then run twice (see
        by_autograd): with few steps, where it is otherwise the faster one, that loses."""
        spec = self.spec
        if spec.projected:
            return True
        if self.backend != "auto" or self.lengths is not None or not spec.input_product:
            return False
        if spec.regularised:
            return False
        if self.x.dim() == 2:  # packed
            return False
        return bool(why_faster(spec.cell, self.weight_hh, MANY_STEPS, self.batch, trained))

    def kept(self) -> int:
        """How many numbers the forward pass hands on to the backward pass, beside its output.
        It follows from the layer alone, not from the engine."""
        if not self.save or self.uses_operator(trained=True):
            return 0
        rows = prod(self.x.shape[:-1])
        return rows * self.spec.directions * self.cell.stored * self.hidden

    def plan(self) -> Plan | NoPlan:
        return dispatch.choose(
            self.backend,
            self.cell,
            self.hidden,
            self.batch,
            self.spec.directions,
            self.x.dtype,
            self.x.device,
            self.spec.sizes is not None,
            self.spec.regularised,
        )

    def forward(self, plan: Plan | NoPlan) -> tuple[Tensor, Tensors, Tensors]:
        """output, last states and what the engine keeps."""
        save = self.save and self.cell.stored > 0  # the output is kept anyway
        each = self.spec, self.x, self.lengths, self.tensors, save
        if isinstance(plan, Plan):
            return forward_in_triton(plan, *each)
        return forward_in_torch(*each)

    def give_up(self, plan: Plan | NoPlan, error: KernelUnavailable) -> NoPlan:
        """The other engine, unless this one was asked for."""
        if self.backend == "triton":
            raise error
        assert isinstance(plan, Plan)
        return dispatch.give_up(plan, error)


def pack(layer: Layer, kept: Tensors) -> Tensor:
    """What an engine keeps as one tensor of layer.kept() numbers."""
    if not layer.kept():
        return layer.x.new_empty(0)
    if len(kept) == 1:  # the kernels': in steps, as the output
        return time_major(layer.spec, kept[0]).flatten()
    packed = layer.x.new_empty(layer.kept())
    # Of each direction h, which is in the output, the other states, and what its cell saves.
    parts = [k for n, k in enumerate(kept) if n % (1 + layer.cell.stored)]
    ends = list(accumulate(k.numel() for k in parts))  # of padding nothing is kept
    for k, end in zip(parts, ends):
        packed[end - k.numel() : end].view(k.shape).copy_(k)
    packed[ends[-1] :] = 0
    return packed


def unpack(layer: Layer, plan: Plan | NoPlan, output: Tensor, packed: Tensor) -> Tensors:
    """What an engine kept, from `pack` and the output."""
    spec, cell, H = layer.spec, layer.cell, layer.hidden
    if isinstance(plan, Plan):
        if not cell.stored:
            return (output,)
        return output, time_major(spec, packed.view(*output.shape[:-1], -1))
    rows = rows_of(spec, layer.x, layer.lengths, layer.batch)
    in_steps, N = StepRows(spec, rows), sum(rows.sizes)
    count = spec.directions * cell.stored
    parts = iter(packed[: count * N * H].view(count, N, H))
    kept: list[Tensor] = []
    for d in range(spec.directions):
        kept.append(in_steps.gather(output[..., d * H : (d + 1) * H]))
        kept += (next(parts) for _ in range(cell.stored))
    return tuple(kept)


def by_autograd(
    layer: Layer, d_outputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x and tensors where PyTorch's own operator runs, which runs once more."""
    off = torch._C._dispatch_tls_local_exclude_set()
    key: Any = torch._C._parse_dispatch_key(f"Autograd{layer.x.device.type.upper()}")
    on = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), off - torch._C.DispatchKeySet(key)
    )
    with on, torch.enable_grad():  # below an op's own autograd the dispatcher records nothing
        at = [t.detach().requires_grad_(need) for t, need in zip((layer.x, *layer.tensors), needs)]
        outputs = by_operator(layer.spec, at[0], layer.lengths, *at[1:])
        given = [k for k, d in enumerate(d_outputs) if d is not None]
        asked = [t for t, need in zip(at, needs) if need]
        found = iter(
            torch.autograd.grad(
                [outputs[k] for k in given],
                asked,
                [d_outputs[k] for k in given],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return tuple(next(found) if need else None for need in needs)


def values(batch_sizes: Tensor | None) -> tuple[int, ...] | None:
    return None if batch_sizes is None else tuple(batch_sizes.tolist())


def layer_impl(
    x: Tensor,
    tensors: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    **said: Any,
) -> list[Tensor]:
    layer = Layer(x, tensors, lengths, values(batch_sizes), **said)
    with without_autocast(x.device), torch.no_grad():
        if layer.uses_operator(trained=layer.save):
            output, *state_n = by_operator(layer.spec, x, lengths, *tensors)
            packed = x.new_empty(0)
        else:
            plan = layer.plan()
            try:
                output, state, kept = layer.forward(plan)
            except KernelUnavailable as error:
                output, state, kept = layer.forward(layer.give_up(plan, error))
            state_n, packed = list(state), pack(layer, kept)
    return [t.contiguous() for t in (output, *state_n, packed)]


def layer_backward_impl(
    d_outputs: list[Tensor | None],
    x: Tensor,
    tensors: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    kept: Tensor,
    *,
    needs: list[bool],
    **said: Any,
) -> list[Tensor]:
    layer = Layer(x, tensors, lengths, values(batch_sizes), save=True, **said)
    gradients: Sequence[Tensor | None]
    with without_autocast(x.device), torch.no_grad():
        if layer.uses_operator(trained=True):
            gradients = by_autograd(layer, d_outputs, needs)
        else:
            plan = layer.plan()
            run_again = kept.numel() != layer.kept() or dispatch.given_up(plan)
            try:
                gradients = by_engine(layer, plan, output, kept, d_outputs, needs, run_again)
            except KernelUnavailable as error:
                plan = layer.give_up(plan, error)
                gradients = by_engine(layer, plan, output, kept, d_outputs, needs, True)
    found = [g for g, need in zip(gradients, needs) if need]
    return [cast(Tensor, g).contiguous() for g in found]


def by_engine(
    layer: Layer,
    plan: Plan | NoPlan,
    output: Tensor,
    packed: Tensor,
    d_outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    run_again: bool,
) -> Sequence[Tensor | None]:
    """The gradients of x and tensors by our own backward pass. The forward pass runs again where
    it kept nothing, or where another engine may have run it: the kernels of its plan failed since.
    """
    if run_again and layer.cell.stored:
        output, _, kept = layer.forward(plan)
        if isinstance(plan, Plan):
            kept = output, *kept
    else:
        kept = unpack(layer, plan, output, packed)
    d_output, *d_last = d_outputs
    d_x, _, *rest = backward(
        Call(layer.spec, plan, save=True),
        layer.x,
        layer.lengths,
        layer.tensors,
        kept,
        d_output,
        tuple(d_last),
        (False, needs[0], False, *needs[1:]),
    )
    return d_x, *rest


def layer_fake(
    x: Tensor,
    tensors: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    **said: Any,
) -> list[Tensor]:
    layer = Layer(x, tensors, lengths, None, **said)
    states = [s.new_empty(s.shape) for s in layer.tensors[: layer.cell.states]]
    width = layer.spec.directions * states[0].size(-1)
    return [x.new_empty(*x.shape[:-1], width), *states, x.new_empty(layer.kept())]


def layer_backward_fake(
    d_outputs: list[Tensor | None],
    x: Tensor,
    tensors: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    kept: Tensor,
    *,
    needs: list[bool],
    **said: Any,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, *tensors), needs) if need]


# Autograd.


def layer_setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: list[Tensor]) -> None:
    x, tensors, lengths, batch_sizes = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x, lengths, batch_sizes, output[0], output[-1], *tensors)
    ctx.said = {name: said for name, said in keyword_only_inputs.items() if name != "save"}
    ctx.set_materialize_grads(False)


def layer_gradients(ctx: Any, d_results: list[Tensor | None]) -> tuple:
    x, lengths, batch_sizes, output, kept, *tensors = ctx.saved_tensors
    d_outputs = d_results[:-1]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    gradients: Sequence[Tensor | None] = [None] * len(needs)
    if any(d is not None for d in d_outputs):
        # create_graph=True, or many gradients at once: every operation must be seen
        if torch.is_grad_enabled() or any(is_batched(d) for d in d_outputs):
            said = {name: said for name, said in ctx.said.items() if name != "backend"}
            spec = Spec(sizes=values(batch_sizes), **said)
            for_function = (False, needs[0], False, *needs[1:])
            d_x, _, *rest = backward_of_plain(
                spec, x, lengths, tuple(tensors), for_function, d_outputs
            )
            gradients = d_x, *rest
        else:
            each = d_outputs, x, tensors, lengths, batch_sizes, output, kept
            found = iter(torch.ops.fused_rnn.layer_backward(*each, needs=needs, **ctx.said))
            gradients = [next(found) if need else None for need in needs]
    return gradients[0], list(gradients[1:]), None, None


LIBRARY.impl("layer", layer_impl, "CompositeExplicitAutograd")
LIBRARY.impl("layer_backward", layer_backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::layer", layer_fake, lib=LIBRARY)
torch.library.register_fake("fused_rnn::layer_backward", layer_backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fused_rnn::layer", layer_gradients, setup_context=layer_setup, lib=LIBRARY
)


def run_as_op(
    spec: Spec,
    backend: str,
    x: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    tensors: Tensors,
    save: bool,
) -> tuple[Tensor, Tensors]:
    """A layer as one node of the graph that is being traced: output and the last states."""
    said = spec._asdict()
    del said["sizes"]
    results = torch.ops.fused_rnn.layer(
        x, list(tensors), lengths, batch_sizes, **said, backend=backend, save=save
    )
    return results[0], tuple(results[1:-1])
