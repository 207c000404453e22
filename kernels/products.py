"""W_hh on the chip, and the products of a step with it.

Tiles are (hidden units, batch rows): a product is W @ h with W as the left operand, so that the
large dimension is the M of the matrix instruction and a small batch its N.
"""

import triton
import triton.language as tl


@triton.jit
def load_weights(
    weight_ptr,
    row_offsets,  # (M, 1): where the rows of the tiles begin
    row_mask,  # (M, 1)
    part_stride,
    group_stride: tl.constexpr,
    column_stride: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """PARTS x GROUPS x CHUNKS tiles of W_hh or its transpose, each (M, CHUNK), or cut into PIECES:
    (PIECES, M, CHUNK / PIECES)."""
    tiles = ()
    for part in tl.static_range(PARTS):
        for group in tl.static_range(GROUPS):
            group_ptr = weight_ptr + part * part_stride + group * group_stride
            for c in tl.static_range(CHUNKS):
                columns = c * CHUNK + tl.arange(0, CHUNK)[None, :]
                ptrs = group_ptr + row_offsets + columns * column_stride
                tile = tl.load(ptrs, mask=row_mask & (columns < COLUMNS), other=0.0)
                if PIECES > 1:
                    tile = tl.reshape(tile, (tile.shape[0], PIECES, CHUNK // PIECES))
                    tile = tl.permute(tile, (1, 0, 2))
                tiles += (tile,)
    return tiles


@triton.jit
def round_tf32(x):
    """float32 to the nearest tf32; a matrix unit would cut the low 13 bits off, which is biased.

    Infinity stays infinity and NaN NaN, whatever its bits: the sum makes it one that has its
    payload in the bits that stay. What would round up to infinity is cut off instead.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits += tl.where(tl.abs(x) < 3.401992901712019e38, 0x1000, 0)
    return (bits & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def recurrent_product(
    weights,
    group: tl.constexpr,
    GROUPS: tl.constexpr,
    chunks,
    alive,
    acc,
    SLICES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """acc + W x for the W of one group, W and x in as many chunks as the tuple has; NaN if x did
    not all come. float32 is multiplied in tf32: in one product, or, where W comes in two parts
    (high then low), in the three that give nearly all of float32.

    In PIECES, each warp sums over its own part of every chunk: where W has too few rows to give
    each warp some, the warps would otherwise all read all of W."""
    SPLIT: tl.constexpr = len(weights) == 2 * GROUPS * len(chunks)
    if PIECES > 1:
        high_sum = tl.zeros((PIECES, acc.shape[0], acc.shape[1]), tl.float32)
    else:
        high_sum = acc
    low_sum = tl.zeros_like(high_sum)
    for c in tl.static_range(len(chunks)):
        W = weights[group * len(chunks) + c]
        # Chosen here and not where x is loaded: the compiler copies a tile to shared memory right
        # after the operation that made it, and so needs room for one chunk at a time.
        x = chunks[c]
        if SLICES > 1:
            x = tl.where(alive, x, float("nan"))
        if PIECES > 1:
            x = tl.reshape(x, (PIECES, x.shape[0] // PIECES, x.shape[1]))
        if W.dtype == tl.float32:
            high = round_tf32(x)
            if SPLIT:
                W_low = weights[(GROUPS + group) * len(chunks) + c]
                low_sum = tl.dot(W_low, high, low_sum, input_precision="tf32")
                low_sum = tl.dot(W, x - high, low_sum, input_precision="tf32")
            high_sum = tl.dot(W, high, high_sum, input_precision="tf32")
        else:
            high_sum = tl.dot(W, x, high_sum)
    if SPLIT:
        # An infinite sum or a NaN is float32's own. Beside it the low part is no correction, but
        # infinity minus infinity.
        high_sum = tl.where(tl.abs(high_sum) < float("inf"), high_sum + low_sum, high_sum)
    if PIECES > 1:
        high_sum = acc + tl.sum(high_sum, 0)
    return high_sum


@triton.jit
def halves(tile):
    """(2 M, rows) -> the upper and the lower half, each (M, rows)."""
    HALF: tl.constexpr = tile.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(tile, (2, HALF, tile.shape[1])), (1, 2, 0)))


@triton.jit
def gate_products(
    weights,
    GATES: tl.constexpr,
    STACKED: tl.constexpr,  # tiles of W hold four gates one below the other
    chunks,
    alive,
    SLICES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """W_hh h as one tile for each gate."""
    UNITS: tl.constexpr = weights[0].shape[1 if PIECES > 1 else 0]
    zero = tl.zeros((UNITS, chunks[0].shape[1]), tl.float32)
    products = ()
    if STACKED:
        stack = recurrent_product(weights, 0, 1, chunks, alive, zero, SLICES, PIECES)
        upper, lower = halves(stack)
        a, b = halves(upper)
        c, d = halves(lower)
        products = (a, b, c, d)
    else:
        for gate in tl.static_range(GATES):
            product = recurrent_product(weights, gate, GATES, chunks, alive, zero, SLICES, PIECES)
            products += (product,)
    return products
