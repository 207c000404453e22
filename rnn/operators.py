"""PyTorch's own operators of whole stacks, and where auto prefers them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, Tensors
from .rows import Rows
from .torch_path import can_pack

OPERATORS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
    "gru": torch._VF.gru,
    "lstm": torch._VF.lstm,
}


class Stack(NamedTuple):
    """What an operator is told beside tensors."""

    cell: str
    bias: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool


def why_faster(cell: str, weight_hh: Tensor, T: int, batch: int, trained: bool) -> str:
    """Where PyTorch's own operator was measured faster on a CPU, in float32; else empty.

    On 2 cores of an Intel Xeon, with PyTorch 2.13; medians of calls in turns, as
    `python -m bench` takes them.
    """
    if weight_hh.device.type != "cpu" or weight_hh.dtype != torch.float32:
        return ""
    if cell not in OPERATORS:
        return ""
    if cell == "lstm" and torch.backends.mkldnn.is_available():
        # oneDNN runs all steps in one call: 1.1 (H = 1024) to 2.2 times as fast as ours.
        return "oneDNN's LSTM is faster on a CPU"
    if not trained and not can_pack(weight_hh, batch):
        # 1.1 to 3 times, the most where there is little work
        return "faster on a CPU where no gradient is wanted"
    if trained and T < 16:  # 1.1 to 2.5 times
        return "faster on a CPU in training on fewer than 16 steps"
    return ""


def run_stack(
    stack: Stack,
    x: Tensor,  # (T, B, I), (B, T, I) if batch_first, or packed (N, I)
    batch_sizes: Tensor | None,  # of packed x
    lengths: Tensor | None,  # (B,), of padded x
    state0: Tensors,  # (L * D, B, _)
    weights: list[Tensor],
) -> tuple[Tensor, Tensors]:
    """output, laid out as x, and the last states."""
    options = (weights, stack.bias, stack.layers, stack.dropout, stack.training)
    operator = OPERATORS[stack.cell]
    rows = None
    if lengths is not None:
        steps = x.transpose(0, 1) if stack.batch_first else x
        rows = Rows.of_lengths(lengths, steps.size(0))
        n = rows.sizes[0] if rows.sizes else 0
        if n == 0:
            return nothing_ran(stack, x, state0, weights)
        x, batch_sizes = rows.gather(steps), torch.tensor(rows.sizes, device="cpu")
        assert rows.order is not None
        longest = rows.order[:n]
        state0, whole = tuple(s[:, longest] for s in state0), state0
    given = state0[0] if CELLS[stack.cell].states == 1 else state0
    if batch_sizes is None:
        output, *state_n = operator(x, given, *options, stack.bidirectional, stack.batch_first)
    else:
        output, *state_n = operator(x, batch_sizes, given, *options, stack.bidirectional)
    if rows is not None:
        padded = output.new_zeros(*steps.shape[:2], output.size(1))
        output = rows.scatter_(output, padded)
        output = output.transpose(0, 1) if stack.batch_first else output
        state_n = [s.index_copy(1, longest, e) for s, e in zip(whole, state_n)]
    return output, tuple(state_n)


def nothing_ran(
    stack: Stack, x: Tensor, state0: Tensors, weights: list[Tensor]
) -> tuple[Tensor, Tensors]:
    """No row has a step. The graph of a call all the same: every gradient is a tensor of zeros."""
    width = state0[0].size(-1) * (2 if stack.bidirectional else 1)
    nothing = x.new_zeros(())
    for t in (x, *weights):
        nothing = nothing + t.flatten()[:0].sum()
    return nothing.expand(*x.shape[:2], width).clone(), tuple(s + nothing for s in state0)
