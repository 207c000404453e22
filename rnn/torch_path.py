"""The tuned PyTorch path: the recurrence of one direction and its hand-written BPTT.

It runs on a CPU, and wherever no kernel does. Any floating dtype. Autograd records nothing here.

Rows: sequences lie as one matrix (N, features), the rows of step 0, then those of step 1, and so
on. sizes[t] rows are active at step t, the longest sequences first, so sizes never grows. That is
the layout of a PackedSequence; where all sequences are equally long, sizes is [B] * T. Steps that
are not there cost nothing, and padding is never read.

A step works in place on views of buffers that hold all rows. Going back, whatever does not depend
on the incoming gradient (the slopes of the activations) is computed for many steps at once, a
chunk that fits the cache, straight into the buffer of the gradients; a step then only multiplies.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .cells import Cell, Tensors
from .in_place import Range, form_of
from .regularisers import OFF, Regularisers

CHUNK = 1 << 14  # numbers of a state in a chunk: 64 KiB in float32, of which some ten fit L2


@lru_cache
def on_intel() -> bool:
    """Whether this is an Intel processor: elsewhere MKL's products of few rows are slow."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def can_pack(weight: Tensor, batch: int) -> bool:
    """Whether W_hh should be packed once into the order in which oneDNN's kernels read it: the
    CPU's form of resident weights, since the ordinary product packs them anew at every step.

    A call to oneDNN costs some 15 us more than MKL's. It pays where W_hh (1 MiB and up) outgrows
    the nearest cache, by 1.3 to 1.6 on an AMD EPYC, and not on an Intel Xeon, where MKL is at its
    best. The two ops are private to PyTorch.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= 1 << 18
        and batch >= 4
        and not on_intel()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Aligned:
    """Rows (n, K), n at most `batch`, for a product whose bits depend on their values alone.

    Where its operand lies decides in which order MKL sums, on an AMD EPYC and for odd K. float64
    has the same bits step by step as all at once (`step`), so its rows are copied to one place.
    """

    def __init__(self, batch: int, like: Tensor) -> None:
        self.place = like.new_empty(batch, like.size(1)) if like.dtype == torch.float64 else None

    def __call__(self, rows: Tensor) -> Tensor:
        return rows if self.place is None else self.place[: len(rows)].copy_(rows)


class Product:
    """The product of a step, h @ weight.T for h (n, K), n at most `batch`."""

    def __init__(self, weight: Tensor, batch: int) -> None:
        self.transposed = weight.t()
        self.aligned = Aligned(batch, weight)
        self.packed: Tensor | None = None
        if can_pack(weight, batch):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
        else:
            self.result = weight.new_empty(batch, len(weight))

    def __call__(self, h: Tensor) -> Tensor:
        """In memory that the next call may write over."""
        if self.packed is None:
            return torch.mm(self.aligned(h), self.transposed, out=self.result[: len(h)])
        return torch.ops.mkldnn._linear_pointwise(h, self.packed, None, "none", [], "")

    def add_(self, x: Tensor, h: Tensor) -> None:
        """x += h @ weight.T"""
        if self.packed is None:
            x.addmm_(self.aligned(h), self.transposed)
        else:
            x.add_(self(h))


def view(gates: Tensor, gate_range: Range) -> Tensor:
    """Of gates (n, G, H), one gate (n, H) or several (n, gates, H)."""
    first, end = gate_range
    return gates[:, first] if end == first + 1 else gates[:, first:end]


def order(T: int, backwards: bool) -> range:
    return range(T - 1, -1, -1) if backwards else range(T)


def previous(rows: Tensor, first: Tensor, sizes: Sequence[int], backwards: bool) -> Tensor:
    """Of a state's rows after each step, (N, H), the rows before it; `first` (B, H) before all."""
    if not sizes:
        return rows
    if sizes[0] == sizes[-1]:
        B = sizes[0]
        return torch.cat((rows[B:], first[:B]) if backwards else (first[:B], rows[:-B]))
    steps = rows.split_with_sizes(sizes)
    if not backwards:
        before = [step[:n] for step, n in zip(steps, sizes[1:])]
        return torch.cat([first[: sizes[0]], *before])
    parts: list[Tensor] = []
    for step, n, fewer in zip([*steps[1:], first[:0]], sizes, [*sizes[1:], 0]):
        parts += (step, first[fewer:n])
    return torch.cat(parts)


