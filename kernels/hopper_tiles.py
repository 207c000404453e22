"""Tiles of the Hopper engine: how they come and go, and the products with W_hh.

A wgmma multiplies a left operand, here a tile of W_hh in registers, with a right operand in shared
memory, h or the gradients of the gates. The accumulator decides where a thread's elements lie; the
rows of W_hh are put in such an order that this place suits the cell as well, so that no tile has to
change its layout by way of shared memory. hopper_layouts.py says where each tile lies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_layouts import operand_layout, slot_layout
from .products import round_tf32

# Triton 3.9 has renamed both.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def place_in(LAYOUT: gl.constexpr, UNITS: gl.constexpr, SIZE: gl.constexpr, BLOCK_B: gl.constexpr):
    """The batch rows and the units of a tile; the dimension of the units is UNITS."""
    units = gl.arange(0, SIZE, gl.SliceLayout(1 - UNITS, LAYOUT))
    rows = gl.program_id(0) * BLOCK_B + gl.arange(0, BLOCK_B, gl.SliceLayout(UNITS, LAYOUT))
    return gl.expand_dims(rows.to(gl.int64), UNITS), gl.expand_dims(units, 1 - UNITS)


# -------------------------------------------------------------------------- a product's rows


@gluon.jit
def unit_of(row):
    """The unit that a row of the product of one gate stands for. The accumulator gives a thread the
    rows r and r + 8 of 16; these two are neighbouring units."""
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@gluon.jit
def in_units(product, UNITS: gl.constexpr):
    """Rows of the product -> units, in the layout UNITS: the registers get other names, no more."""
    M: gl.constexpr = product.shape[0]
    N: gl.constexpr = product.shape[1]
    tile = product.reshape([M // 16, 2, 8, N]).permute((0, 2, 1, 3)).reshape([M, N])
    return gl.convert_layout(tile, UNITS, assert_trivial=True)


@gluon.jit
def in_gates(product, PLACES: gl.constexpr, UNITS: gl.constexpr):
    """Stacked rows of the product, of which 16 are 4 gates of 4 units, -> a tile in the layout
    UNITS for each gate. Two lanes give each other half of their batch rows, so that each has all
    gates of the other half."""
    M: gl.constexpr = product.shape[0]
    N: gl.constexpr = product.shape[1]
    tile = product.reshape([M // 16, 2, 2, 4, N]).permute((0, 3, 4, 1, 2))
    tile = gl.convert_layout(tile.reshape([M // 4, N, 2, 2]), PLACES)
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
    dtype: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_B: gl.constexpr,
    CTAS: gl.constexpr,
    COUNT: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """AHEAD slots of COUNT tiles (rows, units) in shared memory, each an allocation of its own, so
    that the compiler sees that they do not overlap."""
    SHARED: gl.constexpr = slot_layout(dtype.primitive_bitwidth, CTAS)
    slots = ()
    for _ in gl.static_range(AHEAD):
        tiles = ()
        for _ in gl.static_range(COUNT):
            tiles += (gl.allocate_shared_memory(dtype, [BLOCK_B, CTAS * BLOCK_S], SHARED),)
        slots += (tiles,)
    return slots


@gluon.jit
def ask(tile, ptrs, mask, ALIGNED: gl.constexpr):
    """Have a tile copied from device to shared memory, 0 where masked, while the program goes
    on."""
    if ALIGNED:
        async_load(tile, ptrs, mask=mask)
    else:  # pieces of two bytes cannot be copied that way
        tile.store(gl.load(ptrs, mask=mask, other=0.0))


@gluon.jit
def take(tiles, FIRST: gl.constexpr, COUNT: gl.constexpr, UNITS: gl.constexpr):
    """Tiles (units, rows) of a slot that has arrived."""
    taken = ()
    for i in gl.static_range(FIRST, FIRST + COUNT):
        taken += (tiles[i].permute((1, 0)).load(UNITS),)
    return taken


# -------------------------------------------------------------------------------------- products


@gluon.jit
def load_weights(
    row_ptrs,  # (M, 1): where the rows of the first tile begin
    row_mask,
    columns,  # (1, WIDTH) or (M, WIDTH): those of the first tile
    column_stride: gl.constexpr,
    H: gl.constexpr,
    COUNT: gl.constexpr,
    TILE_STRIDE: gl.constexpr,  # from a tile to the next in memory, beside
    COLUMN_STEP: gl.constexpr,  # from its columns to the next one's
    HELD: gl.constexpr,
    CTAS: gl.constexpr,
):
    """COUNT tiles (M, WIDTH) of W_hh: the last HELD of them in shared memory, which are read first,
    the others in registers."""
    BITS: gl.constexpr = row_ptrs.dtype.element_ty.primitive_bitwidth
    SHARED: gl.constexpr = operand_layout(columns.shape[1], BITS, [1, 0], CTAS)
    held = ()
    kept = ()
    for i in gl.static_range(COUNT):
        number = (i + COUNT - HELD) % COUNT
        column = columns + number * COLUMN_STEP
        ptrs = row_ptrs + number * TILE_STRIDE + column * column_stride
        tile = gl.load(ptrs, mask=row_mask & (column < H), other=0.0)
        if i < HELD:
            shared = gl.allocate_shared_memory(tile.dtype, tile.shape, SHARED)
            shared.store(tile)
            held += (shared,)
        else:
            kept += (tile,)
    return kept + held


@gluon.jit
def rows_of_weights(
    weight_ptr,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,
    CTAS: gl.constexpr,
    GATES: gl.constexpr,
    CHUNK: gl.constexpr,
    HELD: gl.constexpr,
    MMA: gl.constexpr,
):
    """The rows of W_hh of the CTA's units, of one gate or of four stacked, in tiles of CHUNK
    columns."""
    BITS: gl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 32 // BITS)
    ROWS: gl.constexpr = CTAS * BLOCK_S * (1 if GATES == 1 else 4)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OPERAND))[:, None]
    if GATES == 1:
        gate, unit = 0, unit_of(row)
    else:
        gate, unit = row // 4 % 4, row // 16 * 4 + row % 4
    row_mask = (unit < H) & (gate < GATES)
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, OPERAND))[None, :]
    row_ptrs = weight_ptr + (gate * H + unit) * H
    COUNT: gl.constexpr = (H + CHUNK - 1) // CHUNK
    return load_weights(row_ptrs, row_mask, columns, 1, H, COUNT, 0, CHUNK, HELD, CTAS)


@gluon.jit
def columns_of_weights(
    weight_ptr,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,
    CTAS: gl.constexpr,
    GATES: gl.constexpr,
    HELD: gl.constexpr,
    MMA: gl.constexpr,
):
    """The same rows transposed, a tile for each gate: (all units, the CTA's units)."""
    BITS: gl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 32 // BITS)
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    row = gl.arange(0, CTAS * WHOLE, gl.SliceLayout(1, OPERAND))[:, None]
    unit = unit_of(row % WHOLE)
    own = gl.arange(0, BLOCK_S, gl.SliceLayout(0, OPERAND))[None, :] + row // WHOLE * BLOCK_S
    return load_weights(weight_ptr + unit, unit < H, own, H, H, GATES, H * H, 0, HELD, CTAS)


@gluon.jit
def seen_as(shared, shape: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape and layout."""
    if REINTERPRET:
        seen = shared.reinterpret(shared.dtype, shape, LAYOUT)
    else:
        seen = shared._reinterpret(shared.dtype, shape, LAYOUT)
    return seen


@gluon.jit
def allocate_operands(
    dtype: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_B: gl.constexpr,
    CTAS: gl.constexpr,
    COUNT: gl.constexpr,
):
    """Shared memory for COUNT tiles of the CTA's own units: (units, rows) to be written as tiles
    that span the CTAs, and (1, rows, units) as each CTA's matrix unit reads its part."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    SPLIT: gl.constexpr = operand_layout(BLOCK_S, BITS, [0, 1], CTAS)
    OWN: gl.constexpr = operand_layout(BLOCK_S, BITS, [0, 0], CTAS)
    written = ()
    read = ()
    for _ in gl.static_range(COUNT):
        tile = gl.allocate_shared_memory(dtype, [1, BLOCK_B, CTAS * BLOCK_S], SPLIT)
        written += (tile.index(0).permute((1, 0)),)
        if CTAS > 1:
            tile = seen_as(tile, [1, BLOCK_B, BLOCK_S], OWN)
        read += (tile,)
    return written, read


@gluon.jit
def as_operand(tile, dtype: gl.constexpr):
    """Rounded to what the matrix unit takes: of float32, tf32."""
    if dtype == gl.float32:
        rounded = round_tf32(tile.to(gl.float32))
    else:
        rounded = tile.to(dtype)
    return rounded


@gluon.jit
def put(operands, tiles):
    """Hand tiles to the matrix unit, which reads shared memory by another way than stores go: the
    fence, and the barrier that the compiler puts after the next wait for copies, make them visible
    to it."""
    for i in gl.static_range(len(operands)):
        operands[i].store(as_operand(tiles[i], operands[i].dtype))
    fence_async_shared()


@gluon.jit
def pieces_of(tile, COUNT: gl.constexpr, SIZE: gl.constexpr):
    """A tile (1, rows, units) in shared memory as COUNT operands (SIZE units, rows).

    A long one is picked by an index that is always 0, which the compiler cannot know. Otherwise it
    would keep a register for the address of every 16 units, over the whole loop, and W_hh needs
    them."""
    if COUNT * SIZE > 256:
        first = gl.inline_asm_elementwise(
            "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        first = 0
    whole = tile.index(first).permute((1, 0))
    pieces = ()
    for i in gl.static_range(COUNT):
        if whole.shape[0] == SIZE:
            pieces += (whole,)
        else:
            pieces += (whole.slice(i * SIZE, SIZE),)
    return pieces


@gluon.jit
def start_sum(weights, operands, zero):
    """Start the sum of the products of each W with its operand; zero gives it its shape."""
    product = warpgroup_mma(weights[0], operands[0], zero, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(weights)):
        product = warpgroup_mma(weights[i], operands[i], product, is_async=True)
    return product


@gluon.jit
def finished(product):
    return warpgroup_mma_wait(0, deps=[product])
