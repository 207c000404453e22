"""Nobody is timed before being right: each provider against torch.nn in float64.

The oracle is PyTorch's own network, on the CPU where that does not take minutes: no line of this
library is in it. All start from the same numbers, rounded to the dtype of the case.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import CELLS, DTYPES, Case
from .providers import Model, Weights, build_torch_nn

ORACLE_FLOPS = 1e11  # with more, the oracle runs where the case does and not on the CPU


class Problem(NamedTuple):
    x: Tensor  # (T, B, I)
    weights: Weights
    d_results: list[Tensor]  # gradients that come into the output and into each final state

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Problem":
        weights = {name: w.to(device, dtype) for name, w in self.weights.items()}
        return Problem(
            self.x.to(device, dtype), weights, [d.to(device, dtype) for d in self.d_results]
        )


def make_problem(case: Case, device: torch.device) -> Problem:
    """Seeded; the weights as torch.nn initialises them."""
    cell, dtype = CELLS[case.cell], DTYPES[case.dtype].torch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cell.torch_nn(
            case.I, case.H, case.layers, bidirectional=case.bidirectional, **cell.arguments
        )
        x = torch.randn(case.T, case.B, case.I)
        states = 2 if cell.torch_nn is torch.nn.LSTM else 1
        shape = (case.layers * case.directions, case.B, case.H)
        d_states = [torch.randn(shape) for _ in range(states)]
        d_output = torch.randn(case.T, case.B, case.directions * case.H)
    return Problem(x, module.state_dict(), [d_output, *d_states]).to(device, dtype)


def results_and_gradients(model: Model, p: Problem) -> list[Tensor]:
    """Output, final states, and the gradients of x and of the parameters, in their order."""
    x = p.x.detach().requires_grad_()
    results = model.forward(x)
    gradients = torch.autograd.grad(results, [x, *model.parameters], p.d_results)
    return [*(result.detach() for result in results), *gradients]


def oracle(case: Case, p: Problem) -> list[Tensor]:
    exact = case._replace(dtype="float64")
    device = torch.device("cpu") if 3 * case.flops() < ORACLE_FLOPS else p.x.device
    p = p.to(device, torch.float64)
    return results_and_gradients(build_torch_nn(exact, p.weights, device), p)


class Error(NamedTuple):
    """How far one tensor is off, relative to the largest and to the root of the mean square of
    what the oracle has. NaN, or another shape, is infinitely far."""

    largest: float
    rms: float


FAR = Error(float("inf"), float("inf"))


def names(case: Case, p: Problem) -> list[str]:
    states = ["h_n", "c_n"][: len(p.d_results) - 1]
    return ["output", *states, "d_x", *(f"d_{name}" for name in p.weights)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[Error]:
    return [error(a, b) for a, b in zip(got, want, strict=True)]


def error(got: Tensor, want: Tensor) -> Error:
    if got.shape != want.shape or not torch.isfinite(got).all():
        return FAR
    off = got.to(want.device, torch.float64) - want
    largest, rms = want.abs().max(), want.square().mean().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        float(off.abs().max() / largest.clamp_min(tiny)),
        float(off.square().mean().sqrt() / rms.clamp_min(tiny)),
    )


def why_wrong(case: Case, p: Problem, ours: list[Error], torchs: list[Error]) -> str | None:
    """Which tensor is further off than twice torch.nn in this dtype and the dtype's floor; None
    where none is. At the kink of a cell that is not smooth a gradient is either there or not, by
    rounding, so the largest error says nothing."""
    floor = DTYPES[case.dtype].floor
    for name, mine, theirs in zip(names(case, p), ours, torchs, strict=True):
        for norm in Error._fields if CELLS[case.cell].smooth else ("rms",):
            off, torch_off = getattr(mine, norm), getattr(theirs, norm)
            bound = floor + (2 * torch_off if math.isfinite(torch_off) else 0.0)
            if off > bound:
                return f"{name} is off by {off:.1e} ({norm}), {bound:.1e} is allowed"
    return None
