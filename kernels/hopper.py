"""The Hopper engine: the two loops of recurrence.py in Gluon, with W_hh in registers.

(docstring to come)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLinearLayout
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    async_store,
    cluster,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.runtime.jit import constexpr_function

from .products import round_tf32
from .steps import (
    add,
    at_step,
    load_params,
    store_tiles,
    to_float32,
    where_active,
    zero_where_not,
)

# Triton 3.9 has renamed it.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

RUNTIME = [
    "T", "B", "reverse",
    "x_gates_stride_t", "x_gates_stride_b", "output_stride_t", "output_stride_b",
    "stored_stride_t", "stored_stride_b",
]  # fmt: skip
RUNTIME_BACKWARD = ["d_output_stride_t", "d_output_stride_b"]


# ------------------------------------------------------------------------------- where tiles lie


@constexpr_function
def powers(first, end):
    """first, 2 * first, ... below end."""
    found = []
    while first < end:
        found.append(first)
        first *= 2
    return found


@constexpr_function
def spread(basis, CTAS):
    """Bases that spread a tensor over the CTAs: CTA r holds what begins at r * basis."""
    return [[x * step for x in basis] for step in powers(1, CTAS)]


@constexpr_function
def accumulator_layout(BLOCK_B, WARPS, BITS, CTAS):
    cga = spread([1, 0], CTAS)
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_B, 256 // BITS], cga)


@constexpr_function
def linear(registers, lanes, warps, CTAS, first, shape):
    """A layout from its bases; those beyond the lanes' or the shape's number are left out or 0."""
    lanes = (lanes + [[0] * len(shape)] * 5)[:5]
    return DistributedLinearLayout(registers, lanes, warps, spread(first, CTAS), shape)


@constexpr_function
def units_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows), as the products leave them. Not stacked, a warp has 16 units, a thread two
    neighbouring ones, which it stores as one piece. Stacked, a warp has 4 units, a thread one."""
    per_warp = 4 if STACKED else 16
    registers = [] if STACKED else [[1, 0], [0, 1]]
    registers += [[0, row] for row in powers(8, BLOCK_B)]
    registers += [[unit, 0] for unit in powers(per_warp * WARPS, BLOCK_S)]
    if STACKED:
        lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [0, 1]]
    else:
        lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    warps = [[unit if unit < BLOCK_S else 0, 0] for unit in powers(per_warp, per_warp * WARPS)]
    return linear(registers, lanes, warps, CTAS, [BLOCK_S, 0], [CTAS * BLOCK_S, BLOCK_B])


