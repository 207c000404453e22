"""Shape, dtype and device limits -> how the kernels are launched, and why.

There is no autotuning: the same question always has the same answer, and it takes microseconds.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
MIN_BLOCK_H = 16  # tl.dot sums over no fewer than this
MIN_BLOCK_S = 32  # hidden units of a slice: with fewer, most warps have no rows of their own
VECTOR = 16  # bytes of the widest access of one thread
SHARED_BYTES_PER_CLOCK = 128  # of one SM, sm_80 to sm_100 (CUDA programming guide)
L2_BYTES_PER_CLOCK = 64  # into one SM (NVIDIA, A100 white paper)
L2_TRIPS = 3  # of a sliced step: the signal, the wait and the gathering
L2_TRIP = 300  # clocks there and back; assumed, 250 to 330 were published for A100 and H100


class Limits(NamedTuple):
    """What a device offers one program."""

    name: str
    sram: int  # bytes of shared memory that one block may use
    sms: int  # streaming multiprocessors
    cooperative: bool  # blocks of one launch may wait for each other
    tanh_approx: bool  # there is an instruction for tanh
    matrix_unit: str  # "mma" (operands from registers), "wgmma" (sm_90) or "tcgen05" (sm_100)


class NoPlan(NamedTuple):
    """Why the kernels cannot run."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Plan:
    """How both kernels of one layer are launched. str(plan) says it in a line."""

    block_h: int  # hidden units, padded to a power of two
    block_b: int  # batch rows of a tile
    tiles: int  # batch tiles
    tiles_at_once: int  # of one launch: sliced blocks wait for each other, so all must be resident
    slices: int  # blocks that share one W_hh
    chunks: int  # pieces that the sum over hidden units is cut into
    directions: int
    parts: int  # tf32 tiles that one float32 tile of W_hh is split into; 1 for 16-bit dtypes
    approximate: bool  # tanh by the chip's own instruction
    num_warps: int
    num_stages: int
    sram: int  # bytes of a block, an upper bound of what the compiler allocates
    clocks: int  # of one step by the model below: not measured
    limits: Limits

    def grids(self) -> list[tuple[int, tuple[int, int, int]]]:
        """(first batch tile, grid) of each launch. Batch tiles are the first axis: only that one
        reaches beyond 65,535 on CUDA."""
        return [
            (first, (min(self.tiles_at_once, self.tiles - first), self.slices, self.directions))
            for first in range(0, self.tiles, self.tiles_at_once)
        ]

    def __str__(self) -> str:
        launches = len(self.grids())
        return (
            f"W_hh stays in the SRAM of {self.slices} block(s), {self.sram / 1024:.0f} of "
            f"{self.limits.sram / 1024:.0f} KiB each ({self.limits.name}); {self.tiles} batch "
            f"tile(s) x {self.directions} direction(s) on {self.limits.sms} SMs"
            + (f" in {launches} launches" if launches > 1 else "")
            + f"; tile {self.block_h // self.slices} units x {self.block_b} rows, "
            f"{self.num_warps} warps" + (", tf32x3" if self.parts == 2 else "")
        )


def device_limits(device: torch.device) -> Limits | NoPlan:
    """The limits of a CUDA or ROCm device. Not cached: the query takes a microsecond."""
    props = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    if nvidia and props.major < 8:
        return NoPlan(f"{props.name} has compute capability {props.major}.{props.minor}, below 8.0")
    sram = getattr(props, "shared_memory_per_block_optin", props.shared_memory_per_block)
    unit = {9: "wgmma", 10: "tcgen05"}.get(props.major, "mma") if nvidia else "mma"
    # On ROCm nobody has shown that a block may wait for another one's store.
    return Limits(props.name, sram, props.multi_processor_count, nvidia, nvidia, unit)


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
    shape = (gates, hidden_size, batch, directions, dtype, tf32, limits)
    plans = [
        found
        for slices in (1, 2, 4, 8, 16, 32, 64)
        for rows in (16, 32)
        if (found := plan_slices(slices, rows, *shape))
    ]
    if not plans:
        return NoPlan(
            f"W_hh of hidden size {hidden_size} in {name}"
            f"{' (tf32x3)' if parts_of(dtype, tf32) == 2 else ''}, "
            f"padded to {padded(hidden_size)}, in {directions} direction(s), fits the SRAM of no "
            f"number of blocks that {limits.name} holds at once ({limits.sms} of "
            f"{limits.sram / 1024:.0f} KiB)"
            + ("" if limits.cooperative else "; its blocks cannot be made to wait for each other")
        )
    return min(plans, key=lambda p: len(p.grids()) * p.clocks)


