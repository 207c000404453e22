"""How the kernels of the Hopper engine are launched, and which layers they take. Needs no triton.

Each pass has a configuration of its own, since the two hold the same rows of W_hh in different
tiles. The rules say how many registers of a thread W_hh may take without a spill, and what a step
costs; they were found by compiling the kernels for sm_90 and simulating the machine code, not by
measuring.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .limits import Layer, Limits, Plan

CLUSTERS = (2, 4, 8, 16)  # CTAs
PORTABLE_CLUSTER = 8  # every Hopper chip takes it; whether it takes 16, the launch finds out
EXCHANGE = 380  # clocks of a step that waits for the other CTAs
CLUSTER_BYTES_PER_CLOCK = 32  # that a CTA sends
K_STEP = 16  # clocks of one matrix instruction, which sums over 32 bytes of a row
VECTOR = 16  # bytes of the widest access of one thread
LATENCY = 800  # clocks that device memory may take to answer


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How one of the two kernels is launched."""

    ctas: int  # of a cluster
    block_s: int  # hidden units of a CTA
    num_warps: int
    chunk: int  # forward: columns of a tile of W_hh
    held: int  # tiles of W_hh in shared memory, the last ones; the others are in registers
    ahead: int  # steps: so early is asked for what a step reads; an iteration makes as many
    sram: int  # bytes of a CTA, an upper bound
    clocks: int  # of one step, by the model

    def __str__(self) -> str:
        where = "registers" + (" and shared memory" if self.held else "")
        ctas = "1 CTA" if self.ctas == 1 else f"a cluster of {self.ctas} CTAs"
        return f"the {where} of {ctas}, {self.block_s} units and {self.num_warps} warps each"


@dataclass(frozen=True, kw_only=True)
class HopperPlan(Plan):
    """How the kernels of the Hopper engine are launched."""

    forward: Pass
    backward: Pass

    def grid(self) -> tuple[int, int]:
        """Of clusters."""
        return self.tiles, self.directions

    @property
    def ctas(self) -> int:
        """Of the larger cluster of the two passes."""
        return max(self.forward.ctas, self.backward.ctas)

    def cost_of(self, tiles: int) -> int:
        clusters = tiles * self.directions
        passes = (self.forward, self.backward)
        return sum(waves(clusters, p.ctas, self.limits) * p.clocks for p in passes) // 2

    def __str__(self) -> str:
        return (
            f"Hopper engine: W_hh stays in {self.forward}; backward in {self.backward} "
            f"({self.limits.name}); {self.tiles} batch tile(s) of {self.block_b} rows x "
            f"{self.directions} direction(s) on {self.limits.sms} SMs"
            + (f"; {self.why}" if self.why else "")
        )