@constexpr_function
def even_layout(BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows), over as many threads as there are, neighbouring pairs of units in one."""
    registers, lanes, warps = [[1, 0]], [], []
    rest = [[unit, 0] for unit in powers(2, min(16, BLOCK_S))]
    rest += [[0, row] for row in powers(1, BLOCK_B)]
    rest += [[unit, 0] for unit in powers(16, BLOCK_S)]
    lanes, rest = rest[:5], rest[5:]
    count = len(powers(1, WARPS))
    warps, rest = (rest + [[0, 0]] * count)[:count], rest[count:]
    return linear(registers + rest, lanes, warps, CTAS, [BLOCK_S, 0], [CTAS * BLOCK_S, BLOCK_B])


@constexpr_function
def gates_layout(BLOCK_S, BLOCK_B, WARPS, CTAS):
    """Of (units, rows, 2, 2): stacked units_layout with the four gates of a place in one thread."""
    of = units_layout(True, BLOCK_S, BLOCK_B, WARPS, CTAS)
    wide = lambda bases: [basis + [0, 0] for basis in bases]
    return DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 1, 0]] + wide(of.reg_bases), wide(of.lane_bases),
        wide(of.warp_bases), wide(of.block_bases), of.shape + [2, 2],
    )  # fmt: skip


@constexpr_function
def copies_layout(BLOCK_S, BLOCK_B, WARPS, BITS, CTAS):
    """Of (rows, units), for copies from device memory: each thread has one piece of a row, of 4 to
    16 bytes."""
    vector = max(32 // BITS, min(128 // BITS, BLOCK_S * BLOCK_B // (32 * WARPS)))
    across = BLOCK_S // vector  # threads
    lanes = min(32, across)
    warps = min(WARPS, across // lanes)
    return gl.BlockedLayout(
        [1, vector], [32 // lanes, lanes], [WARPS // warps, warps], [1, 0], spread([0, 1], CTAS)
    )


@gluon.jit
def place_in(
    LAYOUT: gl.constexpr, UNITS: gl.constexpr, SIZE: gl.constexpr, BLOCK_B: gl.constexpr
):
    """The batch rows and the units of a tile; the dimension of the units is UNITS."""
    units = gl.arange(0, SIZE, gl.SliceLayout(1 - UNITS, LAYOUT))
    rows = gl.program_id(0) * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(UNITS, LAYOUT))
    return gl.expand_dims(rows.to(gl.int64), UNITS), gl.expand_dims(units, 1 - UNITS)


@gluon.jit
def unit_of(row):
    """The unit that a row of the matrix product stands for. The accumulator gives a thread the rows
    r and r + 8 of 16; these two are neighbouring units."""
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@gluon.jit
def in_units(product, UNITS: gl.constexpr):
    """Rows of the product -> units, in the layout UNITS: the registers get other names, no more."""
    M: gl.constexpr = product.shape[0]
    N: gl.constexpr = product.shape[1]
    tile = product.reshape([M // 16, 2, 8, N]).permute((0, 2, 1, 3)).reshape([M, N])
    return gl.convert_layout(tile, UNITS, assert_trivial=True)


@gluon.jit
def in_gates(product, GATES4: gl.constexpr, UNITS: gl.constexpr):
    """Stacked rows of the product, 4 gates of 4 units in 16, -> a tile in the layout UNITS for each
    gate. Two lanes exchange halves of their batch rows, so that each has all gates of the rest."""
    M: gl.constexpr = product.shape[0]
    N: gl.constexpr = product.shape[1]
    tile = product.reshape([M // 16, 2, 2, 4, N]).permute((0, 3, 4, 1, 2))
    tile = gl.convert_layout(tile.reshape([M // 4, N, 2, 2]), GATES4)
    even, odd = gl.split(tile)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, UNITS, assert_trivial=True),
        gl.convert_layout(second, UNITS, assert_trivial=True),
        gl.convert_layout(third, UNITS, assert_trivial=True),
        gl.convert_layout(fourth, UNITS, assert_trivial=True),
    )


# -------------------------------------------------------------------- device memory, steps ahead


@gluon.jit
def walk(ptrs, stride, UNIT: gl.constexpr, T, backwards):
    """Where the first step lies, and how far it is to the next, in UNIT elements."""
    stride = stride.to(gl.int64)
    return ptrs + backwards * (T - 1) * stride * UNIT, stride - 2 * backwards * stride


@gluon.jit
def advance(ptrs, strides, UNIT: gl.constexpr):
    """The next step's pointers. The compiler must not know how far apart they are: it would keep
    one set of pointers for each step of a round of the loop, in registers that W_hh needs."""
    moved = ()
    for i in gl.static_range(len(ptrs)):
        stride = gl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [strides[i]], dtype=gl.int64, is_pure=False, pack=1
        )
        moved += (ptrs[i] + stride * UNIT,)
    return moved


@gluon.jit
def allocate_slots(
    dtype: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr,
    COUNT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """AHEAD slots of COUNT tiles (rows, units) in shared memory, each an allocation of its own, so
    that the compiler sees that they do not overlap."""
    VECTOR: gl.constexpr = 128 // dtype.primitive_bitwidth
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, 8, [1, 0], spread([0, 1], CTAS))
    slots = ()
    for k in gl.static_range(AHEAD):
        tiles = ()
        for i in gl.static_range(COUNT):
            tiles += (gl.allocate_shared_memory(dtype, [BLOCK_B, CTAS * BLOCK_S], SHARED),)
        slots += (tiles,)
    return slots


@gluon.jit
def ask(tile, ptrs, mask, ALIGNED: gl.constexpr):
    """Have a tile copied from device to shared memory, 0 where masked, while the program goes on."""
    if ALIGNED:
        async_load(tile, ptrs, mask=mask)
    else:  # pieces of two bytes cannot be copied that way
        tile.store(gl.load(ptrs, mask=mask, other=0.0))


@gluon.jit
def take(tiles, FIRST: gl.constexpr, COUNT: gl.constexpr, PAIRS: gl.constexpr):
    taken = ()
    for i in gl.static_range(FIRST, FIRST + COUNT):
        taken += (tiles[i].permute((1, 0)).load(PAIRS),)
    return taken


# ---------------------------------------------------------------------------------- the products


@gluon.jit
def hold(tile, ROWS: gl.constexpr, CTAS: gl.constexpr):
    """A tile of W_hh in shared memory instead of registers."""
    BITS: gl.constexpr = tile.dtype.primitive_bitwidth
    COLUMNS: gl.constexpr = tile.shape[1]
    BYTES: gl.constexpr = min(128, COLUMNS * BITS // 8)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 2, False, False, spread([1, 0], CTAS))
    held = gl.allocate_shared_memory(tile.dtype, [ROWS, COLUMNS], SHARED)
    held.store(tile)
    return held


@gluon.jit
def load_weights_forward(
    weight_ptr, H: gl.constexpr, BLOCK_S: gl.constexpr, CTAS: gl.constexpr, GATES: gl.constexpr,
    CHUNK: gl.constexpr, HELD: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The rows of W_hh of the CTA's units, one gate or four stacked, in tiles of CHUNK columns: the
    last HELD of them in shared memory, the others in registers."""
    BITS: gl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 32 // BITS)
    ROWS: gl.constexpr = CTAS * BLOCK_S * (1 if GATES == 1 else 4)
    CHUNKS: gl.constexpr = (H + CHUNK - 1) // CHUNK
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OPERAND))[:, None]
    if GATES == 1:
        row_ptrs = weight_ptr + unit_of(row) * H
        row_mask = unit_of(row) < H
    else:
        units = row // 16 * 4 + row % 4
        gate = row // 4 % 4
        row_ptrs = weight_ptr + (gate * H + units) * H
        row_mask = (units < H) & (gate < GATES)
    held = ()
    for c in gl.static_range(CHUNKS - HELD, CHUNKS):
        columns = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, OPERAND))[None, :]
        tile = gl.load(row_ptrs + columns, mask=row_mask & (columns < H), other=0.0)
        held += (hold(tile, ROWS, CTAS),)
    tiles = ()
    for c in gl.static_range(CHUNKS - HELD):
        columns = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, OPERAND))[None, :]
        tiles += (gl.load(row_ptrs + columns, mask=row_mask & (columns < H), other=0.0),)
    return tiles + held


