"""oneDNN's LSTM on sequences of different length, which takes padded batches alone.

PyTorch's own LSTM leaves oneDNN where sequences are packed, and is then 2 to 12 times as slow in
training as on the padded batch. Here packed rows are padded, and a further input, which is 1 past
each end, shuts the input gate and opens the forget gate: c stays as it is to the last bit. It shuts
the output gate too: the output is zero there, as a reverse direction without hx wants to begin.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Tensors
from .operators import OPERATORS, Stack

SHUT = -(2.0**60)  # whatever is added to it, its sigmoid is 0, and that of -SHUT is 1


def pays(sizes: Sequence[int], hidden_size: int, trained: bool) -> bool:
    """Whether oneDNN's time on the padded batch is less than ours on the real steps. On small
    layers ours is a matter of steps, not of the rows that they have; large ones cost it as much as
    oneDNN a row in training, and half as much again forward."""
    times = 6 if hidden_size < 192 else 1 if trained else 1.5
    return sum(sizes) * times > len(sizes) * sizes[0]


def run_padded_lstm(
    stack: Stack,
    x: Tensor,  # (N, I), packed
    sizes: Sequence[int],
    state0: Tensors,  # h and c, each (L * D, B, H); zero where stack.bidirectional
    weights: list[Tensor],
) -> tuple[Tensor, Tensors]:
    """output, packed as x, and the last states."""
    T, B, H = len(sizes), sizes[0], state0[0].size(2)
    D = 2 if stack.bidirectional else 1
    row, rows_at = torch.arange(B, device=x.device), torch.tensor(sizes, device=x.device)[:, None]
    past = row >= rows_at
    past_end = past.to(x.dtype).unsqueeze(2)
    lengths = T - past.sum(0)
    # Each step is a packed row or, past an end, one more row: zeros and that 1.
    sources = (row + rows_at.cumsum(0) - rows_at).masked_fill_(past, len(x)).flatten()
    rows = F.pad(x, (0, 1, 0, 1))
    rows[-1, -1] = 1
    steps = rows.index_select(0, sources).view(T, B, -1)
    shutting = x.new_tensor([SHUT, -SHUT, 0.0, SHUT]).repeat_interleave(H).unsqueeze(1)
    each = len(weights) // stack.layers
    last: list[Tensors] = []
    for layer in range(stack.layers):
        of_layer = slice(layer * D, (layer + 1) * D)
        mine = weights[layer * each : (layer + 1) * each]
        for k in range(0, each, each // D):
            mine[k] = torch.cat((mine[k], shutting), 1)
        given = tuple(s[of_layer] for s in state0)
        options = mine, stack.bias, 1, 0.0, stack.training, stack.bidirectional, False
        if layer > 0:
            if stack.dropout > 0:
                steps = F.dropout(steps, stack.dropout, stack.training)
            steps = torch.cat((steps, past_end), 2)
        steps, h, c = OPERATORS["lstm"](steps, given, *options)
        # Past its end a row's h is zero: the last one is found where the row ends.
        h_forward = steps[lengths - 1, row, :H].unsqueeze(0)
        last.append((torch.cat((h_forward, h[1:])), c))
    h_n, c_n = (torch.cat(states) for states in zip(*last))
    places = past.logical_not().flatten().nonzero().squeeze(1)
    return steps.flatten(0, 1).index_select(0, places), (h_n, c_n)
