"""What plans are made from and what they are: a layer, a device's limits, how kernels are launched.

Both engines plan in these terms: plan.py the portable one, hopper_plan.py the Hopper engine. Needs
no triton.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class KernelUnavailable(RuntimeError):  # noqa: N818
    """A planned kernel that this Triton cannot compile or this device cannot hold."""


class Layer(NamedTuple):
    """What a plan depends on of a layer: numbers, not the cell."""

    gates: int
    states: int
    stored: int
    params: int
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    tf32: bool  # float32 products may be rounded to tf32; other dtypes ignore it
    packed: bool = False  # rows of different length lie packed in memory
    regularised: bool = False  # by dropout of h, zoneout, or clipping of its gradient
    across: bool = False  # a step reads all units of a row: one block must hold them

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def parts(self) -> int:
        """tf32 tiles that a float32 tile of W_hh is split into: products of two parts, three of
        them, give nearly all of float32."""
        return 2 if self.dtype == torch.float32 and not self.tf32 else 1

    @property
    def dtype_name(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} (tf32x3)" if self.parts == 2 else name


class Limits(NamedTuple):
    """What a device offers one program."""

    name: str
    sram: int  # bytes of shared memory that one block may use
    sms: int  # streaming multiprocessors
    cooperative: bool  # blocks of one launch may wait for each other
    tanh_approx: bool  # there is an instruction for tanh
    matrix_unit: str  # "mma" (operands from registers), "wgmma" (sm_90), "tcgen05" (sm_100), "mfma"
    no_hopper: str = ""  # why the Hopper engine cannot be had there, whatever the layer; or ""


class NoPlan(NamedTuple):
    """Why the kernels cannot run."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How both kernels of one layer are launched, of whatever engine. str(plan) says it in a
    line."""

    block_b: int  # batch rows of a tile
    tiles: int  # batch tiles
    directions: int
    approximate: bool  # tanh by the chip's own instruction
    sram: int  # bytes of a block, an upper bound of what the compiler allocates
    clocks: int  # of one step of a block by the engine's model: not measured
    limits: Limits
    why: str = field(default="", compare=False)  # this engine and not the other
    # What takes over where a kernel turns out not to compile or not to start.
    otherwise: "Plan | None" = field(default=None, compare=False)

    def cost(self) -> int:
        """Clocks of a step of all batch tiles."""
        return self.cost_of(self.tiles)

    def cost_of(self, tiles: int) -> int:
        """Clocks of a step of so many batch tiles, one launch or wave of blocks after the other."""
        raise NotImplementedError


def device_limits(device: torch.device) -> Limits | NoPlan:
    """The limits of a CUDA or ROCm device. Not cached: the query takes a microsecond."""
    props = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    if nvidia and props.major < 8:
        return NoPlan(f"{props.name} has compute capability {props.major}.{props.minor}, below 8.0")
    sram = getattr(props, "shared_memory_per_block_optin", props.shared_memory_per_block)
    unit = {9: "wgmma", 10: "tcgen05"}.get(props.major, "mma") if nvidia else "mfma"
    # On ROCm nobody has shown that a block may wait for another one's store.
    return Limits(props.name, sram, props.multi_processor_count, nvidia, nvidia, unit)
