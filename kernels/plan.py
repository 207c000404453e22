"""Shape, dtype and device limits -> how the kernels are launched, and why.

There is no autotuning: the same question always has the same answer, and it takes microseconds.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
MIN_BLOCK_H = 16  # tl.dot sums over no fewer than this
VECTOR = 16  # bytes of the widest access of one thread


class Limits(NamedTuple):
    """What a device offers one program."""

    name: str
    sram: int  # bytes of shared memory that one block may use
    sms: int  # streaming multiprocessors
    matrix_unit: str  # "mma" (operands from registers), "wgmma" (sm_90) or "tcgen05" (sm_100)


class NoPlan(NamedTuple):
    """Why the kernels cannot run."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Plan:
    """How both kernels of one layer are launched. str(plan) says it in a line."""

    block_h: int  # hidden units of a tile: H padded to a power of two
    block_b: int  # batch rows of a tile
    tiles: int  # batch tiles
    slices: int  # blocks that share one W_hh
    directions: int
    parts: int  # tf32 tiles that one float32 tile of W_hh is split into; 1 for 16-bit dtypes
    num_warps: int
    num_stages: int
    sram: int  # bytes, an upper bound of what the compiler allocates
    limits: Limits

    @property
    def grid(self) -> tuple[int, int, int]:
        # Batch tiles come first: only the first axis of a CUDA grid reaches beyond 65,535.
        return self.tiles, self.slices, self.directions

    def __str__(self) -> str:
        return (
            f"W_hh stays in the SRAM of one block, {self.sram / 1024:.0f} of "
            f"{self.limits.sram / 1024:.0f} KiB ({self.limits.name}); {self.tiles} batch tile(s) x "
            f"{self.directions} direction(s) on {self.limits.sms} SMs; tile {self.block_h} units x "
            f"{self.block_b} rows, {self.num_warps} warps" + (", tf32x3" if self.parts == 2 else "")
        )


def device_limits(device: torch.device) -> Limits | NoPlan:
    """The limits of a CUDA or ROCm device. Not cached: the query takes a microsecond."""
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and props.major < 8:
        return NoPlan(f"{props.name} has compute capability {props.major}.{props.minor}, below 8.0")
    sram = getattr(props, "shared_memory_per_block_optin", props.shared_memory_per_block)
    unit = (
        {9: "wgmma", 10: "tcgen05"}.get(props.major, "mma") if torch.version.hip is None else "mma"
    )
    return Limits(props.name, sram, props.multi_processor_count, unit)


@lru_cache(maxsize=4096)
def plan(
    gates: int,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    tf32: bool,
    limits: Limits,
) -> Plan | NoPlan:
    """Plan the launch of one layer, or say which limit stands in the way.

    tf32 allows float32 products to be rounded to tf32 (10 bits of mantissa); without it they are
    made of three tf32 products, which gives nearly all of float32. 16-bit dtypes ignore it.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        known = ", ".join(str(d).removeprefix("torch.") for d in ITEMSIZE)
        return NoPlan(f"the kernels take {known}, got {name}")
    itemsize = ITEMSIZE[dtype]
    parts = 2 if dtype == torch.float32 and not tf32 else 1
    block_h = max(MIN_BLOCK_H, 1 << (hidden_size - 1).bit_length())
    weights = gates * block_h * block_h * itemsize
    tile = block_h * 16 * itemsize
    # Where a row of H units is no whole number of vectors, each element takes a register and an
    # access of its own; with the fragments of W_hh that mma holds, 16 rows would not fit.
    ragged = hidden_size * itemsize % VECTOR != 0
    block_b = 8 if ragged and limits.matrix_unit == "mma" else 16
    # One vector for each thread and step, as far as the warps go; two parts of W_hh need the
    # registers of twice as many threads as there could then be, and tcgen05 serves 4 or 8 warps.
    num_warps = min(max(tile // (32 * VECTOR), 4), 16 // parts)
    if limits.matrix_unit == "tcgen05" and block_h >= 64:
        num_warps = 8
    # Beside W_hh lie h as an operand, the tiles on their way between register layouts, barriers.
    sram = parts * (weights + 2 * tile) + 1024
    if sram > limits.sram:
        return NoPlan(
            f"hidden size {hidden_size} needs {sram / 1024:.0f} KiB of SRAM in one block for W_hh, "
            f"padded to {block_h} in {name}{' (tf32x3)' if parts == 2 else ''}, and {limits.name} "
            f"has {limits.sram / 1024:.0f}"
        )
    return Plan(
        block_h=block_h,
        block_b=block_b,
        tiles=-(-batch // block_b),
        slices=1,
        directions=directions,
        parts=parts,
        num_warps=num_warps,
        num_stages=1,  # the one load of the loop is asked for a step ahead by hand
        sram=sram,
        limits=limits,
    )