def padded(hidden_size: int) -> int:
    return max(MIN_BLOCK_H, 1 << (hidden_size - 1).bit_length())


def parts_of(dtype: torch.dtype, tf32: bool) -> int:
    return 2 if dtype == torch.float32 and not tf32 else 1


def plan_slices(
    slices: int,
    rows: int,
    gates: int,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    tf32: bool,
    limits: Limits,
) -> Plan | None:
    """The plan with this many slices and rows of a batch tile, or None where it does not fit.
    The other arguments are those of `plan`."""
    parts, block_h = parts_of(dtype, tf32), padded(hidden_size)
    block_s = block_h // slices
    if slices > 1 and not (limits.cooperative and block_s >= MIN_BLOCK_S):
        return None
    if slices * directions > limits.sms:
        return None
    itemsize = ITEMSIZE[dtype]
    # wgmma and tcgen05 take 64 rows of W_hh at least; with fewer, they are left to mma.
    mma = limits.matrix_unit == "mma" or block_s < 64
    # Where a row of H units is no whole number of vectors, each element takes a register and an
    # access of its own. With the fragments of W_hh that mma holds, 16 batch rows would not fit,
    # nor would they beside all of a large h, or of h and W_hh in two parts; mma can do with 8.
    ragged = hidden_size * itemsize % VECTOR != 0
    crowded = ragged or (slices > 1 and (parts == 2 or block_h >= 2048))
    if slices > 1 and crowded and block_s > 32:
        return None
    if limits.matrix_unit == "tcgen05" and ragged and block_h >= 256 and not mma:
        return None  # its epilogue leaves no registers for so many single accesses
    # Wider tiles need fewer launches, where blocks wait for each other and so must all be
    # resident; they leave registers enough where wgmma reads a short h from shared memory.
    roomy = limits.matrix_unit == "wgmma" and not mma and itemsize == 2 and block_h <= 512
    if rows > 16 and (slices == 1 or crowded or not roomy):
        return None
    block_b = 8 if crowded and mma else rows
    # mma holds its operands in registers: the sum over units is cut so that they fit. wgmma reads
    # them from shared memory, given 64 rows of W_hh.
    narrow = parts == 2 or limits.matrix_unit == "tcgen05" or (mma and itemsize == 4)
    chunk = 128 if narrow and slices > 1 else 256
    if limits.matrix_unit == "wgmma" and not mma and parts == 1:
        chunk = 1024
    chunk = min(block_h, chunk)
    # As few warps as have the registers: each reads all of h from shared memory. With wgmma four
    # warps take 64 rows of W_hh between them, and more than there are rows would read it twice;
    # with mma one warp takes 32 rows in 16 bits and 16 in 32. tcgen05 serves 4 or 8 warps.
    if slices > 1 or (limits.matrix_unit == "tcgen05" and block_h >= 64):
        num_warps = 8  # sliced, each block holds all of h beside its rows
    elif limits.matrix_unit == "wgmma":
        num_warps = max(4, block_h // (32 if ragged else 16))
    else:
        num_warps = max(4, block_h * itemsize // 64)
    # Beside W_hh lie a chunk of h as an operand, the tiles on their way between register layouts,
    # and barriers.
    weights = gates * block_s * block_h * itemsize
    operand, tile = chunk * rows * itemsize, block_s * rows * itemsize
    sram = parts * (weights + operand + tile) + 1024
    if sram > limits.sram:
        return None
    # A step reads W_hh once from shared memory. Sliced, it waits for L2 and takes in all of h.
    clocks = parts * weights // SHARED_BYTES_PER_CLOCK
    if slices > 1:
        clocks += L2_TRIPS * L2_TRIP + gates * block_h * block_b * itemsize // L2_BYTES_PER_CLOCK
    if slices > 1 and block_s < 64:
        clocks *= 2  # half of the warps have no rows of their own; and wgmma is left for mma
    tiles = -(-batch // block_b)
    return Plan(
        block_h=block_h,
        block_b=block_b,
        tiles=tiles,
        tiles_at_once=tiles if slices == 1 else limits.sms // (slices * directions),
        slices=slices,
        chunks=block_h // chunk,
        directions=directions,
        parts=parts,
        approximate=itemsize == 2 and limits.tanh_approx,
        num_warps=num_warps,
        num_stages=1,  # the one load of the loop is asked for a step ahead by hand
        sram=sram,
        clocks=clocks,
        limits=limits,
    )


class Layer(NamedTuple):
    gates: int
    states: int
    stored: int
    params: int
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    tf32: bool


class KernelUnavailable(RuntimeError):
    """stub"""