def forward(
    cell: Cell,
    x_gates: Tensor,  # (N, G * H), contiguous; overwritten
    state0: Tensors,  # S tensors (B, H), in the order of the rows
    weight_hh: Tensor,  # (G * H, H)
    params: Tensors,  # each (H,)
    sizes: Sequence[int],
    backwards: bool,
    regularisers: Regularisers = OFF,  # h_mask (B, H) and keep (N, S * H), in the order of the rows
) -> tuple[Tensors, Tensors, Tensors]:
    """The states after each step, S tensors (N, H); the last states, S tensors (B, H); saved, to
    which zoneout adds the states as the cell's step made them."""
    form = form_of(cell, params)
    h_mask, keep, _ = regularisers
    B, H = state0[0].shape
    gates = x_gates.view(-1, cell.gates, H)
    # Inner gates come last, but where W_hh h is handed over apart.
    summed = 0 if form.apart else cell.gates - len(cell.inner_bias)
    if form.own_states:
        states = [x_gates.new_empty(len(x_gates), H) for _ in state0]
    else:
        states = [x_gates]
    apart = [x_gates.new_empty(len(x_gates), H) for _ in range(cell.saved * form.apart)]
    inner = None
    inner_steps: Sequence[Tensor | None] = [None] * len(sizes)
    if cell.inner_bias and not form.apart:
        inner = x_gates.new_empty(len(x_gates), (cell.gates - summed) * H)
        inner_steps = inner.split_with_sizes(sizes)
        bias = torch.cat(params)
    product = Product(weight_hh, B)
    x_steps = x_gates[:, : summed * H].split_with_sizes(sizes)
    views = [view(gates, r).split_with_sizes(sizes) for r in form.step_ranges]
    written = [s.split_with_sizes(sizes) for s in (*states, *apart)]
    unmixed: list[Tensor] = []
    if keep is not None:
        unmixed, states = states, [s.new_empty(s.shape) for s in states]
        mixed_states = [s.split_with_sizes(sizes) for s in states]
        keep_steps = [k.split_with_sizes(sizes) for k in keep.chunk(cell.states, 1)]
    last = [s.clone() for s in state0]
    prev, rows = list(state0), 0 if backwards else B
    for t in order(len(sizes), backwards):
        n = sizes[t]
        if n < rows:  # the rows that have ended keep their state
            for end, s in zip(last, prev):
                end[n:rows] = s[n:rows]
            prev = [s[:n] for s in prev]
        elif n > rows:  # rows that begin here join with their initial state
            prev = [torch.cat((s[:rows], s0[rows:n])) for s, s0 in zip(prev, state0)]
        rows = n
        m, h = inner_steps[t], prev[0]
        if h_mask is not None:
            h = h * h_mask[:n]
        if form.apart:
            m = product(h)
        elif m is None:
            product.add_(x_steps[t], h)
        else:
            h_gates = product(h)
            x_steps[t].add_(h_gates[:, : summed * H])
            torch.add(h_gates[:, summed * H :], bias, out=m)
        new = [s[t] for s in written]
        form.step_([v[t] for v in views], m, prev, new)
        if keep is not None:
            for mixed, k, before, after in zip(mixed_states, keep_steps, prev, new):
                torch.lerp(after, before, k[t], out=mixed[t])
            new = [mixed[t] for mixed in mixed_states]
        prev = new[: cell.states]
    for end, s in zip(last, prev):
        end[:rows] = s[:rows]
    saved = tuple(apart)
    if form.own_states and not form.apart:
        saved = gates.unbind(1)
    saved = saved if inner is None else (*saved, inner)
    return tuple(states), tuple(last), (*saved, *unmixed)


def chunks(sizes: Sequence[int], H: int, downwards: bool) -> Iterator[tuple[range, int, int]]:
    """Runs of steps, in the order of the walk, with their rows from .. to: each some CHUNK
    numbers of a state."""
    steps, rows = [0], [0]
    total = 0
    for t, n in enumerate(sizes):
        total += n
        if (total - rows[-1]) * H >= CHUNK or t == len(sizes) - 1:
            steps.append(t + 1)
            rows.append(total)
    runs = list(zip(steps, steps[1:], rows, rows[1:]))
    for first, end, begin, stop in reversed(runs) if downwards else runs:
        yield range(end - 1, first - 1, -1) if downwards else range(first, end), begin, stop


