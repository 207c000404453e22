"""Steps of time: where their rows lie, which take part, and tuples of tiles to and from memory.

Rows of different length: row b is active while t < lengths[b]. Packed, the rows of step t begin at
row offsets[t], and inactive rows are no part of memory.
"""

import triton
import triton.language as tl


@triton.jit
def load_tiles(ptrs, mask, H: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles that lie H elements apart."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles += (tl.load(ptrs + i * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptrs, tiles, mask, H: tl.constexpr):
    """Rounded to what the pointer points to."""
    for i in tl.static_range(len(tiles)):
        tl.store(ptrs + i * H, tiles[i].to(ptrs.dtype.element_ty), mask=mask)


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
def add(tiles, others):
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums += (tiles[i] + others[i],)
    return sums


@triton.jit
def load_params(param_ptrs, offsets, mask):
    """The cell's vectors per unit as float32 tiles (units, 1)."""
    params = ()
    for i in tl.static_range(len(param_ptrs)):
        params += (tl.load(param_ptrs[i] + offsets, mask=mask, other=0.0).to(tl.float32),)
    return params


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
def load_states(active, output, stored, state0_ptrs, state0_offsets, place, mask, H: tl.constexpr):
    """The states after a step or, of rows that have not come to it, those before the first: chosen
    among the pointers, so that nothing is read twice."""
    states = ()
    for s in tl.static_range(len(state0_ptrs)):
        if s == 0:
            ptrs = at(output, place)
        else:
            ptrs = at(stored, place) + (s - 1) * H
        ptrs = tl.where(active, ptrs, state0_ptrs[s] + state0_offsets)
        states += (tl.load(ptrs, mask=mask, other=0.0),)
    return states
