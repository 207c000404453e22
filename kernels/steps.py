"""Steps of time: where their rows lie, which take part, and tuples of tiles to and from memory.

Rows of different length: row b is active while t < lengths[b]. Packed, the rows of step t begin at
row offsets[t], and inactive rows are no part of memory.

DIRECT, each thread reads and writes the elements that it holds of a product, one by one. tl.load
and tl.store give a thread as wide a piece of memory as they can; from there to the layout of a
product the way leads through shared memory, between two barriers, for every tile of every step.
Triton lets nobody choose that layout, but an instruction of PTX takes whatever layout it is given.
"""

import triton
import triton.language as tl


@triton.jit
def load(ptrs, mask, DIRECT: tl.constexpr):
    """Elements of memory; zero where not mask."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if not DIRECT:
        return tl.load(ptrs, mask=mask, other=0.0)
    elif dtype.primitive_bitwidth == 16:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1]; }",
            "=h,l,r", [ptrs, mask.to(tl.int32)], dtype=tl.int16, is_pure=True, pack=1,
        )  # fmt: skip
        return bits.to(dtype, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }",
            "=r,l,r", [ptrs, mask.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
        ).to(dtype, bitcast=True)  # fmt: skip


@triton.jit
def store(ptrs, tile, mask, DIRECT: tl.constexpr):
    """A tile, rounded to what the pointers point to."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if not DIRECT:
        tl.store(ptrs, tile.to(dtype), mask=mask)
    elif dtype.primitive_bitwidth == 16:
        bits = tile.to(dtype).to(tl.int16, bitcast=True)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,h,r", [ptrs, bits, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        bits = tile.to(dtype).to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r", [ptrs, bits, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_tiles(ptrs, mask, H: tl.constexpr, COUNT: tl.constexpr, DIRECT: tl.constexpr):
    """COUNT tiles that lie H elements apart."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles += (load(ptrs + i * H, mask, DIRECT),)
    return tiles


@triton.jit
def store_tiles(ptrs, tiles, mask, H: tl.constexpr, DIRECT: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        store(ptrs + i * H, tiles[i], mask, DIRECT)


@triton.jit
def to_float32(tiles):
    converted = ()
    for i in tl.static_range(len(tiles)):
        converted += (tiles[i].to(tl.float32),)
    return converted


@triton.jit
def where_active(active, tiles, others):
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen += (tl.where(active, tiles[i], others[i]),)
    return chosen


@triton.jit
def zero_where_not(active, tiles):
    masked = ()
    for i in tl.static_range(len(tiles)):
        masked += (tl.where(active, tiles[i], 0.0),)
    return masked


@triton.jit
def existing(tile, mask, H: tl.constexpr):
    """The tile, 0 at units that do not exist. Their rows of W_hh are 0, and 0 times an infinite h
    is NaN, which their columns of W_hh would spread."""
    if tile.shape[0] > H:
        tile = tl.where(mask, tile, 0.0)
    return tile


@triton.jit
def add(tiles, others):
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums += (tiles[i] + others[i],)
    return sums


@triton.jit
def subtract(tiles, others):
    differences = ()
    for i in tl.static_range(len(tiles)):
        differences += (tiles[i] - others[i],)
    return differences


@triton.jit
def scale(tiles, factors):
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * factors[i],)
    return products


@triton.jit
def mix(keep, old, new):
    """keep of the old, the rest of the new."""
    mixed = ()
    for i in tl.static_range(len(new)):
        mixed += (keep[i] * old[i] + (1.0 - keep[i]) * new[i],)
    return mixed


@triton.jit
def clamp(tile, bound):
    """Into [-bound, bound]; NaN stays."""
    tile = tl.minimum(tile, bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(tile, -bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def last_of(tiles, COUNT: tl.constexpr):
    last = ()
    for i in tl.static_range(len(tiles) - COUNT, len(tiles)):
        last += (tiles[i],)
    return last


@triton.jit
def from_second(tiles):
    rest = ()
    for i in tl.static_range(1, len(tiles)):
        rest += (tiles[i],)
    return rest


@triton.jit
def with_first(first, tiles):
    """The tiles with another first one."""
    changed = (first,)
    for i in tl.static_range(1, len(tiles)):
        changed += (tiles[i],)
    return changed


@triton.jit
def load_params(param_ptrs, offsets, mask):
    """The cell's vectors per unit as float32 tiles (units, 1)."""
    params = ()
    for i in tl.static_range(len(param_ptrs)):
        params += (tl.load(param_ptrs[i] + offsets, mask=mask, other=0.0).to(tl.float32),)
    return params


@triton.jit
def load_or_zero(ptrs, offsets, mask, zero):
    """Float32 tiles of the tensors that there are, and zero in the place of the others."""
    tiles = ()
    for i in tl.static_range(len(ptrs)):
        tile = zero
        if ptrs[i] is not None:
            tile = tl.load(ptrs[i] + offsets, mask=mask, other=0.0).to(tl.float32)
        tiles += (tile,)
    return tiles


@triton.jit
def store_wanted(ptrs, offsets, tiles, mask):
    """The tiles, each rounded to its tensor, if there is one."""
    for i in tl.static_range(len(tiles)):
        if ptrs[i] is not None:
            tl.store(ptrs[i] + offsets, tiles[i].to(ptrs[i].dtype.element_ty), mask=mask)


@triton.jit
def steps_of(T, lengths, PACKED: tl.constexpr):
    """The steps that this program's rows take part in. Only packed rows end early: otherwise zeros
    are still to be written."""
    steps = T
    if PACKED:
        steps = tl.minimum(tl.max(lengths), T).to(tl.int32)
    return steps


@triton.jit
def at_step(i, steps, backwards):
    """The time index of the i-th step, from 0 up or, backwards, from steps - 1 down; 64 bits
    wide."""
    return (i + backwards * (steps - 1 - 2 * i)).to(tl.int64)


@triton.jit
def place_of(i, steps, backwards, offsets_ptr):
    """Where the rows of the i-th step begin, in time strides: t or, packed, the row that `offsets`
    names. After the last step nothing is there to be read."""
    place = at_step(i, steps, backwards)
    if offsets_ptr is not None:
        place = tl.load(offsets_ptr + place, mask=i < steps, other=0).to(tl.int64)
    return place


@triton.jit
def active_at(i, steps, backwards, lengths):
    """Which rows take part in the i-th step, (1, 1) or (1, BLOCK_B); none after the last."""
    active = tl.zeros((1, 1), tl.int32) + i < steps
    if lengths is not None:
        active = active & (at_step(i, steps, backwards) < lengths)
    return active


@triton.jit
def at(steps, place):
    """Pointers to one step of a tensor that is given as (pointer, time stride, offsets)."""
    return steps[0] + place * steps[1] + steps[2]


@triton.jit
def load_states(
    active,
    memory,  # output and stored as at() takes them; pointers to the states before the first step
    place,
    mask,
    RECALLS: tl.constexpr,
    H: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """The states after a step. If RECALLS, of rows that have not come to it those before the first:
    chosen among the pointers, so that nothing is read twice."""
    output, stored, state0_ptrs, state0_offsets = memory
    states = ()
    for s in tl.static_range(len(state0_ptrs)):
        if s == 0:
            ptrs = at(output, place)
        else:
            ptrs = at(stored, place) + (s - 1) * H
        wanted = mask & active
        if RECALLS:
            ptrs = tl.where(active, ptrs, state0_ptrs[s] + state0_offsets)
            wanted = mask
        states += (load(ptrs, wanted, DIRECT),)
    return states