def waves(clusters: int, ctas: int, limits: Limits) -> int:
    """How often a step's clocks pass: as many clusters run at once as the SMs have room for."""
    return -(-clusters // (limits.sms // ctas))


@lru_cache(maxsize=1)
def clusters() -> bool:
    """Whether the Triton that is installed, if there is one, has what clusters need."""
    try:
        import triton
    except ModuleNotFoundError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def refusal(layer: Layer, limits: Limits) -> str:
    """Why this engine has no plan, as the end of a sentence; "" if it may have one."""
    if limits.matrix_unit != "wgmma":
        return "is for sm_90"
    if layer.parts > 1:
        return "rounds float32 products to tf32, which is not allowed"
    if layer.across:
        return "has no step that reads all units of a row"
    if layer.packed:
        return "takes no packed rows"
    if layer.regularised:
        return "has no dropout of h, no zoneout and no clipping of its gradient"
    return limits.no_hopper


def offers(layer: Layer, limits: Limits) -> list[HopperPlan]:
    """The best plan of all and, where it takes larger clusters, the best of portable ones."""
    plans = list(plans_of(layer, limits))
    portable = [plan for plan in plans if plan.ctas <= PORTABLE_CLUSTER]
    best = [min(some, key=HopperPlan.cost) for some in (plans, portable) if some]
    return best[:1] if best[:1] == best[1:] else best


def plans_of(layer: Layer, limits: Limits) -> Iterator[HopperPlan]:
    """The best plan for each height of a batch tile and each limit of a cluster's size."""
    for rows in (8, 16):
        forward, backward = passes(layer._replace(batch=0), limits, rows)
        tiles = -(-layer.batch // rows)
        for most in (CLUSTERS[-1], PORTABLE_CLUSTER):
            forward = [how for how in forward if how.ctas <= most]
            backward = [how for how in backward if how.ctas <= most]
            if not forward or not backward:
                break
            f = cheapest(forward, tiles * layer.directions, limits)
            b = cheapest(backward, tiles * layer.directions, limits)
            yield HopperPlan(
                block_b=rows,
                tiles=tiles,
                directions=layer.directions,
                approximate=layer.itemsize == 2 and limits.tanh_approx,
                sram=max(f.sram, b.sram),
                clocks=(f.clocks + b.clocks) // 2,
                limits=limits,
                forward=f,
                backward=b,
            )


@lru_cache(maxsize=1024)
def passes(layer: Layer, limits: Limits, rows: int) -> tuple[list[Pass], list[Pass]]:
    """All forward and all backward passes; of the layer, the batch does not matter."""
    return list(forward_passes(layer, limits, rows)), list(backward_passes(layer, limits, rows))


def cheapest(passes: list[Pass], clusters: int, limits: Limits) -> Pass:
    return min(passes, key=lambda how: waves(clusters, how.ctas, limits) * how.clocks)


def registers(rows: int, columns: int, num_warps: int, itemsize: int) -> int:
    """Of a thread, for a tile of W_hh."""
    return rows * columns * itemsize // (num_warps * 32 * 4)


def is_ragged(layer: Layer) -> bool:
    """Whether a row of H units is no whole number of vectors. Single elements on their way then
    take registers."""
    return layer.hidden_size * layer.itemsize % VECTOR != 0


def most_registers(layer: Layer, num_warps: int, rows: int) -> int:
    """That W_hh may take in the forward pass: a thread has 255, or 128 where there are 16 warps."""
    if num_warps == 16:
        return 64 if rows == 8 and layer.itemsize == 2 and not is_ragged(layer) else 32
    return 64 if is_ragged(layer) or layer.itemsize == 4 else 128


def sizes(layer: Layer, limits: Limits, least: int) -> Iterator[tuple[int, int]]:
    """(CTAs, units of each): every number of CTAs that the units can be dealt out to."""
    whole = 1 << (layer.hidden_size - 1).bit_length()
    yield 1, max(least, whole)
    for ctas in CLUSTERS:
        if whole // ctas >= least and clusters() and ctas <= limits.sms:
            yield ctas, whole // ctas


def forward_passes(layer: Layer, limits: Limits, rows: int) -> Iterator[Pass]:
    H, size = layer.hidden_size, layer.itemsize
    stack = 1 if layer.gates == 1 else 4
    for ctas, block_s in sizes(layer, limits, 64 // stack):
        tall, whole = stack * block_s, ctas * block_s
        num_warps = min(16, tall // 16)
        if ragged_alone(layer, ctas, num_warps):
            continue
        chunk, held = whole, 0
        if registers(tall, whole, num_warps, size) > most_registers(layer, num_warps, rows):
            if num_warps == 16 or rows > 8 or (is_ragged(layer) and num_warps > 4):
                continue
            if size == 4 and H % 128 != 0:
                continue
            # A third stays in registers; of more than three parts there are none for it, nor beside
            # float32.
            chunk = 256 if size == 2 and H <= 768 else whole
            held = max(1, -(-H // chunk) - 1)
        elements = block_s * rows / (32 * num_warps)  # of a thread, of each tile
        k_steps = (whole * size // 32) * (tall // (16 * num_warps))
        clocks = K_STEP * k_steps + (6 if stack == 1 else 35) * elements * num_warps
        clocks += 70 if ctas == 1 else EXCHANGE + whole * rows * size / CLUSTER_BYTES_PER_CLOCK
        ahead = steps_ahead(clocks, ctas, num_warps)
        sram = held * tall * chunk * size
        sram += 2 * whole * rows * size  # h
        sram += ahead * layer.gates * block_s * rows * size + 5 * 1024  # x_gates; on their way
        if sram > limits.sram or (rows > 8 and elements > 8):
            continue
        yield Pass(
            ctas=ctas,
            block_s=block_s,
            num_warps=num_warps,
            chunk=chunk,
            held=held,
            ahead=ahead,
            sram=sram,
            clocks=round(clocks),
        )


def backward_passes(layer: Layer, limits: Limits, rows: int) -> Iterator[Pass]:
    gates, size = layer.gates, layer.itemsize
    for ctas, block_s in sizes(layer, limits, 16):
        if ctas == 1:
            block_s = max(64, block_s)
        whole = ctas * block_s
        if whole < 64:
            continue
        all_warps = whole // 16
        num_warps = min(16, all_warps)
        if ctas > 1:  # no more than hold W_hh: each takes its time
            fewest = registers(whole, gates * block_s, 4, size) / 64 * 4
            num_warps = min(all_warps, next((w for w in (4, 8) if w >= fewest), 8))
        if ragged_alone(layer, ctas, num_warps):
            continue
        taken = registers(whole, gates * block_s, num_warps, size)
        held = 0
        tight = is_ragged(layer) and size == 4 and ctas > 1
        most = 64 if num_warps == 16 or tight else 96
        if taken > most:  # fewer than forward: there are more other tiles
            if ctas < 16 or num_warps != 8 or rows > 8:
                continue
            # One gate's tile lies in shared memory; three, where a cell has more other tiles than
            # an LSTM.
            held = min(gates, 1 if layer.stored + layer.params < 6 else 3)
            if registers(whole, (gates - held) * block_s, num_warps, size) > most:
                continue
        if rows > 8 and (taken > 64 or num_warps == 16):
            continue
        k_steps = gates * (block_s * size // 32) * (whole // (16 * num_warps))
        clocks: float = (
            K_STEP * k_steps + (32 if gates == 1 else 75 if ctas == 1 else 55) * num_warps
        )
        if ctas == 1:
            clocks += 50
        else:
            clocks += EXCHANGE + whole * rows * 4 / CLUSTER_BYTES_PER_CLOCK
        clocks *= 0.5 + rows / 16
        ahead = steps_ahead(clocks, ctas, num_warps)
        sram = held * whole * block_s * size + 2 * gates * block_s * rows * size
        # The states and what is saved, d_output; the parts of the sum.
        sram += ahead * (2 + layer.stored) * block_s * rows * size + 5 * 1024
        sram += 2 * whole * rows * 4 if ctas > 1 else 0
        if sram > limits.sram:
            continue
        yield Pass(
            ctas=ctas,
            block_s=block_s,
            num_warps=num_warps,
            chunk=block_s,
            held=held,
            ahead=ahead,
            sram=sram,
            clocks=round(clocks),
        )


def ragged_alone(layer: Layer, ctas: int, num_warps: int) -> bool:
    """Whether W_hh is cut off within the tiles of one CTA that has no register to spare."""
    return ctas == 1 and num_warps == 16 and layer.gates == 1 and layer.hidden_size % 256 != 0


def steps_ahead(clocks: float, ctas: int, num_warps: int) -> int:
    """Two steps, or four where two pass before device memory answers."""
    return 4 if ctas == 1 and 2 * clocks < LATENCY and num_warps <= 8 else 2
