"""`rnn.check_cell`: whether a cell is right on every backend, and what it costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .cells import Cell, cell_of
from .functional import recurrence
from .kernels.chips import CHIPS
from .kernels.hopper_plan import HopperPlan
from .kernels.limits import Layer, NoPlan
from .kernels.plan import plan


@dataclass(frozen=True)
class CellReport:
    """What `check_cell` found. str() says it in lines."""

    name: str
    gates: int
    states: int
    params: tuple[str, ...]
    kept: int  # numbers that a layer keeps for each (t, b, h): the states, and what a step saves
    derivative: str  # what it was held against
    errors: dict[str, float]  # of each backend: the largest, as a share of what is allowed
    plan: str  # of the kernels on the chip, or why there are none
    clocks: tuple[int, int] | None  # of a step, forward and backward, by the plan's model

    def __str__(self) -> str:
        backends = ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        if self.clocks is None:
            clocks = "none"
        else:
            clocks = "{} forward, {} backward; modelled, not measured".format(*self.clocks)
        return "\n".join(
            [
                f"{self.name}: {self.gates} gate(s), {self.states} state(s), "
                f"params {', '.join(self.params) or 'none'}",
                f"derivative: agrees with {self.derivative}",
                f"errors against float64, as a share of what is allowed: {backends}",
                f"kept for each (t, b, h): {self.kept} numbers, {2 * self.kept} bytes in 16 bits",
                f"plan: {self.plan}",
                f"clocks a step: {clocks}",
            ]
        )


def check_cell(
    cell: str | Cell, *, chip: str = "sm_90", hidden_size: int = 256, batch: int = 16
) -> CellReport:
    """Check a cell on small random layers, and report what it costs.

    Its gradient is held against finite differences in float64; where the step calls detach(), it
    is another one on purpose and only held against autograd. Then every backend that runs here
    (the PyTorch path, and the kernels on a GPU or under TRITON_INTERPRET=1) is held against the
    equation in float64, results and all gradients: at most twice the error of the equation in the
    backend's dtype, plus a floor.

    Args:
        cell: a Cell, or its name.
        chip: a name in rnn.kernels.chips.CHIPS. For it the plan is made and its model is asked for
            clocks; nothing is compiled or measured. `python -m bench.compiled` of a checkout shows
            registers and spills.
        hidden_size, batch: of that plan's layer, bfloat16.

    Raises:
        RuntimeError: the gradient is wrong, or a backend is off by more than is allowed.
        ValueError: unknown cell or chip.

    Example:
        >>> print(rnn.check_cell("gru"))  # doctest: +ELLIPSIS
        gru: 3 gate(s), 1 state(s), params b_hn
        derivative: agrees with finite differences in float64
        ...
    """
    cell = cell_of(cell)
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {sorted(CHIPS)}, got {chip!r}")
    on_purpose = ".detach()" in getattr(cell, "torch_source", "")
    if not on_purpose:
        small = problem(cell, T=2, B=2, H=2)

        def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
            return run(cell, tensors, "torch")

        torch.autograd.gradcheck(layer, small)
    return CellReport(
        cell.name,
        cell.gates,
        cell.states,
        cell.params,
        1 + cell.stored,
        "autograd, for its step calls detach()" if on_purpose else "finite differences in float64",
        {name: share_of_allowed(cell, *how) for name, how in backends().items()},
        *planned(cell, chip, hidden_size, batch),
    )


def planned(
    cell: Cell, chip: str, hidden_size: int, batch: int
) -> tuple[str, tuple[int, int] | None]:
    numbers = cell.gates, cell.states, cell.stored, len(cell.params)
    layer = Layer(*numbers, hidden_size, batch, 1, torch.bfloat16, tf32=True)
    found = plan(layer, CHIPS[chip].limits())
    if isinstance(found, NoPlan):
        return str(found), None
    if isinstance(found, HopperPlan):
        return str(found), (found.forward.clocks, found.backward.clocks)
    return str(found), (found.clocks, found.clocks)


def backends() -> dict[str, tuple[str, torch.dtype, str]]:
    """What runs here: name -> backend, dtype, device."""
    found = {f"torch in {name_of(d)}": ("torch", d, "cpu") for d in (torch.float64, torch.float32)}
    if dispatch.kernels is not None and torch.cuda.is_available():
        for d in (torch.float32, torch.bfloat16):
            found[f"triton in {name_of(d)}"] = "triton", d, "cuda"
    elif dispatch.kernels is not None and dispatch.kernels.INTERPRETED:
        found["triton in float32, interpreted"] = "triton", torch.float32, "cpu"
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(cell: Cell, T: int, B: int, H: int) -> list[Tensor]:
    """x_gates, the states, W_hh and the params of a layer of two directions; numbers that float32
    has too, and states away from 0, since a cell may divide by one."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    G, S, P = cell.gates, cell.states, len(cell.params)
    shapes = [(T, B, 2 * G * H), *[(2, B, H)] * S, (2, G * H, H), *[(2, H)] * P]
    drawn = [torch.randn(shape, generator=generator, device="cpu").double() for shape in shapes]
    for k in range(1, 1 + S):
        drawn[k] = drawn[k].abs() + 0.5
    return [x.requires_grad_() for x in drawn]


