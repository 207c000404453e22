"""Regularisers of the recurrence: what a layer's loop does beside the steps of its cell.

    recurrent dropout   h_gates = W_hh (m * h_{t-1}), one mask m for all steps
    zoneout             state_t = k_t * state_{t-1} + (1 - k_t) * step(...), a mask for each step
    clipping            the gradient that a step hands to h_{t-1} is clamped to [-c, c]

Masks are tensors, drawn before the loop: every engine, a pass that is run again and a second
derivative see the same one.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Regularisers(NamedTuple):
    """Those of one layer. Of one direction, D is left out or 1."""

    h_mask: Tensor | None = None  # (D, B, H): W_hh takes h_mask * h
    keep: Tensor | None = None  # (T, B, D * S * H): what each state keeps of its old value
    grad_clip: float | None = None

    def of_direction(self, d: int, directions: int) -> "Regularisers":
        mask, keep = self.h_mask, self.keep
        return Regularisers(
            None if mask is None else mask[d],
            None if keep is None else keep.chunk(directions, -1)[d],
            self.grad_clip,
        )


OFF = Regularisers()


class _ClampedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, bound: float) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, None]:
        return d_h.clamp(-ctx.bound, ctx.bound), None


def with_clamped_gradient(h: Tensor, bound: float) -> Tensor:
    """h, whose gradient through this one result is clamped to [-bound, bound]."""
    return _ClampedGradient.apply(h, bound)


def mask_of_rows(h_mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mask (B, H) for each row of the steps, (N, H): sizes[t] of step t."""
    if sizes and sizes[0] == sizes[-1]:
        return h_mask[: sizes[0]].repeat(len(sizes), 1)
    return torch.cat([h_mask[:0], *(h_mask[:n] for n in sizes)])


# What a module is told.


def check_probability(name: str, p: Any, of: str = "an element being zeroed") -> float:
    """p as a float; raise ValueError unless it is a number in [0, 1]."""
    if not _is_number(p) or not 0 <= p <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of {of}, "
            f"got {p!r}"
        )
    return float(p)


def check_zoneout(zoneout: Any, states: int) -> float | tuple[float, ...]:
    """Raise ValueError unless it is a number in [0, 1] or, of several states, a tuple of them."""
    each = zoneout if isinstance(zoneout, tuple | list) and states > 1 else (zoneout,)
    if len(each) not in (1, states):
        raise ValueError(f"zoneout should be a number or {states} of them, got {zoneout!r}")
    checked = tuple(check_probability("zoneout", p, "a unit keeping its old value") for p in each)
    return checked if len(checked) > 1 else checked[0]


def check_grad_clip(bound: Any) -> float | None:
    """The bound as a float; raise ValueError unless it is None or a number above 0."""
    if bound is None:
        return None
    if not _is_number(bound) or not bound > 0:
        raise ValueError(f"recurrent_grad_clip should be a number above 0 or None, got {bound!r}")
    return float(bound)


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def of_each_state(zoneout: float | tuple[float, ...], states: int) -> tuple[float, ...]:
    return zoneout if isinstance(zoneout, tuple) else (zoneout,) * states


def draw_h_mask(p: float, x: Tensor, directions: int, batch: int, hidden: int) -> Tensor:
    """(D, B, H): 0 with probability p, else 1 / (1 - p)."""
    return F.dropout(torch.ones(directions, batch, hidden, dtype=x.dtype, device=x.device), p)


def draw_keep(
    zoneout: tuple[float, ...], x: Tensor, directions: int, hidden: int, training: bool
) -> Tensor:
    """(*x.shape[:-1], D * S * H): in training 1 with the probability of the state, else 0; in
    evaluation that probability, one row that stands for all."""
    # Filled on the device: a CUDA graph that is being recorded takes no number from the host.
    parts = [torch.full((hidden,), p, dtype=x.dtype, device=x.device) for p in zoneout]
    chances = torch.cat(parts * directions)
    keep = chances.expand(*x.shape[:-1], len(chances))
    return torch.bernoulli(keep) if training else keep
