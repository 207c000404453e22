"""Where the tiles of the Hopper engine lie: which thread of which CTA has which element.

In a cluster every tile spans all CTAs: CTA r holds the units from r * BLOCK_S on.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLinearLayout
from triton.runtime.jit import constexpr_function


@constexpr_function
def powers(first, end):
    """first, 2 * first, ... below end."""
    found = []
    while first < end:
        found.append(first)
        first *= 2
    return found


@constexpr_function
def spread(step, CTAS):
    """Bases that spread a tensor over the CTAs: what CTA r holds begins at r * step."""
    return [[x * power for x in step] for power in powers(1, CTAS)]


@constexpr_function
def accumulator_layout(BLOCK_B, WARPS, BITS, CTAS):
    return gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[WARPS, 1],
        instr_shape=[16, BLOCK_B, 256 // BITS],
        cga_layout=spread([1, 0], CTAS),
    )


@constexpr_function
def units_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows), as a product leaves them. Of one gate, a warp has 16 units and a thread two
    neighbouring ones, which it stores as one piece. Of four stacked gates, a warp has 4 units and a
    thread one."""
    per_warp = 4 if STACKED else 16
    registers = [] if STACKED else [[1, 0], [0, 1]]
    registers += [[0, row] for row in powers(8, BLOCK_B)]
    registers += [[unit, 0] for unit in powers(per_warp * WARPS, BLOCK_S)]
    if STACKED:
        lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [0, 1]]
    else:
        lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    warps = [[unit, 0] for unit in powers(per_warp, per_warp * WARPS)]
    blocks = spread([BLOCK_S, 0], CTAS)
    return DistributedLinearLayout(registers, lanes, warps, blocks, [CTAS * BLOCK_S, BLOCK_B])


@constexpr_function
def gates_layout(BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows, 2, 2): the stacked units_layout, with the four gates of a place in one
    thread."""
    of = units_layout(True, BLOCK_S, BLOCK_B, WARPS, CTAS)
    bases = [
        [basis + [0, 0] for basis in level]
        for level in (of.reg_bases, of.lane_bases, of.warp_bases, of.block_bases)
    ]
    bases[0] = [[0, 0, 0, 1], [0, 0, 1, 0]] + bases[0]
    return DistributedLinearLayout(*bases, of.shape + [2, 2])


@constexpr_function
def even_layout(BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows): over as many threads as there are, two neighbouring units in each."""
    rest = [[unit, 0] for unit in powers(2, min(16, BLOCK_S))]
    rest += [[0, row] for row in powers(1, BLOCK_B)]
    rest += [[unit, 0] for unit in powers(16, BLOCK_S)]
    lanes, rest = rest[:5], rest[5:]
    count = len(powers(1, WARPS))
    warps, rest = (rest + [[0, 0]] * count)[:count], rest[count:]
    blocks = spread([BLOCK_S, 0], CTAS)
    shape = [CTAS * BLOCK_S, BLOCK_B]
    return DistributedLinearLayout([[1, 0]] + rest, lanes, warps, blocks, shape)


@constexpr_function
def copies_layout(BLOCK_S, BLOCK_B, WARPS, BITS, CTAS):
    """Of (rows, units), for copies from device memory: each thread has one piece of a row, of 4 to
    16 bytes."""
    vector = max(32 // BITS, min(128 // BITS, BLOCK_S * BLOCK_B // (32 * WARPS)))
    across = BLOCK_S // vector  # threads
    lanes = min(32, across)
    warps = min(WARPS, across // lanes)
    return gl.BlockedLayout(
        [1, vector],
        [32 // lanes, lanes],
        [WARPS // warps, warps],
        [1, 0],
        cga_layout=spread([0, 1], CTAS),
    )


@constexpr_function
def slot_layout(BITS, CTAS):
    """Of what copies_layout copies; swizzled, since it is read unit by unit."""
    return gl.SwizzledSharedLayout(128 // BITS, 1, 8, [1, 0], cga_layout=spread([0, 1], CTAS))


@constexpr_function
def operand_layout(COLUMNS, BITS, STEP, CTAS):
    """Of a tile in shared memory that the matrix unit reads; each row lies in one piece."""
    swizzle = min(128, COLUMNS * BITS // 8)
    return gl.NVMMASharedLayout(
        swizzle_byte_width=swizzle,
        element_bitwidth=BITS,
        rank=len(STEP),
        cga_layout=spread(STEP, CTAS),
    )