def run(cell: Cell, tensors: Any, backend: str) -> tuple[Tensor, ...]:
    """The results of a layer on the tensors of `problem`; row b has T - b steps."""
    S = cell.states
    x_gates, state0, (weight_hh, *params) = tensors[0], tensors[1 : 1 + S], tensors[1 + S :]
    lengths = x_gates.size(0) - torch.arange(x_gates.size(1), device=x_gates.device)
    if backend == "equation":
        output, state_n = reference.recurrence(
            cell.name, x_gates, tuple(state0), weight_hh, tuple(params), lengths
        )
        return output, *state_n
    output, last = recurrence(
        x_gates,
        tuple(state0) if S > 1 else state0[0],
        weight_hh,
        tuple(params),
        cell=cell,
        lengths=lengths,
        backend=backend,  # type: ignore[arg-type]
    )
    return output, *(last if S > 1 else (last,))


def results(cell: Cell, backend: str, dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Results and gradients of a layer, in float64 on the CPU."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in problem(cell, T=5, B=4, H=17)]
    outputs = run(cell, leaves, backend)
    generator = torch.Generator(device="cpu").manual_seed(1)
    d = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, d)
    return (x.detach().double().cpu() for x in (*outputs, *gradients))


@contextmanager
def without_tf32() -> Iterator[None]:
    """What a kernel computes in float32 is not to be rounded for the matrix unit."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def share_of_allowed(cell: Cell, backend: str, dtype: torch.dtype, device: str) -> float:
    """The largest error of a backend, over what is allowed; raises RuntimeError beyond that."""
    S = cell.states
    names = ["output", *(f"state_n[{k}]" for k in range(S)), "d_x_gates"]
    names += [f"d_state0[{k}]" for k in range(S)]
    names += ["d_weight_hh", *(f"d_{param}" for param in cell.params)]
    exact = results(cell, "equation", torch.float64, "cpu")
    in_dtype = results(cell, "equation", dtype, "cpu")
    floor = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    largest = 0.0
    with without_tf32():
        ours = list(results(cell, backend, dtype, device))
    each = zip(names, exact, in_dtype, ours)
    for name, want, torchs, got in each:
        error = float((got - want).abs().max())
        allowed = 2 * float((torchs - want).abs().max()) + floor * max(1, float(want.abs().max()))
        if not error <= allowed:
            raise RuntimeError(
                f'{name} of {cell.name} on backend="{backend}", {dtype}, differs from float64 by '
                f"{error:.2e}; at most {allowed:.2e} is allowed"
            )
        largest = max(largest, error / allowed)
    return largest
