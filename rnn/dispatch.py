"""Which backend runs a layer, and why."""

from typing import Literal

import torch

from .cells import Cell
from .kernels.limits import Layer, Limits, NoPlan, Plan, device_limits
from .kernels.plan import plan

try:
    from .kernels import launch as kernels
    from .kernels.cells import has_tiles
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")

# What the interpreter of Triton (TRITON_INTERPRET=1) is taken for: it has no limits of its own.
INTERPRETER = Limits(
    "Triton's interpreter", 227 * 1024, 132, False, False, "wgmma", "cannot be interpreted"
)

_unavailable: dict[Plan, NoPlan] = {}  # plans whose kernels did not compile here


def tf32_allowed() -> bool:
    """torch's own switch for recurrent networks: by its newer name, where there is one."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is not None:
        return rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def choose(
    backend: str,
    cell: Cell,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
    regularised: bool = False,
) -> Plan | NoPlan:
    """The plan of the fused kernels, or why PyTorch runs the recurrence instead.

    Raises RuntimeError, with the reason, where backend="triton" asks for what cannot run.
    """
    if backend == "torch":
        return NoPlan('backend="torch" was asked for')
    limits = _limits(backend, dtype, device)
    chosen: Plan | NoPlan
    if isinstance(limits, NoPlan):
        chosen = limits
    elif batch == 0:
        chosen = NoPlan("the batch is empty")
    elif not has_tiles(cell):
        chosen = NoPlan(f"the cell {cell.name} has no tiles in kernels/cells.py")
    else:
        numbers = cell.gates, cell.states, cell.stored, len(cell.params)
        sizes = hidden_size, batch, directions
        layer = Layer(*numbers, *sizes, dtype, tf32_allowed(), packed, regularised, cell.across)
        chosen = plan(layer, limits)
    if isinstance(chosen, Plan):
        available = kernels.available(chosen)
        chosen = _unavailable.get(chosen) or _unavailable.get(available) or available
    if backend == "triton" and isinstance(chosen, NoPlan):
        raise RuntimeError(f'backend="triton" cannot run here: {chosen.why}')
    return chosen


def give_up(failed: Plan, why: Exception) -> NoPlan:
    """Remember that the kernels of this plan cannot be had here; from now on PyTorch runs it."""
    _unavailable[failed] = NoPlan(str(why))
    return _unavailable[failed]


def given_up(plan: Plan | NoPlan) -> bool:
    """Whether `choose` returned this plan in place of one whose kernels cannot be had."""
    return any(plan is reason for reason in _unavailable.values())


def _limits(backend: str, dtype: torch.dtype, device: torch.device) -> Limits | NoPlan:
    if kernels is None:
        return NoPlan("triton is not installed")
    if device.type == "cuda":
        return device_limits(device)
    if backend == "triton" and device.type == "cpu" and kernels.INTERPRETED:
        if dtype == torch.bfloat16:
            return NoPlan("Triton's interpreter multiplies bfloat16 wrongly")
        return INTERPRETER
    return NoPlan(f"the tensors are on {device}, not on a GPU")