@gluon.jit
def load_weights_backward(
    weight_ptr, H: gl.constexpr, BLOCK_S: gl.constexpr, CTAS: gl.constexpr, GATES: gl.constexpr,
    HELD: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The same rows transposed, a tile for each gate: (all units, the CTA's units). The last HELD
    of them in shared memory, the others in registers."""
    BITS: gl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 32 // BITS)
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    row = gl.arange(0, CTAS * WHOLE, gl.SliceLayout(1, OPERAND))[:, None]
    h_units = unit_of(row % WHOLE)
    units = row // WHOLE * BLOCK_S + gl.arange(0, BLOCK_S, gl.SliceLayout(0, OPERAND))[None, :]
    mask = (h_units < H) & (units < H)
    held = ()
    for gate in gl.static_range(GATES - HELD, GATES):
        tile = gl.load(weight_ptr + (gate * H + units) * H + h_units, mask=mask, other=0.0)
        held += (hold(tile, CTAS * WHOLE, CTAS),)
    tiles = ()
    for gate in gl.static_range(GATES - HELD):
        ptrs = weight_ptr + (gate * H + units) * H + h_units
        tiles += (gl.load(ptrs, mask=mask, other=0.0),)
    return tiles + held


@gluon.jit
def allocate_operands(
    dtype: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """Shared memory for COUNT tiles (units, rows) of the CTA's own units, each row of the batch in
    one piece: to be written by all CTAs as one tile, and as each CTA's products read it."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    BYTES: gl.constexpr = min(128, BLOCK_S * BITS // 8)
    SPLIT: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 2, False, False, spread([0, 1], CTAS))
    OWN: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 2, False, False, spread([0, 0], CTAS))
    written = ()
    read = ()
    for i in gl.static_range(COUNT):
        tile = gl.allocate_shared_memory(dtype, [BLOCK_B, CTAS * BLOCK_S], SPLIT)
        written += (tile.permute((1, 0)),)
        read += (tile.reinterpret(dtype, [1, BLOCK_B, BLOCK_S], OWN),)
    return written, read


@gluon.jit
def as_operand(tile, dtype: gl.constexpr):
    """Rounded to what the matrix unit takes: of float32, tf32."""
    if dtype == gl.float32:
        return round_tf32(tile.to(gl.float32))
    else:
        return tile.to(dtype)


@gluon.jit
def put(operands, tiles):
    """Hand tiles to the matrix unit, which reads shared memory by another way than stores go: the
    fence, and the barrier that the compiler puts behind the wait_group that follows, make them
    visible to it."""
    for i in gl.static_range(len(operands)):
        operands[i].store(as_operand(tiles[i], operands[i].dtype))
    fence_async_shared()


@gluon.jit
def unknown_zero():
    """0, which the compiler cannot know: so that it does not keep, over the loop, a register for
    the address of every piece of an operand, in registers that W_hh needs."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def read_of(tiles):
    """The tiles (1, rows, units) as operands (units, rows)."""
    operands = ()
    for i in gl.static_range(len(tiles)):
        operands += (tiles[i].index(unknown_zero()).permute((1, 0)),)
    return operands


@gluon.jit
def start_sum(weights, operands, zero):
    """The sum of each W with its operand."""
    product = warpgroup_mma(weights[0], operands[0], zero, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(weights)):
        product = warpgroup_mma(weights[i], operands[i], product, is_async=True)
    return product


# -------------------------------------------------------------------------------------- clusters


@constexpr_function
def everyone_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, BITS, CTAS):
    """Of (copies, rows, units): each CTA's units in as many copies as there are CTAs. A thread has
    8 bytes or 16 in a row of the batch. Lanes that would have nothing have other copies."""
    per_warp = 4 if STACKED else 16
    vector = min(128 // BITS, per_warp)
    registers = [[0, 0, unit] for unit in powers(1, vector)]
    registers += [[0, row, 0] for row in powers(8, BLOCK_B)]
    registers += [[0, 0, unit] for unit in powers(per_warp * WARPS, BLOCK_S)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0]] + [[0, 0, unit] for unit in powers(vector, per_warp)]
    copies = [[copy, 0, 0] for copy in powers(1, CTAS)]
    free = 5 - len(lanes)
    warps = [[0, 0, unit if unit < BLOCK_S else 0] for unit in powers(per_warp, per_warp * WARPS)]
    return linear(
        registers + copies[free:], lanes + copies[:free], warps, CTAS, [0, 0, BLOCK_S],
        [CTAS, BLOCK_B, CTAS * BLOCK_S],
    )  # fmt: skip


@gluon.jit
def allocate_whole(
    dtype: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr
):
    """Shared memory for all units of h in each CTA, seen in two ways: as the copies that all CTAs
    write to, and as the copy that the CTA itself reads."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    BYTES: gl.constexpr = min(128, WHOLE * BITS // 8)
    SPLIT: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 3, False, False, spread([1, 0, 0], CTAS))
    OWN: gl.constexpr = gl.NVMMASharedLayout(BYTES, BITS, 2, False, False, spread([0, 0], CTAS))
    copies = gl.allocate_shared_memory(dtype, [CTAS, BLOCK_B, WHOLE], SPLIT)
    return copies, (copies.reinterpret(dtype, [1, BLOCK_B, WHOLE], OWN),)


@gluon.jit
def cut(operand, COUNT: gl.constexpr, CHUNK: gl.constexpr):
    """COUNT pieces of the operand (units, rows), CHUNK units each."""
    pieces = ()
    for c in gl.static_range(COUNT):
        if operand.shape[0] == CHUNK:
            pieces += (operand,)
        else:
            pieces += (operand.slice(c * CHUNK, CHUNK),)
    return pieces


@gluon.jit
def send_to_all(copies, h, arrived, EVERYONE: gl.constexpr):
    """Each CTA's units of h (units, rows) to every CTA, whose mbarrier counts the bytes."""
    tile = as_operand(h, copies.dtype).permute((1, 0))
    tile = gl.expand_dims(gl.convert_layout(tile, gl.SliceLayout(0, EVERYONE)), 0)
    async_store(copies, tile.broadcast_to(copies.shape), arrived)


