"""Shape, dtype and device limits -> how the kernels are launched, and why.

Both engines offer plans, and the one that takes the fewest clocks by their models is taken. There
is no autotuning: the same question always has the same answer, and it takes microseconds: what
does not depend on the batch is worked out once.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from . import hopper_plan
from .limits import ITEMSIZE, Layer, Limits, NoPlan, Plan

MIN_BLOCK = 16  # tl.dot sums over no fewer than this
WARP_REGISTERS = 32 * 256 * 4  # bytes
VECTOR = 16  # bytes of the widest access of one thread
SHARED_BYTES_PER_CLOCK = 128  # of one SM, sm_80 to sm_100 (CUDA programming guide)
L2_BYTES_PER_CLOCK = 64  # into one SM (NVIDIA, A100 white paper)
L2_TRIPS = 3  # of a sliced step: the signal, the wait and the gathering
L2_TRIP = 300  # clocks there and back; assumed, 250 to 330 were published for A100 and H100
FENCE = 500  # clocks until a block's stores are seen by the others; assumed
SIGNAL = 16  # clocks from one block's signal to the next at one address of L2; assumed


@dataclass(frozen=True, kw_only=True)
class PortablePlan(Plan):
    """How the portable kernels are launched."""

    block_s: int  # hidden units of a block: all, padded to a power of two, or a slice of them
    num_warps: int
    slices: int  # blocks that share one W_hh
    chunk: int  # units that one product sums over
    parts: int  # tf32 tiles that one float32 tile of W_hh is split into; 1 for 16-bit dtypes
    stacked: bool  # four gates of W_hh lie one below the other in one tile, in the forward pass
    pieces: int  # of a product, each the sum of a warp of its own; 1: warps have rows of their own
    pieces_backward: int
    steps: int  # of time, of one iteration of the forward loop
    steps_backward: int
    direct: bool  # what a step reads and writes does not change its layout on the way
    num_stages: int

    def chunks(self, columns: int) -> int:
        """Products that make up a sum over so many units."""
        return -(-columns // self.chunk)

    def tiles_of_a_wave(self) -> int:
        """Batch tiles for which the chip has room at once."""
        return self.limits.sms // (self.slices * self.directions)

    def grids(self) -> list[tuple[int, tuple[int, int, int]]]:
        """(first batch tile, grid) of each launch. Batch tiles are the first axis: only that one
        reaches beyond 65,535 on CUDA."""
        # Sliced blocks wait for each other, so all of a launch must be resident.
        at_once = self.tiles_of_a_wave() if self.slices > 1 else self.tiles
        return [
            (first, (min(at_once, self.tiles - first), self.slices, self.directions))
            for first in range(0, self.tiles, at_once)
        ]

    def cost_of(self, tiles: int) -> int:
        return -(-tiles // self.tiles_of_a_wave()) * self.clocks

    def __str__(self) -> str:
        launches = len(self.grids())
        return (
            f"W_hh stays in the SRAM of {self.slices} block(s), {self.sram / 1024:.0f} of "
            f"{self.limits.sram / 1024:.0f} KiB each ({self.limits.name}); {self.tiles} batch "
            f"tile(s) x {self.directions} direction(s) on {self.limits.sms} SMs"
            + (f" in {launches} launches" if launches > 1 else "")
            + f"; tile {self.block_s} units x {self.block_b} rows, "
            f"{self.num_warps} warps"
            + (", tf32x3" if self.parts == 2 else "")
            + "; portable engine"
            + (f": {self.why}" if self.why else "")
        )


def padded(units: int) -> int:
    return max(MIN_BLOCK, 1 << (units - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(layer: Layer, limits: Limits) -> Plan | NoPlan:
    """Plan the launches of one layer, or say which limit stands in the way."""
    if layer.dtype not in ITEMSIZE:
        known = ", ".join(str(d).removeprefix("torch.") for d in ITEMSIZE)
        return NoPlan(f"the kernels take {known}, got {layer.dtype_name}")
    portable = cheapest(plans_of(layer._replace(batch=1), limits), layer.batch)
    refusal = hopper_plan.refusal(layer, limits)
    offers = [] if refusal else hopper_plan.offers(layer, limits)
    if not offers and portable is None:
        weights = f"W_hh of {layer.gates} gate(s) and hidden size {layer.hidden_size} in"
        if layer.across:
            return NoPlan(
                "a step that normalises over all units needs one block that holds all of W_hh; "
                f"{weights} {layer.dtype_name} is too large for one of {limits.name} "
                f"({limits.sram / 1024:.0f} KiB, and its registers)"
            )
        return NoPlan(
            f"{weights} {layer.dtype_name}, in {layer.directions} direction(s), "
            "fits the SRAM of no number "
            f"of blocks that {limits.name} holds at once ({limits.sms} of "
            f"{limits.sram / 1024:.0f} KiB)"
            + ("" if limits.cooperative else "; its blocks cannot be made to wait for each other")
        )
    if not offers:
        assert portable is not None
        why = f"the Hopper engine {refusal or 'has no room for W_hh'}"
        return replace(portable, why=why if limits.matrix_unit == "wgmma" else "")
    # Each plan is followed by what takes over from it, ever dearer; the portable engine is last.
    chosen: Plan | None = None
    if portable is not None:
        cost = f"{portable.cost()} clocks a step by the model"
        chosen = replace(portable, why=f"{cost}; the Hopper engine {offers[0].cost()} clocks")
    for hopper in reversed(offers):
        if portable is None:
            why = "W_hh does not fit the portable engine"
        elif hopper.cost() <= portable.cost():
            why = f"{hopper.cost()} clocks a step by the model, not measured"
            why += f"; the portable engine {portable.cost()}"
        else:
            continue
        chosen = replace(hopper, why=why, otherwise=chosen)
    assert chosen is not None
    return chosen


def cheapest(plans: list[PortablePlan], batch: int) -> PortablePlan | None:
    """The best of plans for one batch tile, with as many tiles as the batch has."""
    best = min(plans, key=lambda plan: plan.cost_of(-(-batch // plan.block_b)), default=None)
    return None if best is None else replace(best, tiles=-(-batch // best.block_b))


@lru_cache(maxsize=1024)
def plans_of(layer: Layer, limits: Limits) -> list[PortablePlan]:
    """Every plan that fits: slices of each power of two up to all units, or all units alone, tiles
    of each height. Of one batch tile, so that a new batch finds them ready."""
    plans = []
    block_s = padded(layer.hidden_size)
    least = block_s if layer.across else MIN_BLOCK
    while block_s >= least:
        for rows in (8, 16, 32):
            found = plan_slices(layer, limits, block_s, rows)
            if found is not None:
                plans.append(found)
        block_s //= 2
    return plans


def plan_slices(layer: Layer, limits: Limits, block_s: int, rows: int) -> PortablePlan | None:
    """The plan with slices of this many hidden units and this many rows of a batch tile, or None
    where it does not fit."""
    H, gates, itemsize = layer.hidden_size, layer.gates, layer.itemsize
    slices = -(-H // block_s)
    sliced = slices > 1
    if (sliced and not limits.cooperative) or slices * layer.directions > limits.sms:
        return None
    unit = limits.matrix_unit
    # Where a row of H units is no whole number of vectors, each element takes a register and an
    # access of its own.
    ragged = H * itemsize % VECTOR != 0
    # Four gates that lie one below the other make one tall product of four low ones, so that each
    # warp has rows of W_hh of its own. Of three, a quarter would be empty: only where each product
    # would be too low for more than one warp. tcgen05 leaves too few registers for it, and so
    # do sums over many units in two parts.
    short = unit == "tcgen05" or (layer.parts == 2 and H > 256)
    stacked = sliced and not short and block_s <= {3: 16, 4: 64}.get(gates, 0)
    tall = block_s * (4 if stacked else 1)
    # wgmma and tcgen05 take 64 rows of W_hh at least; with fewer, they are left to mma.
    mma = unit in ("mma", "mfma") or tall < 64
    # With the fragments of W_hh that mma holds, 16 ragged batch rows would not fit in registers,
    # nor would they beside all of a large h, or of h and W_hh in two parts; mma can do with 8.
    crowded = ragged or (sliced and (layer.parts == 2 or H > 1024))
    # mma and wgmma spread a product over a warp so that single accesses still fill whole sectors.
    # Slices meet in memory anyway; tcgen05 and mfma are untried.
    # Higher tiles do not leave the registers for it.
    single = unit in ("mma", "wgmma")
    # A step that normalises needs registers of its own. In float32, beside masks, and where many
    # elements take one each, only tiles that go by way of shared memory leave them.
    many = ragged and block_s > (32 if layer.packed else 64)
    crowded_step = layer.across and (itemsize == 4 or layer.regularised or many)
    direct = single and not sliced and rows == 8 and not crowded_step
    refusals = (
        rows < 16 and (unit == "mfma" or (unit == "tcgen05" and not mma)),
        rows < 16
        and padded(H) < 128
        and layer.parts == 1
        and not (direct or (layer.across and single) or (crowded and mma)),
        # Wider tiles need fewer launches, where blocks wait for each other and so must all be
        # resident; they leave registers enough where wgmma reads a short h from shared memory.
        rows > 16 and not (sliced and unit == "wgmma" and not mma and gates == 1),
        rows > 16 and (crowded or itemsize == 4 or H > 512),
        rows > 8 and crowded and mma and unit != "mfma",
        sliced and crowded and block_s > 32,
        sliced and gates == 4 and block_s > (32 if unit == "wgmma" else 64),
        # Beyond, a pass has too few registers.
        sliced and gates > 1 and H > (1152 if layer.parts == 1 else 480),
        # Three products for each of several gates, beside all tiles of a step: too many registers.
        direct and unit == "mma" and layer.parts == 2 and gates > 1 and block_s > 32,
        layer.across
        and ((single and rows > 8) or spills_to_normalise(layer, unit, block_s, ragged)),
        # tcgen05's epilogue leaves no registers for so many single accesses.
        unit == "tcgen05" and ragged and block_s > 128 and not mma,
    )
    num_warps = warps(layer, unit, block_s, sliced, stacked, ragged)
    # The backward pass gathers all gates of all units, and there are other tiles to be held.
    gathered = gates * H * rows * itemsize if sliced else 0
    if any(refusals) or gathered > num_warps * WARP_REGISTERS / 2:
        return None
    # mma holds its operands in registers: the sum over units is cut so that they fit. wgmma reads
    # them from shared memory, given 64 rows of W_hh.
    narrow = layer.parts == 2 or unit == "tcgen05" or (mma and itemsize == 4)
    chunk = padded(H)
    if sliced:
        wide = unit == "wgmma" and not mma and layer.parts == 1 and gates == 1
        chunk = min(chunk, 1024 if wide else 128 if narrow else 256)
    chunks = -(-H // chunk)
    # mma gives a warp 16 rows of W_hh. Warps that would have none sum over units of their own. In
    # the backward pass the gates are summed over and never stacked.
    enough = min(16 * num_warps, 64 if unit == "wgmma" else 16 * num_warps)
    pieces = [
        min(num_warps, chunk // MIN_BLOCK) if sliced and height < enough else 1
        for height in (tall, block_s)
    ]
    steps = steps_of_iteration(layer, unit, num_warps, block_s, ragged) if direct else (1, 1)
    # Beside W_hh lie the operand that it is multiplied with, tiles on their way between register
    # layouts, and barriers.
    weights = block_s * chunks * chunk * itemsize * layer.parts
    operand = chunk * rows * itemsize * layer.parts * (1 if sliced else gates)
    scratch = (max(tall, *(p * block_s for p in pieces)) * 4 + block_s * itemsize) * rows
    sram = weights * (4 if stacked else gates) + operand + scratch + 1024
    if sram > limits.sram:
        return None
    return PortablePlan(
        block_s=block_s,
        block_b=rows,
        tiles=-(-layer.batch // rows),
        slices=slices,
        chunk=chunk,
        directions=layer.directions,
        parts=layer.parts,
        stacked=stacked,
        pieces=pieces[0],
        pieces_backward=pieces[1],
        steps=steps[0],
        steps_backward=steps[1],
        direct=direct,
        approximate=itemsize == 2 and limits.tanh_approx,
        num_warps=num_warps,
        num_stages=1,  # the loads of the loop are asked for a step ahead by hand
        sram=sram,
        clocks=clocks(layer, weights, block_s, rows, tall, num_warps, pieces, steps, direct),
        limits=limits,
    )


def spills_to_normalise(layer: Layer, unit: str, block_s: int, ragged: bool) -> bool:
    """Whether a step that reads all units of a row has no registers beside its tiles."""
    more = layer.packed or layer.regularised  # offsets, masks
    return (
        (unit == "mma" and layer.gates == 4 and block_s > 64)
        or (unit == "wgmma" and ragged and block_s > 64)
        or (unit == "wgmma" and layer.parts == 2 and block_s > 32)
        or (more and layer.gates * block_s * layer.itemsize > 768)
    )


def warps(layer: Layer, unit: str, block_s: int, sliced: bool, stacked: bool, ragged: bool) -> int:
    """As few warps as have the registers: each reads all of h from shared memory. With wgmma four
    warps take 64 rows of W_hh between them, and more than there are rows would read it twice; with
    mma one warp takes 32 rows in 16 bits and 16 in 32. tcgen05 serves 4 or 8 warps."""
    several = min(layer.gates, 2)  # with more than one gate there are more tiles to be held
    if sliced:  # each block holds all of h beside its rows
        if stacked:
            return 8 if block_s > 16 else 4
        return 4 if unit == "wgmma" and layer.gates > 1 and block_s == 64 else 8
    if unit == "tcgen05" and block_s >= 64:
        return 8
    if unit == "wgmma":
        units = 16 if not ragged else 32 if layer.gates == 1 else 8  # of a warp
        masked = layer.regularised and layer.parts == 2  # masks take registers too
        # So do, of four gates in float32, a step that normalises and products in two parts.
        if masked or (layer.gates == layer.itemsize == 4 and (layer.across or layer.parts == 2)):
            units = 4 if masked and layer.across else 8
        return min(16, max(4, block_s // units))
    if layer.across and layer.gates == 4 and (layer.packed or layer.regularised):
        several = 4  # offsets or masks beside all that such a step holds
    return min(16, max(4, block_s * layer.itemsize * several // 64))


def steps_of_iteration(
    layer: Layer, unit: str, num_warps: int, block_s: int, ragged: bool
) -> tuple[int, int]:
    """Steps of time that share one read of W_hh, forward and backward. mma takes W_hh from
    registers: read there from shared memory at the beginning of an iteration, it serves every step
    of it, as long as the registers last; beyond four there is little left to win."""
    weights = layer.gates * block_s**2 * layer.itemsize * layer.parts // (128 * num_warps)
    if unit != "mma":  # wgmma reads W_hh from shared memory each time
        return 1, 1
    if layer.regularised:  # masks take registers too
        return (2, 2) if weights < 128 and layer.itemsize == 2 else (1, 1)
    spare = 128 if num_warps < 16 else 64  # registers of a thread; 16 warps have half of them
    if weights < spare and (layer.gates < 4 or layer.itemsize == 2):
        few = layer.stored + layer.params < 7  # tiles that a step backward holds beside W_hh
        return 4, 4 if few else 1
    if layer.gates == layer.states == 1:
        return 4, 2 if ragged else 4
    return 2, 1


def clocks(
    layer: Layer,
    weights: int,
    block_s: int,
    rows: int,
    tall: int,
    num_warps: int,
    pieces: list[int],
    steps: tuple[int, int],
    direct: bool,
) -> int:
    """Clocks of one step, the mean of both passes; a model, not measured. For one block of sm_80 or
    sm_90 it is within a quarter of what simulated machine code took, and for slices below it."""
    # W_hh is read once from shared memory, for all steps of an iteration; again by each group of
    # warps beyond its rows.
    reads = [
        max(1.0, 16 * num_warps / (height * p)) / s
        for height, p, s in zip((tall, block_s), pieces, steps)
    ]
    step = layer.gates * weights * sum(reads) / 2 / SHARED_BYTES_PER_CLOCK
    # Each tile that comes or goes, unless direct, changes its layout by way of shared memory,
    # between barriers.
    tiles = layer.gates + layer.stored + 1
    step += 300 + tiles * ((60 if direct else 80) + 0.07 * block_s * rows)
    if layer.hidden_size > block_s:
        gathered = layer.hidden_size * rows * layer.itemsize * (1 + layer.gates) / 2
        step += L2_TRIPS * L2_TRIP + FENCE + gathered / L2_BYTES_PER_CLOCK
        step += SIGNAL * layer.hidden_size / block_s
    return round(step)
