"""The kernels alone, through their launchers: all results of a case, fenced."""

import dataclasses

import torch
import triton
from cases import Case, Problem, in_layout

from rnn.cells import CELLS
from rnn.kernels import launch
from rnn.kernels.layout import Inputs
from rnn.kernels.limits import Layer, Limits, Plan, device_limits
from rnn.kernels.plan import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = Limits("interpreter", 227 * 1024, 132, False, False, "wgmma", "not here")
GUARD = 64  # elements
# What exp needs, and what no chip does: the reason, or "".
FMA_ROUNDS_TWICE = (
    "tl.fma rounds twice in the interpreter of Triton before 3.9"
    if launch.INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    else ""
)


class Fences:
    """Tensors with NaN on both sides: what is read of it shows in a result, what is written to it
    is found by check()."""

    def __init__(self):
        self.buffers = []

    def around(self, x):
        if x is None or not x.is_floating_point():
            return x
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        buffer = torch.full((extent + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
        inside = buffer.as_strided(x.shape, x.stride(), GUARD)
        inside.copy_(x)
        self.buffers.append((buffer, GUARD, GUARD + extent))
        return inside

    def check(self):
        for buffer, start, end in self.buffers:
            assert buffer[:start].isnan().all() and buffer[end:].isnan().all()


def planned(case: Case, dtype: torch.dtype, tf32: bool = False) -> Plan:
    cell = CELLS[case.cell]
    numbers = cell.gates, cell.states, cell.stored, len(cell.params)
    limits = INTERPRETER if DEVICE == "cpu" else device_limits(torch.device(DEVICE))
    found = plan(Layer(*numbers, case.H, case.B, case.directions, dtype, tf32), limits)
    assert isinstance(found, Plan), str(found)
    return found


def pack(x, lengths):
    """(T, B, F) -> the rows that are active, (N, F)."""
    return x[torch.arange(x.size(0), device=x.device)[:, None] < lengths]


def unpack(x, lengths, T):
    active = torch.arange(T, device=x.device)[:, None] < lengths
    padded = x.new_zeros(T, lengths.numel(), x.size(-1))
    padded[active] = x
    return padded


def weight_gradient(case: Case, p: Problem, output, d_h_gates):
    """By its equation, one step and row at a time; 16-bit products are summed in float32, as a
    matrix product does it."""
    wide = torch.promote_types(p.weight_hh.dtype, torch.float32)
    output, d_h_gates, state0 = (x.to(wide) for x in (output, d_h_gates, p.state0[0]))
    d_weight_hh = torch.zeros_like(p.weight_hh, dtype=wide)
    for d in range(case.directions):
        h = output.chunk(case.directions, -1)[d]
        d_gates = d_h_gates.chunk(case.directions, -1)[d]
        back = case.reverse != bool(d)
        for t in range(case.T):
            before = t + 1 if back else t - 1
            for b in range(case.B):
                end = case.T if p.lengths is None else int(p.lengths[b])
                if t < end:
                    start = before < 0 or before >= end
                    h_prev = state0[d, b] if start else h[before, b]
                    d_weight_hh[d] += torch.outer(d_gates[t, b], h_prev)
    return d_weight_hh.to(p.weight_hh.dtype)


def run(
    case: Case, p: Problem, how: Plan, packed: bool = False, relay=lambda x: x, **regularisers
) -> dict[str, torch.Tensor]:
    """All results of both launchers by name, as by_equation gives them. `relay` is what happens
    between the passes to a tensor that the backward pass reads."""
    cell, fences = CELLS[case.cell], Fences()
    if "keep" in regularisers:
        cell = dataclasses.replace(cell, saved=cell.saved + cell.states)
    x_gates, d_output, offsets = in_layout(p.x_gates, case.layout), p.d_output, None
    if packed:
        x_gates, d_output = pack(x_gates, p.lengths), pack(d_output, p.lengths)
        active = (torch.arange(case.T, device=x_gates.device)[:, None] < p.lengths).sum(1)
        offsets = active.cumsum(0) - active
    inputs = Inputs(
        fences.around(x_gates),
        tuple(fences.around(s) for s in p.state0),
        fences.around(p.weight_hh),
        tuple(fences.around(x) for x in p.params),
        p.lengths,
        offsets,
        case.reverse,
        **regularisers,
    )
    output, state_n, stored = launch.forward(how, cell, inputs, save=True)
    assert (stored is None) == (cell.stored == 0)
    d_x_gates, d_h_gates, d_state0, d_params = launch.backward(
        how,
        cell,
        inputs._replace(x_gates=None),
        relay(fences.around(output)),
        None if stored is None else relay(fences.around(stored)),
        fences.around(d_output),
        tuple(fences.around(d) for d in p.d_state_n),
        True,
        True,
        True,
    )
    fences.check()
    assert (d_x_gates is d_h_gates) == (not cell.split)
    if packed:
        output, d_x_gates, d_h_gates = (
            unpack(x, p.lengths, case.T) for x in (output, d_x_gates, d_h_gates)
        )
    results = {"output": output}
    results |= {f"state_n[{k}]": s for k, s in enumerate(state_n)}
    results["d_x_gates"] = d_x_gates
    results |= {f"d_state0[{k}]": s for k, s in enumerate(d_state0)}
    results["d_weight_hh"] = weight_gradient(case, p, output, d_h_gates)
    results |= {f"d_params[{k}]": x for k, x in enumerate(d_params)}
    return results


def run_forward(case: Case, p: Problem) -> torch.Tensor:
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    return launch.forward(planned(case, p.x_gates.dtype), CELLS[case.cell], inputs, False)[0]


def sorted_lengths(p: Problem) -> Problem:
    return p._replace(lengths=p.lengths.sort(descending=True)[0])


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
