"""The cases that every backend passes, as values, and the oracle that they are held against."""

from typing import NamedTuple

import torch
from torch import Tensor

import rnn
from rnn import reference
from rnn.cells import CELLS


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


EACH_CELL = [
    Case("", T=1, B=1, H=1),
    Case("", T=1, B=5, H=17, directions=2),
    Case("", T=7, B=3, H=17, reverse=True),
    Case("", T=4, B=37, H=33, layout="batch_major"),
    Case("", T=6, B=20, H=16, layout="strided"),
    Case("", T=9, B=6, H=33, ragged=True),
    Case("", T=9, B=18, H=17, ragged=True, directions=2),
    Case("", T=3, B=5, H=16, ragged=True, directions=2, reverse=True, layout="batch_major"),
    Case("", T=2, B=1, H=1, ragged=True),
]
CASES = [case._replace(cell=cell) for cell in CELLS for case in EACH_CELL] + [
    Case("rnn_tanh", T=5, B=1, H=64),
    Case("rnn_relu", T=1, B=1, H=1, reverse=True),
    Case("rnn_tanh", T=6, B=20, H=128),
    Case("gru", T=3, B=9, H=64, reverse=True, ragged=True),
    Case("lstm", T=3, B=9, H=64, reverse=True, ragged=True),
    Case("rnn_relu", T=6, B=17, H=128, directions=2, layout="batch_major"),
]


class Problem(NamedTuple):
    """The tensors of a case. Gradients come into all results and are zero in none."""

    x_gates: Tensor  # (T, B, D * G * H)
    state0: tuple[Tensor, ...]  # (D, B, H) each
    weight_hh: Tensor  # (D, G * H, H)
    params: tuple[Tensor, ...]  # (D, H) each
    lengths: Tensor | None  # (B,)
    d_output: Tensor  # (T, B, D * H)
    d_state_n: tuple[Tensor, ...]  # (D, B, H) each

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        def move(x):
            if isinstance(x, tuple):
                return tuple(move(y) for y in x)
            return x if x is None else x.to(device, dtype if x.is_floating_point() else x.dtype)

        return Problem(*(move(x) for x in self))


def problem(case: Case, seed: int = 0) -> Problem:
    """The tensors of a case in float64, the values exact in bfloat16, so that each dtype and the
    oracle start from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    T, B, H, D, cell = case.T, case.B, case.H, case.directions, CELLS[case.cell]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    x_gates, weight_hh = randn(T, B, D * cell.gates * H), randn(D, cell.gates * H, H) / H**0.5
    if case.cell == "rnn_relu":
        # Away from the kink, where rounding would decide between a gradient and none: W_hh h is
        # kept smaller than x_gates.
        x_gates, weight_hh = x_gates + x_gates.sign(), weight_hh / 16
    state0 = [randn(D, B, H) for _ in range(cell.states)]
    if case.cell.startswith("slstm"):
        state0[2] = state0[2].abs() + 1  # h is divided by it
    lengths = None
    if case.ragged:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0], lengths[-1] = 0, T
    return Problem(
        x_gates.bfloat16().double(),
        tuple(state0),
        weight_hh.bfloat16().double(),
        tuple(randn(D, H) for _ in cell.params),
        lengths,
        randn(T, B, D * H),
        tuple(randn(D, B, H) for _ in range(cell.states)),
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


def leaves_of(case: Case, p: Problem) -> list[Tensor]:
    """x_gates, the states, weight_hh and the params, each a leaf that wants a gradient."""
    tensors = [in_layout(p.x_gates, case.layout), *p.state0, p.weight_hh, *p.params]
    return [x.detach().requires_grad_() for x in [tensors[0], *(x.clone() for x in tensors[1:])]]


def split_leaves(case: Case, leaves: list[Tensor]) -> tuple[Tensor, tuple, Tensor, tuple]:
    S = CELLS[case.cell].states
    return leaves[0], tuple(leaves[1 : 1 + S]), leaves[1 + S], tuple(leaves[2 + S :])


def differentiate(p: Problem, output: Tensor, state_n: tuple, leaves: list[Tensor]) -> dict:
    """All results by name; the gradients as users have them: .grad after backward()."""
    torch.autograd.backward([output, *state_n], [p.d_output, *p.d_state_n])
    results = {"output": output.detach()}
    results.update({f"state_n[{k}]": s.detach() for k, s in enumerate(state_n)})
    S, P = len(p.state0), len(p.params)
    names = ["d_x_gates", *(f"d_state0[{k}]" for k in range(S)), "d_weight_hh"]
    names += [f"d_params[{k}]" for k in range(P)]
    return {**results, **{n: x.grad for n, x in zip(names, leaves)}}


def by_equation(case: Case, p: Problem) -> dict[str, Tensor]:
    """The results of the equation, step by step, and its gradients by autograd."""
    leaves = leaves_of(case, p)
    x_gates, state0, weight_hh, params = split_leaves(case, leaves)
    output, state_n = reference.recurrence(
        case.cell, x_gates, state0, weight_hh, params, p.lengths, case.reverse
    )
    return differentiate(p, output, state_n, leaves)


def worst(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where either has one."""
    return float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max())


# Beyond twice the error of torch's own arithmetic in that dtype; tf32 has no twin on a CPU, so
# its floor is the rounding itself: 2^-11 of each factor, over a sum of terms below one.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close_to_float64(
    case: Case, results: dict[str, Tensor], dtype: torch.dtype, floor: float | None = None
) -> None:
    """Each result within twice the error of the equation in this dtype, plus a floor."""
    exact = problem(case)
    expected, in_dtype = by_equation(case, exact), by_equation(case, exact.to(dtype))
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        assert results[name].dtype == dtype
        scale = max(1.0, float(want.abs().max()))
        error = worst(results[name], want)
        bound = 2 * worst(in_dtype[name], want) + (floor or FLOOR[dtype]) * scale
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


def forward(case: Case, p: Problem, leaves: list[Tensor], backend: str) -> tuple[Tensor, tuple]:
    """output and the last states of rnn.recurrence."""
    x_gates, state0, weight_hh, params = split_leaves(case, leaves)
    output, state_n = rnn.recurrence(
        x_gates,
        state0[0] if len(state0) == 1 else state0,
        weight_hh,
        params,
        cell=case.cell,
        lengths=p.lengths,
        reverse=case.reverse,
        backend=backend,
    )
    return output, state_n if len(state0) > 1 else (state_n,)


def run(case: Case, p: Problem, backend: str) -> dict:
    """All results of rnn.recurrence by name."""
    leaves = leaves_of(case, p)
    return differentiate(p, *forward(case, p, leaves, backend), leaves)


def check(case: Case, dtype: torch.dtype, backend: str, device: str, floor=None) -> None:
    results = run(case, problem(case).to(dtype, device), backend)
    assert_close_to_float64(case, results, dtype, floor)
