"""The recurrence as its equation: slow, and obviously right.

The oracle of the tests and benchmarks. It is also what runs where autograd must see every
operation: second derivatives, forward-mode derivatives, vmap.
"""

import torch
from torch import Tensor

from .cells import CELLS, Tensors
from .regularisers import OFF, Regularisers, with_clamped_gradient


def recurrence(
    cell: str,
    x_gates: Tensor,  # (T, B, D * G * H)
    state0: Tensors,  # S tensors (D, B, H)
    weight_hh: Tensor,  # (D, G * H, H)
    params: Tensors = (),  # each (D, H)
    lengths: Tensor | None = None,  # (B,): row b is active while t < lengths[b]
    reverse: bool = False,  # direction 0 walks from T - 1 down to 0, and direction 1 upwards
    regularisers: Regularisers = OFF,
) -> tuple[Tensor, Tensors]:
    """output (T, B, D * H), zero at inactive steps, and the last states, S tensors (D, B, H)."""
    T, D, G = x_gates.size(0), weight_hh.size(0), CELLS[cell].gates
    outputs, last = [], []
    for d in range(D):
        state = tuple(s[d] for s in state0)
        output: list[Tensor] = [state[0]] * T
        backwards = reverse != bool(d)
        h_mask, keep, grad_clip = regularisers.of_direction(d, D)
        for t in reversed(range(T)) if backwards else range(T):
            x = x_gates[t].chunk(D, -1)[d].chunk(G, -1)
            old = state
            if grad_clip is not None:
                old = with_clamped_gradient(state[0], grad_clip), *state[1:]
            taken = old[0] if h_mask is None else old[0] * h_mask
            h = (taken @ weight_hh[d].t()).chunk(G, -1)
            new, _ = CELLS[cell].step(x, h, old, tuple(p[d] for p in params))
            if keep is not None:
                chances = keep[t].chunk(len(state), -1)
                new = tuple(k * a + (1 - k) * b for k, a, b in zip(chances, old, new))
            output[t] = new[0]
            if lengths is not None:
                active = (t < lengths)[:, None]
                output[t] = torch.where(active, new[0], torch.zeros_like(new[0]))
                new = tuple(torch.where(active, a, b) for a, b in zip(new, state))
            state = new
        outputs.append(torch.stack(output))
        last.append(state)
    return torch.cat(outputs, -1), tuple(torch.stack(states) for states in zip(*last))
