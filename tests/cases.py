"""The cases that every backend passes, as values, and the oracle that they are held against."""

from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu}
NAMES = ("output", "h_n", "d_x_gates", "d_h0", "d_weight_hh")


class Case(NamedTuple):
    cell: str
    T: int
    B: int
    H: int
    directions: int = 1
    reverse: bool = False
    ragged: bool = False  # with lengths, zero and T among them where B allows
    layout: str = "time_major"  # or "batch_major", or "strided": every other element of a buffer

    def __str__(self) -> str:
        flags = [name for name in ("reverse", "ragged") if getattr(self, name)]
        flags += ["bidirectional"] * (self.directions == 2)
        flags += [self.layout] * (self.layout != "time_major")
        return "-".join([self.cell, f"T{self.T}", f"B{self.B}", f"H{self.H}", *flags])


CASES = [
    Case("rnn_tanh", T=1, B=1, H=1),
    Case("rnn_relu", T=1, B=1, H=1, reverse=True),
    Case("rnn_tanh", T=1, B=5, H=17, directions=2),
    Case("rnn_tanh", T=7, B=3, H=17),
    Case("rnn_relu", T=7, B=3, H=17),
    Case("rnn_tanh", T=7, B=3, H=17, reverse=True),
    Case("rnn_tanh", T=5, B=1, H=64),
    Case("rnn_relu", T=4, B=37, H=33),
    Case("rnn_tanh", T=4, B=37, H=33, layout="batch_major"),
    Case("rnn_tanh", T=6, B=20, H=16, layout="strided"),
    Case("rnn_tanh", T=6, B=20, H=128),
    Case("rnn_relu", T=6, B=17, H=128, directions=2, layout="batch_major"),
    Case("rnn_tanh", T=9, B=6, H=33, ragged=True),
    Case("rnn_relu", T=9, B=6, H=17, ragged=True, reverse=True),
    Case("rnn_tanh", T=9, B=18, H=33, ragged=True, directions=2),
    Case("rnn_tanh", T=3, B=5, H=16, ragged=True, directions=2, reverse=True, layout="batch_major"),
    Case("rnn_tanh", T=2, B=1, H=1, ragged=True),
]


class Problem(NamedTuple):
    """The tensors of a case. Gradients come into both results and are zero in neither."""

    x_gates: Tensor  # (T, B, D * H)
    h0: Tensor  # (D, B, H)
    weight_hh: Tensor  # (D, H, H)
    lengths: Tensor | None  # (B,)
    d_output: Tensor  # (T, B, D * H)
    d_h_n: Tensor  # (D, B, H)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        return Problem(
            *(
                x if x is None else x.to(device, dtype if x.is_floating_point() else x.dtype)
                for x in self
            )
        )


def problem(case: Case, seed: int = 0) -> Problem:
    """The tensors of a case in float64, the values exact in bfloat16, so that each dtype and the
    oracle start from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    T, B, H, D = case.T, case.B, case.H, case.directions

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    x_gates, weight_hh = randn(T, B, D * H), randn(D, H, H) / H**0.5
    if case.cell == "rnn_relu":
        # Away from the kink, where rounding would decide between a gradient and none: W_hh h is
        # kept smaller than x_gates.
        x_gates, weight_hh = x_gates + x_gates.sign(), weight_hh / 16
    lengths = None
    if case.ragged:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0], lengths[-1] = 0, T
    return Problem(
        x_gates.bfloat16().double(),
        randn(D, B, H),
        weight_hh.bfloat16().double(),
        lengths,
        randn(T, B, D * H),
        randn(D, B, H),
    )


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in another place: a leaf (T, B, _) with the strides that `layout` names."""
    if layout == "batch_major":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        spread = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)
        spread[..., 0] = x
        return spread[..., 0]
    return x.clone()


def eager(case: Case, p: Problem) -> tuple[Tensor, ...]:
    """The recurrence step by step under autograd: output, h_n and all gradients."""
    leaves = [x.clone().requires_grad_() for x in p[:3]]
    x_gates, h0, weight_hh = leaves
    f = ACTIVATIONS[case.cell]
    outputs, states = [], []
    for d in range(case.directions):
        h = h0[d]
        steps: list = [None] * case.T
        backwards = case.reverse != bool(d)
        for t in reversed(range(case.T)) if backwards else range(case.T):
            y = f(x_gates[t].chunk(case.directions, 1)[d] + h @ weight_hh[d].t())
            if p.lengths is None:
                h = y
            else:
                active = (t < p.lengths)[:, None]
                h, y = torch.where(active, y, h), torch.where(active, y, 0)
            steps[t] = y
        outputs.append(torch.stack(steps))
        states.append(h)
    output, h_n = torch.cat(outputs, 2), torch.stack(states)
    gradients = torch.autograd.grad([output, h_n], leaves, [p.d_output, p.d_h_n])
    return output.detach(), h_n.detach(), *gradients


def worst(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where either has one."""
    return float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max())