@constexpr_function
def parts_bases(bases, BLOCK_S):
    """Bases of (units, rows) -> those of (to, from, 16s of units, 8, rows // 2, rows % 2, 2)."""
    return [
        [unit // BLOCK_S, 0, unit % BLOCK_S // 16, unit % 16 // 2, row // 2, row % 2, unit % 2]
        for unit, row in bases
    ]


@constexpr_function
def parts_layout(UNITS, BLOCK_S, BLOCK_B, CTAS):
    """Of the parts of a sum that a CTA received: those of a place in the thread that has it in the
    layout UNITS."""
    return DistributedLinearLayout(
        parts_bases(UNITS.reg_bases, BLOCK_S) + [[0, i, 0, 0, 0, 0, 0] for i in powers(1, CTAS)],
        parts_bases(UNITS.lane_bases, BLOCK_S),
        parts_bases(UNITS.warp_bases, BLOCK_S),
        parts_bases(UNITS.block_bases, BLOCK_S),
        [CTAS, CTAS, BLOCK_S // 16, 8, BLOCK_B // 2, 2, 2],
    )


@gluon.jit
def allocate_parts(BLOCK_S: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr):
    """Shared memory for what all CTAs add to the units of each."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(
        1, 1, 1, [6, 5, 4, 3, 2, 1, 0], spread([1, 0, 0, 0, 0, 0, 0], CTAS)
    )
    shape: gl.constexpr = [CTAS, CTAS, BLOCK_S // 16, 8, BLOCK_B // 2, 2, 2]
    return gl.allocate_shared_memory(gl.float32, shape, SHARED)


@gluon.jit
def send_parts(parts, product, arrived):
    """Each CTA's product (from x all units, rows) to the CTAs that own the units."""
    CTAS: gl.constexpr = parts.shape[0]
    BLOCKS: gl.constexpr = parts.shape[2]
    PAIRS: gl.constexpr = parts.shape[4]
    tile = product.reshape([CTAS, CTAS, BLOCKS, 2, 8, PAIRS, 2]).permute((1, 0, 2, 4, 5, 6, 3))
    async_store(parts, tile, arrived)


@gluon.jit
def sum_of_parts(parts, PARTS: gl.constexpr, UNITS: gl.constexpr):
    """The sum over the CTAs that sent, always in the same order: (units, rows)."""
    tile = gl.sum(parts.load(PARTS), 1).permute((0, 1, 2, 5, 3, 4))
    CTAS: gl.constexpr = parts.shape[0]
    tile = tile.reshape([CTAS * parts.shape[2] * 16, parts.shape[4] * 2])
    return gl.convert_layout(tile, UNITS, assert_trivial=True)


@gluon.jit
def allocate_arrivals(CTAS: gl.constexpr):
    """Two mbarriers in each CTA, one for each buffer that others write to; all CTAs of the cluster
    have started when this returns."""
    arrived = mbarrier.allocate_mbarrier(batch=2)
    for k in gl.static_range(2):
        mbarrier.init(arrived.index(k), count=1)
    cluster.barrier()
    return arrived


# --------------------------------------------------------------------------------------- forward


@gluon.jit
def ask_x_gates(i, T, ptrs, mask, tiles, H: gl.constexpr, ALIGNED: gl.constexpr):
    """x_gates of the i-th step, if there is one."""
    for gate in gl.static_range(len(tiles)):
        ask(tiles[gate], ptrs + gate * H, mask & (i < T), ALIGNED)
    async_copy.commit_group()


@gluon.jit
def pass_on(i, h, buffers, arrived, EVERYONE: gl.constexpr):
    """Hand h to the products of the i-th step: of this CTA, or of all CTAs of the cluster."""
    if arrived is None:
        put(buffers, (h,))
    else:
        mbarrier.expect(arrived, buffers[0].nbytes_per_cta)
        send_to_all(buffers[0], h, arrived, EVERYONE)


@gluon.jit
def await_all(i, arrived):
    """Until all units of the i-th h that was passed on are here."""
    if arrived is not None:
        mbarrier.wait(arrived, i // 2 & 1)


@gluon.jit
def forward_step(
    i, h_gates, state, x_gates, ptrs, free, coming, buffers, operands, arrived, weights, params, T,
    backwards, reads, writes, zero, H: gl.constexpr, STEP: gl.constexpr, READS_H: gl.constexpr,
    APPROXIMATE: gl.constexpr, UNIT: gl.constexpr, ALIGNED: gl.constexpr, AHEAD: gl.constexpr,
    UNITS: gl.constexpr, GATES4: gl.constexpr, EVERYONE: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    copy_mask, strides = reads
    mask, lengths = writes
    dtype: gl.constexpr = operands[0].dtype
    after, saved = STEP(to_float32(x_gates), h_gates, to_float32(state), params, APPROXIMATE)
    output = after[0].to(dtype)
    if READS_H:
        state_after = (after[0],)
    else:
        state_after = (output,)
    beside_h = ()
    for s in gl.static_range(1, len(state)):
        beside_h += (after[s],)
    state_after += beside_h
    if len(lengths) == 0:
        state = state_after
    else:  # an inactive row keeps its state and outputs zero
        active = at_step(i, T, backwards) < lengths[0]
        state = where_active(active, state_after, state)
        output = gl.where(active, output, 0.0)
    pass_on(i + 1, state[0], buffers, arrived, EVERYONE)
    async_copy.wait_group(AHEAD - 2)  # x_gates of the next step are there
    if arrived is not None:  # while h is on its way, the rest
        gl.store(ptrs[1], output, mask=mask)
        if len(ptrs) > 2:
            store_tiles(ptrs[2], beside_h + saved, mask, H)
    await_all(i + 1, arrived)
    product = start_sum(weights, cut(read_of(operands)[0], len(weights), CHUNK), zero)
    # While the matrix unit works, the rest: nothing below has to do with the next step's h_gates.
    if arrived is None:
        gl.store(ptrs[1], output, mask=mask)
        if len(ptrs) > 2:
            store_tiles(ptrs[2], beside_h + saved, mask, H)
    ask_x_gates(i + AHEAD, T, ptrs[0], copy_mask, free, H, ALIGNED)
    ptrs = advance(ptrs, strides, UNIT)
    x_gates = take(coming, 0, len(coming), UNITS)
    h_gates = gates_of(product, UNITS, GATES4)
    return h_gates, state, x_gates, ptrs


@gluon.jit
def gates_of(product, UNITS: gl.constexpr, GATES4: gl.constexpr):
    product = warpgroup_mma_wait(0, deps=[product])
    if GATES4 is None:
        return (in_units(product, UNITS),)
    else:
        return in_gates(product, GATES4, UNITS)


@gluon.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    x_gates_ptr,  # (T, B, D * GATES * H), last dimension contiguous
    state0_ptrs,  # S tensors (D, B, H), contiguous
    weight_hh_ptr,  # (D, GATES * H, H), contiguous
    param_ptrs,  # the cell's params, each (D, H), contiguous
    lengths_ptr,  # (B,) or None; row b is active while t < lengths[b]
    output_ptr,  # as x_gates, D * H wide
    stored_ptr,  # as x_gates, D * K * H wide: the states beside h, then what STEP saves; or None
    state_n_ptrs,  # S tensors (D, B, H), contiguous
    T,  # at least 1
    B,
    reverse,  # 1: direction 0 walks from t = T - 1 down to 0, and direction 1 upwards
    x_gates_stride_t,  # every stride is in units of UNIT elements
    x_gates_stride_b,
    output_stride_t,
    output_stride_b,
    stored_stride_t,
    stored_stride_b,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_B: gl.constexpr,
    GATES: gl.constexpr,
    STORED: gl.constexpr,
    STEP: gl.constexpr,
    READS_H: gl.constexpr,  # STEP reads h itself: it is carried in float32 too
    APPROXIMATE: gl.constexpr,
    UNIT: gl.constexpr,
    AHEAD: gl.constexpr,  # steps, an even number: so early x_gates is asked for
    CTAS: gl.constexpr,
    CHUNK: gl.constexpr,  # columns of a tile of W_hh
    HELD: gl.constexpr,  # tiles of W_hh in shared memory
):
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = output_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    STACK: gl.constexpr = 1 if GATES == 1 else 4
    MMA: gl.constexpr = accumulator_layout(BLOCK_B, WARPS, BITS, CTAS)
    UNITS: gl.constexpr = units_layout(STACK == 4, BLOCK_S, BLOCK_B, WARPS, CTAS)
    GATES4: gl.constexpr = gates_layout(BLOCK_S, BLOCK_B, WARPS, CTAS) if STACK == 4 else None
    EVERYONE: gl.constexpr = everyone_layout(STACK == 4, BLOCK_S, BLOCK_B, WARPS, BITS, CTAS)
    COPIES: gl.constexpr = copies_layout(BLOCK_S, BLOCK_B, WARPS, BITS, CTAS)
    ALIGNED: gl.constexpr = H * BITS % 32 == 0 and UNIT * BITS % 32 == 0
    direction = gl.program_id(1)
    backwards = direction ^ reverse
    copy_rows, copy_units = place_in(COPIES, 1, WHOLE, BLOCK_B)
    copy_mask = (copy_rows < B) & (copy_units < H)
    rows, units = place_in(UNITS, 0, WHOLE, BLOCK_B)
    mask = (rows < B) & (units < H)
    x_gates_offsets = direction * GATES * H + copy_rows * x_gates_stride_b * UNIT + copy_units
    x_gates_ptrs, stride = walk(x_gates_ptr + x_gates_offsets, x_gates_stride_t, UNIT, T, backwards)
    ptrs, strides = (x_gates_ptrs,), (stride,)
    output_offsets = direction * H + rows * output_stride_b * UNIT + units
    output_ptrs, stride = walk(output_ptr + output_offsets, output_stride_t, UNIT, T, backwards)
    ptrs += (output_ptrs,)
    strides += (stride,)
    if stored_ptr is not None:
        stored_offsets = direction * STORED * H + rows * stored_stride_b * UNIT + units
        stored_ptrs, stride = walk(stored_ptr + stored_offsets, stored_stride_t, UNIT, T, backwards)
        ptrs += (stored_ptrs,)
        strides += (stride,)
    state_rows = (direction * B + rows) * H + units
    lengths = ()
    if lengths_ptr is not None:
        lengths = (gl.load(lengths_ptr + rows, mask=rows < B, other=0),)
    reads = (copy_mask, strides)
    writes = (mask, lengths)

    slots = allocate_slots(dtype, BLOCK_S, BLOCK_B, CTAS, GATES, AHEAD)
    for k in gl.static_range(AHEAD):
        ask_x_gates(k, T, x_gates_ptrs + k * UNIT * strides[0], copy_mask, slots[k], H, ALIGNED)
    ptrs = (ptrs[0] + AHEAD * UNIT * strides[0],) + ptrs[1:]
    # W_hh is read here, once, and stays in registers; the loop never touches its pointer.
    weights = load_weights_forward(
        weight_hh_ptr + direction * GATES * H * H, H, BLOCK_S, CTAS, GATES, CHUNK, HELD, MMA
    )
    params = load_params(param_ptrs, direction * H + units, units < H)
    state = ()
    for s in gl.static_range(len(state0_ptrs)):
        loaded = gl.load(state0_ptrs[s] + state_rows, mask=mask, other=0.0)
        if s > 0 or READS_H:
            loaded = loaded.to(gl.float32)
        state += (loaded,)
    if CTAS == 1:
        even, even_operands = allocate_operands(dtype, BLOCK_S, BLOCK_B, 1, 1)
        odd, odd_operands = allocate_operands(dtype, BLOCK_S, BLOCK_B, 1, 1)
        buffers = (even, odd)
        operands = (even_operands, odd_operands)
        arrived = (None, None)
    else:
        even, even_operand = allocate_whole(dtype, BLOCK_S, BLOCK_B, CTAS)
        odd, odd_operand = allocate_whole(dtype, BLOCK_S, BLOCK_B, CTAS)
        buffers = ((even,), (odd,))
        operands = (even_operand, odd_operand)
        arrivals = allocate_arrivals(CTAS)
        arrived = (arrivals.index(0), arrivals.index(1))
    zero = gl.zeros([CTAS * STACK * BLOCK_S, BLOCK_B], gl.float32, MMA)
    pass_on(0, state[0], buffers[0], arrived[0], EVERYONE)
    async_copy.wait_group(AHEAD - 1)
    await_all(0, arrived[0])
    product = start_sum(weights, cut(read_of(operands[0])[0], len(weights), CHUNK), zero)
    x_gates = take(slots[0], 0, GATES, UNITS)
    h_gates = gates_of(product, UNITS, GATES4)
    rest = T % AHEAD
    for i in range(0, T - rest, AHEAD):
        for k in gl.static_range(AHEAD):
            h_gates, state, x_gates, ptrs = forward_step(
                i + k, h_gates, state, x_gates, ptrs, slots[k], slots[(k + 1) % AHEAD],
                buffers[(k + 1) % 2], operands[(k + 1) % 2], arrived[(k + 1) % 2], weights, params,
                T, backwards, reads, writes, zero, H, STEP, READS_H, APPROXIMATE, UNIT, ALIGNED,
                AHEAD, UNITS, GATES4, EVERYONE, CHUNK,
            )  # fmt: skip
    for k in gl.static_range(AHEAD - 1):
        if k < rest:
            h_gates, state, x_gates, ptrs = forward_step(
                T - rest + k, h_gates, state, x_gates, ptrs, slots[k], slots[(k + 1) % AHEAD],
                buffers[(k + 1) % 2], operands[(k + 1) % 2], arrived[(k + 1) % 2], weights, params,
                T, backwards, reads, writes, zero, H, STEP, READS_H, APPROXIMATE, UNIT, ALIGNED,
                AHEAD, UNITS, GATES4, EVERYONE, CHUNK,
            )  # fmt: skip
    async_copy.wait_group(0)
    for s in gl.static_range(len(state)):
        gl.store(state_n_ptrs[s] + state_rows, state[s].to(dtype), mask=mask)


# -------------------------------------------------------------------------------------- backward


@gluon.jit
def ask_step(
    i, T, ptrs, mask, tiles, H: gl.constexpr, STATES: gl.constexpr, READ: gl.constexpr,
    RECALLS: gl.constexpr, SAVED: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """What the i-th step of the backward loop reads, in this order: the states after it or, where
    it RECALLS them, before it; what it saved; d_output. The states' pointers are those of the step
    that they come out of."""
    states_mask = mask & (i + RECALLS < T)
    mask = mask & (i < T)
    for r in gl.static_range(len(READ)):
        ask(tiles[r], ptrs[r], states_mask, ALIGNED)
    for s in gl.static_range(SAVED):
        ask(tiles[len(READ) + s], ptrs[len(READ)] + (STATES - 1 + s) * H, mask, ALIGNED)
    if len(tiles) > len(READ) + SAVED:
        ask(tiles[len(READ) + SAVED], ptrs[len(ptrs) - 1], mask, ALIGNED)
    async_copy.commit_group()


@gluon.jit
def take_states(i, T, backwards, tiles, state0, lengths, UNITS: gl.constexpr):
    """The states before the i-th step: those before the first, of rows that it is the first of."""
    begun = gl.full(state0[0].shape, 0, gl.int32, UNITS) + i + 1 < T
    if len(lengths) > 0:
        begun = begun & (at_step(i + 1, T, backwards) < lengths[0])
    return where_active(begun, take(tiles, 0, len(state0), UNITS), state0)


@constexpr_function
def index_in(items, item):
    found = [i for i in range(len(items)) if items[i] == item]
    return found[0] if found else None


@gluon.jit
def backward_step(
    i, d_state, d_params, state, read, taken, read_ptrs, write_ptrs, free, coming, buffers, operands,
    parts, arrived, state0, weights, params, T, backwards, reads, writes, zero, H: gl.constexpr,
    READ: gl.constexpr, RECALLS: gl.constexpr, SAVED: gl.constexpr, STEP_VJP: gl.constexpr,
    APPROXIMATE: gl.constexpr, UNIT: gl.constexpr, ALIGNED: gl.constexpr, AHEAD: gl.constexpr,
    UNITS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    copy_mask, read_strides = reads
    mask, write_strides, lengths = writes
    STATES: gl.constexpr = len(d_state)
    if RECALLS:  # what was read is before the step; after it are the states before the last one
        state_prev = read
    else:
        state = read
        state_prev = read
    states = ()
    states_prev = ()
    for s in gl.static_range(STATES):
        if index_in(READ, s) is None:
            states += (0.0,)
            states_prev += (0.0,)
        else:
            states += (state[index_in(READ, s)].to(gl.float32),)
            states_prev += (state_prev[index_in(READ, s)].to(gl.float32),)
    saved = ()
    for s in gl.static_range(SAVED):
        saved += (taken[s].to(gl.float32),)
    d_after = ()
    for s in gl.static_range(STATES):
        if s == 0 and len(taken) > SAVED:
            d_after += (d_state[s] + taken[SAVED].to(gl.float32),)
        else:
            d_after += (d_state[s],)
    d_x_gates, d_h_gates, d_prev, d_params_step = STEP_VJP(
        d_after, states_prev, states, saved, params, APPROXIMATE
    )
    if len(lengths) > 0:  # an inactive step passes no gradient to its gates
        active = at_step(i, T, backwards) < lengths[0]
        d_x_gates = zero_where_not(active, d_x_gates)
        d_h_gates = zero_where_not(active, d_h_gates)
        d_params_step = zero_where_not(active, d_params_step)
    put(buffers, d_h_gates)
    async_copy.wait_group(AHEAD - 2)
    product = start_sum(weights, read_of(operands), zero)
    # While the matrix unit works, the rest.
    if len(write_ptrs) > 0:
        store_tiles(write_ptrs[0], d_x_gates, mask, H)
    if len(write_ptrs) > 1:
        store_tiles(write_ptrs[1], d_h_gates, mask, H)
    if len(d_params) > 0:
        d_params = add(d_params, d_params_step)
    ask_step(i + AHEAD, T, read_ptrs, copy_mask, free, H, STATES, READ, RECALLS, SAVED, ALIGNED)
    read_ptrs = advance(read_ptrs, read_strides, UNIT)
    write_ptrs = advance(write_ptrs, write_strides, UNIT)
    state = state_prev
    if RECALLS:
        read = take_states(i + 1, T, backwards, coming, state0, lengths, UNITS)
    else:
        read = take(coming, 0, len(READ), UNITS)
    taken = take(coming, len(READ), len(taken), UNITS)
    product = warpgroup_mma_wait(0, deps=[product])
    if arrived is None:
        d_h = in_units(product, UNITS)
    else:
        mbarrier.expect(arrived, parts.nbytes_per_cta)
        send_parts(parts, product, arrived)
        mbarrier.wait(arrived, i // 2 & 1)
        d_h = sum_of_parts(parts, PARTS, UNITS)
    d_before = (d_h + d_prev[0],)
    for s in gl.static_range(1, STATES):
        d_before += (d_prev[s],)
    if len(lengths) == 0:
        d_state = d_before
    else:  # and hands d_state on as it came
        d_state = where_active(active, d_before, d_state)
    return d_state, d_params, state, read, taken, read_ptrs, write_ptrs


@gluon.jit(do_not_specialize=RUNTIME + RUNTIME_BACKWARD)
def backward_kernel(
    d_output_ptr,  # as output, or None
    d_state_n_ptrs,  # for each state (D, B, H), contiguous, or None
    state0_ptrs,  # these and the next two as the forward pass read and wrote them
    output_ptr,
    stored_ptr,
    weight_hh_ptr,
    param_ptrs,
    lengths_ptr,
    d_x_gates_ptr,  # as x_gates, or None
    d_h_gates_ptr,  # in the same place as d_x_gates, or None where they are the same
    d_state0_ptrs,  # for each state (D, B, H), contiguous, or None
    d_params_ptr,  # (params, batch tiles, D, H) float32, contiguous, or None
    T,  # at least 1
    B,
    reverse,  # as in the forward pass that is differentiated
    d_output_stride_t,  # every stride is in units of UNIT elements
    d_output_stride_b,
    x_gates_stride_t,  # those of d_x_gates and d_h_gates
    x_gates_stride_b,
    output_stride_t,
    output_stride_b,
    stored_stride_t,
    stored_stride_b,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_B: gl.constexpr,
    GATES: gl.constexpr,
    STORED: gl.constexpr,
    STEP_VJP: gl.constexpr,
    READ: gl.constexpr,  # the states that STEP_VJP looks at
    RECALLS: gl.constexpr,  # it looks at those before the step
    APPROXIMATE: gl.constexpr,
    UNIT: gl.constexpr,
    AHEAD: gl.constexpr,  # steps, an even number: so early what a step reads is asked for
    CTAS: gl.constexpr,
    HELD: gl.constexpr,  # tiles of W_hh in shared memory
):
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = output_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    MMA: gl.constexpr = accumulator_layout(BLOCK_B, WARPS, BITS, CTAS)
    if CTAS == 1:
        UNITS: gl.constexpr = units_layout(False, BLOCK_S, BLOCK_B, WARPS, CTAS)
    else:
        UNITS: gl.constexpr = even_layout(BLOCK_S, BLOCK_B, WARPS, CTAS)
    PARTS: gl.constexpr = parts_layout(UNITS, BLOCK_S, BLOCK_B, CTAS)
    COPIES: gl.constexpr = copies_layout(BLOCK_S, BLOCK_B, WARPS, BITS, CTAS)
    ALIGNED: gl.constexpr = H * BITS % 32 == 0 and UNIT * BITS % 32 == 0
    STATES: gl.constexpr = len(state0_ptrs)
    SAVED: gl.constexpr = STORED - (STATES - 1)
    direction = gl.program_id(1)
    D = gl.num_programs(1)
    backwards = 1 - (direction ^ reverse)  # the opposite of the forward pass
    copy_rows, copy_units = place_in(COPIES, 1, WHOLE, BLOCK_B)
    copy_mask = (copy_rows < B) & (copy_units < H)
    output_offsets = direction * H + copy_rows * output_stride_b * UNIT + copy_units
    output_ptrs, output_stride = walk(
        output_ptr + output_offsets, output_stride_t, UNIT, T, backwards
    )
    read_ptrs, read_strides = (), ()
    if stored_ptr is not None:
        stored_offsets = direction * STORED * H + copy_rows * stored_stride_b * UNIT + copy_units
        stored_ptrs, stored_stride = walk(
            stored_ptr + stored_offsets, stored_stride_t, UNIT, T, backwards
        )
    for r in gl.static_range(len(READ)):
        if READ[r] == 0:
            read_ptrs += (output_ptrs + RECALLS * UNIT * output_stride,)
            read_strides += (output_stride,)
        else:
            ptrs = stored_ptrs + (READ[r] - 1) * H
            read_ptrs += (ptrs + RECALLS * UNIT * stored_stride,)
            read_strides += (stored_stride,)
    if SAVED > 0:
        read_ptrs += (stored_ptrs,)
        read_strides += (stored_stride,)
    if d_output_ptr is not None:
        d_output_offsets = direction * H + copy_rows * d_output_stride_b * UNIT + copy_units
        d_output_ptrs, stride = walk(
            d_output_ptr + d_output_offsets, d_output_stride_t, UNIT, T, backwards
        )
        read_ptrs += (d_output_ptrs,)
        read_strides += (stride,)
    rows, units = place_in(UNITS, 0, WHOLE, BLOCK_B)
    mask = (rows < B) & (units < H)
    d_gates_offsets = direction * GATES * H + rows * x_gates_stride_b * UNIT + units
    write_ptrs, write_strides = (), ()
    if d_x_gates_ptr is not None:
        d_x_gates_ptrs, stride = walk(
            d_x_gates_ptr + d_gates_offsets, x_gates_stride_t, UNIT, T, backwards
        )
        write_ptrs += (d_x_gates_ptrs,)
        write_strides += (stride,)
        if d_h_gates_ptr is not None:
            d_h_gates_ptrs, stride = walk(
                d_h_gates_ptr + d_gates_offsets, x_gates_stride_t, UNIT, T, backwards
            )
            write_ptrs += (d_h_gates_ptrs,)
            write_strides += (stride,)
    state_rows = (direction * B + rows) * H + units
    lengths = ()
    if lengths_ptr is not None:
        lengths = (gl.load(lengths_ptr + rows, mask=rows < B, other=0),)
    reads = (copy_mask, read_strides)
    writes = (mask, write_strides, lengths)

    TAKEN: gl.constexpr = SAVED + (1 if d_output_ptr is not None else 0)
    slots = allocate_slots(dtype, BLOCK_S, BLOCK_B, CTAS, len(READ) + TAKEN, AHEAD)
    for k in gl.static_range(AHEAD):
        ask_step(k, T, read_ptrs, copy_mask, slots[k], H, STATES, READ, RECALLS, SAVED, ALIGNED)
        read_ptrs = advance(read_ptrs, read_strides, UNIT)
    # W_hh transposed: rows are the units that h came from, columns the gates that it went to.
    weights = load_weights_backward(
        weight_hh_ptr + direction * GATES * H * H, H, BLOCK_S, CTAS, GATES, HELD, MMA
    )
    params = load_params(param_ptrs, direction * H + units, units < H)
    d_state = ()
    for s in gl.static_range(STATES):
        d_state_s = gl.zeros([WHOLE, BLOCK_B], gl.float32, UNITS)
        if d_state_n_ptrs[s] is not None:
            loaded = gl.load(d_state_n_ptrs[s] + state_rows, mask=mask, other=0.0)
            d_state_s = loaded.to(gl.float32)
        d_state += (d_state_s,)
    d_params = ()
    if d_params_ptr is not None:
        for p in gl.static_range(len(param_ptrs)):
            d_params += (gl.zeros([WHOLE, BLOCK_B], gl.float32, UNITS),)
    even, even_operands = allocate_operands(dtype, BLOCK_S, BLOCK_B, CTAS, GATES)
    odd, odd_operands = allocate_operands(dtype, BLOCK_S, BLOCK_B, CTAS, GATES)
    buffers = (even, odd)
    operands = (even_operands, odd_operands)
    parts = (None, None)
    arrived = (None, None)
    if CTAS > 1:
        parts = (
            allocate_parts(BLOCK_S, BLOCK_B, CTAS),
            allocate_parts(BLOCK_S, BLOCK_B, CTAS),
        )
        arrivals = allocate_arrivals(CTAS)
        arrived = (arrivals.index(0), arrivals.index(1))
    zero = gl.zeros([CTAS * WHOLE, BLOCK_B], gl.float32, MMA)
    async_copy.wait_group(AHEAD - 1)
    state0 = ()
    if RECALLS:
        state = ()
        begun = at_step(0, T, backwards) < T
        if len(lengths) > 0:
            begun = at_step(0, T, backwards) < lengths[0]
        for r in gl.static_range(len(READ)):
            before = gl.load(state0_ptrs[READ[r]] + state_rows, mask=mask, other=0.0)
            if READ[r] == 0:
                ptr, stride_t, stride_b = output_ptr + direction * H, output_stride_t, output_stride_b
            else:
                ptr = stored_ptr + (direction * STORED + READ[r] - 1) * H
                stride_t, stride_b = stored_stride_t, stored_stride_b
            ptrs, _ = walk(ptr + rows * stride_b * UNIT + units, stride_t, UNIT, T, backwards)
            state += (gl.where(begun, gl.load(ptrs, mask=mask & begun, other=0.0), before),)
            state0 += (before,)
        read = take_states(0, T, backwards, slots[0], state0, lengths, UNITS)
    else:
        read = take(slots[0], 0, len(READ), UNITS)
        state = read
    taken = take(slots[0], len(READ), TAKEN, UNITS)
    rest = T % AHEAD
    for i in range(0, T - rest, AHEAD):
        for k in gl.static_range(AHEAD):
            d_state, d_params, state, read, taken, read_ptrs, write_ptrs = backward_step(
                i + k, d_state, d_params, state, read, taken, read_ptrs, write_ptrs, slots[k],
                slots[(k + 1) % AHEAD], buffers[k % 2], operands[k % 2], parts[k % 2],
                arrived[k % 2], state0, weights, params, T, backwards, reads, writes, zero, H, READ,
                RECALLS, SAVED, STEP_VJP, APPROXIMATE, UNIT, ALIGNED, AHEAD, UNITS, PARTS,
            )  # fmt: skip
    for k in gl.static_range(AHEAD - 1):
        if k < rest:
            d_state, d_params, state, read, taken, read_ptrs, write_ptrs = backward_step(
                T - rest + k, d_state, d_params, state, read, taken, read_ptrs, write_ptrs,
                slots[k], slots[(k + 1) % AHEAD], buffers[k % 2], operands[k % 2], parts[k % 2],
                arrived[k % 2], state0, weights, params, T, backwards, reads, writes, zero, H, READ,
                RECALLS, SAVED, STEP_VJP, APPROXIMATE, UNIT, ALIGNED, AHEAD, UNITS, PARTS,
            )  # fmt: skip
    async_copy.wait_group(0)
    for s in gl.static_range(STATES):
        if d_state0_ptrs[s] is not None:
            gl.store(d_state0_ptrs[s] + state_rows, d_state[s].to(dtype), mask=mask)
    if d_params_ptr is not None:  # one part for each batch tile; the host sums them in order
        for p in gl.static_range(len(d_params)):
            part = (p * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * D + direction
            total = gl.sum(d_params[p], 1)
            unit = gl.arange(0, WHOLE, gl.SliceLayout(1, UNITS))
            gl.store(d_params_ptr + part * H + unit, total, mask=unit < H)