def backward(
    cell: Cell,
    d_h: Tensor,  # (N, H): the gradient of h after each step; overwritten
    d_last: Sequence[Tensor | None],  # S tensors (B, H)
    states: Tensors,  # S tensors (N, H), as the cell's step made them
    prev: Tensors,  # the states before each step, S tensors (N, H)
    saved: Tensors,
    weight_hh: Tensor,  # (G * H, H)
    params: Tensors,  # each (H,)
    batch: int,
    sizes: Sequence[int],
    backwards: bool,
    regularisers: Regularisers = OFF,  # as forward takes them
) -> tuple[Tensor, Tensor, Tensors, Tensors]:
    """d_x_gates and d_h_gates, (N, G * H), the gradients of the first states, S x (B, H), and
    those of the cell's own params, each (H,).

    A step adds what its gates hand on to d_h of the step before, in place.
    """
    form = form_of(cell, params)
    h_mask, keep, grad_clip = regularisers
    regularised = any(x is not None for x in regularisers)
    (N, H), T = d_h.shape, len(sizes)
    d_gates = d_h.new_empty(N, cell.gates, H)
    d_own = d_h.new_empty(N, len(cell.own_params), H)
    d_x_gates = torch.empty_like(d_gates) if cell.split else d_gates
    # Rows of d_state0 that have not begun (or have ended) hold the gradient of their last state.
    d_state0 = [
        d_h.new_zeros(batch, H) if d is None else d.clone(memory_format=torch.contiguous_format)
        for d in d_last
    ]
    product = Product(weight_hh.t(), batch)
    d_h_steps = d_h.split_with_sizes(sizes)
    keep_steps: list[Sequence[Tensor]] = []
    if keep is not None:
        keep_steps = [k.split_with_sizes(sizes) for k in keep.chunk(len(states), 1)]
    begun = batch if backwards else 0
    if backwards and sizes:
        d_h_steps[0].add_(d_state0[0][: sizes[0]])
        d_state0[0][: sizes[0]] = 0
        begun = sizes[0]
    for steps, begin, stop in chunks(sizes, H, downwards=not backwards):
        chunk = slice(begin, stop)
        coefficients = form.slopes(
            [x[chunk] for x in states],
            [x[chunk] for x in prev],
            [x[chunk] for x in saved],
            list(d_gates[chunk].unbind(1)),
            list(d_x_gates[chunk].unbind(1)),
        )
        first = min(steps[0], steps[-1])
        these = list(sizes[first : first + len(steps)])
        d = [view(d_gates[chunk], r).split_with_sizes(these) for r in form.d_ranges]
        d += [own.split_with_sizes(these) for own in d_own[chunk].unbind(1)]
        d_x = [view(d_x_gates[chunk], r).split_with_sizes(these) for r in form.d_x_ranges]
        factors = [x.split_with_sizes(these) for x in coefficients]
        all_gates = d_gates[chunk].flatten(1).split_with_sizes(these)
        for t in steps:
            n, k = sizes[t], t - first
            if not backwards and n > begun:  # rows that end here
                d_h_steps[t][begun:].add_(d_state0[0][begun:n])
                d_state0[0][begun:n] = 0
                begun = n
            d_h_t, factor = d_h_steps[t], [x[k] for x in factors]
            d_states = [x[:n] for x in d_state0[1:]]
            if keep is not None:
                kept = [x * mask[t] for x, mask in zip([d_h_t, *d_states], keep_steps)]
                for x, past in zip([d_h_t, *d_states], kept):
                    x.sub_(past)
            form.step_vjp_(d_h_t, d_states, [x[k] for x in d], [x[k] for x in d_x], factor)
            if keep is not None:
                for x, past in zip(d_states, kept[1:]):
                    x.add_(past)
            following = t + 1 if backwards else t - 1  # in this walk: the step before, in time
            onto = d_h_steps[following] if 0 <= following < T else d_state0[0]
            for target, rows in hand_on(onto, d_state0[0], n):
                if regularised:
                    handed = product(all_gates[k][rows])
                    if h_mask is not None:
                        handed.mul_(h_mask[rows])
                    if form.past:
                        handed.addcmul_(d_h_t[rows], factor[-1][rows])
                    if keep is not None:
                        handed.add_(kept[0][rows])
                    if grad_clip is not None:
                        handed.clamp_(-grad_clip, grad_clip)
                    target.add_(handed)
                    continue
                if form.past:
                    target.addcmul_(d_h_t[rows], factor[-1][rows])
                product.add_(target, all_gates[k][rows])
    if cell.split:
        for gate in range(cell.gates):
            if gate not in cell.split:
                d_x_gates[:, gate] = d_gates[:, gate]
    own = d_own.sum(0).unbind()
    return d_x_gates.flatten(1), d_gates.flatten(1), tuple(d_state0), own


def hand_on(onto: Tensor, d_h0: Tensor, n: int) -> Iterator[tuple[Tensor, slice]]:
    """Where n rows of a step add their gradient: to the step before, `onto`; those that have none
    (a row that begins here), to the initial state."""
    if len(onto) >= n:
        yield onto[:n], slice(0, n)
        return
    common = len(onto)
    yield onto, slice(0, common)
    yield d_h0[common:n], slice(common, n)
