"""How the blocks that share one W_hh give each other their part of a step.

Each block owns the hidden units of one slice. After a step it writes its part to the exchange
buffer in device memory (in practice L2), raises a flag, waits until the flags of all slices of
its own batch tile are up, and reads the whole. There is one flag word for each direction, batch
tile and step, zeroed on the stream before the launch, so that a word only ever rises from 0 to
SLICES: the value that is waited for is final, and nothing is reset between steps.

Why what is read is never stale:
- A block's threads store their part; the releasing atomic is preceded by a barrier of the block,
  so those stores happen before the release (PTX memory model: bar.sync, then red.release.gpu).
- A block polls with acquire until it has read SLICES. The SLICES increments form one release
  sequence, so it synchronises with every one of them; the polling thread's view reaches the
  other threads by the barrier with which Triton hands out a scalar.
- The data is read with .cg, from L2: a line that L1 kept from two steps ago cannot answer.

Why two slots, used in turns, are enough: a block writes step i + 2 into the slot of step i only
after it saw all flags of step i + 1. A block raises that flag after its reads of step i, whose
values went into the part that it published. So no one reads step i any more.

Why it ends: all blocks of a launch are resident at once (cooperative launch), and the wait is
bounded. When patience runs out, the block goes on without waiting, reads NaN instead of the
parts, and reports the number of its launch; NaN then runs through everything that depends on it.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_slices(flag_ptr, patience, SLICES: tl.constexpr):
    """Raise the flag, wait for all slices; False if they did not come within `patience` polls."""
    tl.debug_barrier()  # every thread's part is written; not every Triton adds this one itself
    tl.atomic_add(flag_ptr, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while (arrived < SLICES) & (polls < patience):
        arrived = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    return arrived == SLICES


@triton.jit
def gather(
    part_ptr, row_offsets, row_mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """The whole of what the slices published, WIDTH elements a row, as CHUNKS tiles of (CHUNK,
    rows)."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + tl.arange(0, CHUNK)[:, None]
        ptrs = part_ptr + row_offsets + column
        mask = (column < WIDTH) & row_mask
        tiles += (tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"),)
    return tiles


@triton.jit
def report(alive, tiles, fault_ptr, launch):
    """The tiles, or NaN and a word to the host where a wait was given up."""
    if not alive:
        tl.atomic_max(fault_ptr, launch, sem="relaxed", scope="sys")
    reported = ()
    for i in tl.static_range(len(tiles)):
        reported += (tl.where(alive, tiles[i], float("nan")).to(tiles[i].dtype),)
    return reported
