"""How the CTAs of a cluster give each other their part of a step, on Hopper.

A CTA stores into the shared memory of another one; each store adds its bytes to an mbarrier there,
and the receiver waits until all bytes that it expects have come (st.async, PTX ISA 8.1). Nothing
goes through L2 and no flag is polled; only the CTAs of one cluster wait for each other, and the
hardware starts a cluster as a whole.

    forward    all-gather: each CTA sends its units of h to all. G * BLOCK_S rows of W_hh times all
               units of h give the gates of its own units.
    backward   reduce-scatter: each CTA multiplies the gradients of its own gates with the same rows
               of W_hh, transposed, and sends each part of the product to the CTA that owns the
               units, which adds the parts, always in the same order.

Gathering the gradients of all gates instead would move G * itemsize bytes a unit and row, the parts
of the sum move 4: in 16 bits half as much for an LSTM, two thirds for a GRU, twice as much for one
gate. For one gate the sum still wins: its product has all units as rows, so that all warps share
it, while the gathering one has 64 rows, the work of four warps.

There are two buffers and two mbarriers, used in turns: phase n of one mbarrier counts the bytes of
exchange 2n or 2n + 1. Why this is right:

- Start. The mbarriers are initialised before a barrier of the cluster, and every send comes after
  it. So nothing is sent to a CTA that has not begun.
- No byte is missed. A phase ends when its one arrival has come and no byte is outstanding. The
  arrival is that of the CTA itself, which first adds all bytes that it expects; bytes that come
  before make the count negative, and end nothing.
- No byte is counted in the wrong phase. A CTA sends for exchange i + 2 after it has waited for
  exchange i + 1, to which every CTA sent its part after it had waited for exchange i. So the phase
  of exchange i was over everywhere.
- What is read is there. The last byte of a phase lands before the phase ends, and the wait for it
  acquires; the fence makes it visible to the matrix unit.
- Nothing is overwritten that is still read. Forward: every warp of a CTA sends its units of
  exchange i + 1 when its product with the buffer of exchange i is finished. Backward: the sum is
  read from the buffer of exchange i before the barrier that lets the next product begin, and that
  product is what is sent as exchange i + 1. In both, exchange i + 2 into the same buffer comes
  after exchange i + 1 has come from all.
- A parity names the phase. No thread can be two phases late, since the next phase needs the part
  of its own CTA, sent after the wait.
- End. Every CTA waits for all that is sent to it, so none exits while bytes are on their way to it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLinearLayout
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.jit import constexpr_function

from .hopper_layouts import operand_layout, powers, spread
from .hopper_tiles import as_operand, seen_as

# What Triton 3.6 and 3.7 lack is None there, so that the kernels of one CTA compile with them.
async_store = getattr(hopper, "async_store", None)
allocate_mbarrier = getattr(mbarrier, "allocate_mbarrier", None)
cluster_barrier = getattr(getattr(hopper, "cluster", None), "barrier", None)


@gluon.jit
def allocate_arrivals():
    """The two mbarriers of each CTA. When this returns, all CTAs of the cluster have begun."""
    arrivals = allocate_mbarrier(batch=2)
    for k in gl.static_range(2):
        mbarrier.init(arrivals.index(k), count=1)
    cluster_barrier()
    return arrivals.index(0), arrivals.index(1)


@gluon.jit
def await_exchange(i, arrived):
    """Wait for the i-th exchange, of which `arrived` is the mbarrier."""
    mbarrier.wait(arrived, i // 2 & 1)


# --------------------------------------------------------------------- forward: h, from all to all


@constexpr_function
def everyone_layout(STACKED, BLOCK_S, BLOCK_B, WARPS, BITS, CTAS):
    """Of (copies, rows, units): the units of each CTA in as many copies as there are CTAs. A thread
    has 8 or 16 bytes of a row; lanes that would have none have further copies."""
    per_warp = 4 if STACKED else 16  # units, as in units_layout
    vector = min(128 // BITS, per_warp)
    registers = [[0, 0, unit] for unit in powers(1, vector)]
    registers += [[0, row, 0] for row in powers(8, BLOCK_B)]
    registers += [[0, 0, unit] for unit in powers(per_warp * WARPS, BLOCK_S)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0]] + [[0, 0, unit] for unit in powers(vector, per_warp)]
    copies = [[copy, 0, 0] for copy in powers(1, CTAS)]
    free = 5 - len(lanes)
    registers += copies[free:]
    lanes = (lanes + copies[:free] + [[0, 0, 0]] * 5)[:5]
    warps = [[0, 0, unit] for unit in powers(per_warp, per_warp * WARPS)]
    blocks = spread([0, 0, BLOCK_S], CTAS)
    shape = [CTAS, BLOCK_B, CTAS * BLOCK_S]
    return DistributedLinearLayout(registers, lanes, warps, blocks, shape)


@gluon.jit
def allocate_h(dtype: gl.constexpr, WHOLE: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr):
    """Shared memory for all units of h in each CTA: (CTAS, rows, units), the copies that all write
    to, and (1, rows, units), the copy that each CTA reads."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    SPLIT: gl.constexpr = operand_layout(WHOLE, BITS, [1, 0, 0], CTAS)
    OWN: gl.constexpr = operand_layout(WHOLE, BITS, [0, 0], CTAS)
    copies = gl.allocate_shared_memory(dtype, [CTAS, BLOCK_B, WHOLE], SPLIT)
    return copies, seen_as(copies, [1, BLOCK_B, WHOLE], OWN)


@gluon.jit
def send_to_all(copies, h, arrived, EVERYONE: gl.constexpr):
    """Send each CTA's units of h (units, rows) to every CTA."""
    mbarrier.expect(arrived, copies.nbytes_per_cta)
    tile = as_operand(h, copies.dtype).permute((1, 0))
    tile = gl.expand_dims(gl.convert_layout(tile, gl.SliceLayout(0, EVERYONE)), 0)
    async_store(copies, tile.broadcast_to(copies.shape), arrived)


# ------------------------------------------------------- backward: sums of d_h, each to its owner


@constexpr_function
def parts_layout(UNITS, BLOCK_S, BLOCK_B, CTAS):
    """Of (to, from, 16s of units, 8, pairs of rows, 2, 2), the parts of a sum: all of a place in
    the thread that has it in the layout UNITS, whose bases are (units, rows)."""

    def places(bases):
        return [
            [unit // BLOCK_S, 0, unit % BLOCK_S // 16, unit % 16 // 2, row // 2, row % 2, unit % 2]
            for unit, row in bases
        ]

    return DistributedLinearLayout(
        places(UNITS.reg_bases) + [[0, sender, 0, 0, 0, 0, 0] for sender in powers(1, CTAS)],
        places(UNITS.lane_bases),
        places(UNITS.warp_bases),
        places(UNITS.block_bases),
        [CTAS, CTAS, BLOCK_S // 16, 8, BLOCK_B // 2, 2, 2],
    )


@constexpr_function
def row_major_layout(STEP, CTAS):
    order = list(range(len(STEP)))[::-1]
    return gl.SwizzledSharedLayout(1, 1, 1, order, cga_layout=spread(STEP, CTAS))


@gluon.jit
def allocate_parts(BLOCK_S: gl.constexpr, BLOCK_B: gl.constexpr, CTAS: gl.constexpr):
    """Shared memory for what all CTAs add to the units of each. The four elements that a thread of
    the accumulator has of 16 rows lie side by side: they are sent in one piece."""
    SHARED: gl.constexpr = row_major_layout([1, 0, 0, 0, 0, 0, 0], CTAS)
    shape: gl.constexpr = [CTAS, CTAS, BLOCK_S // 16, 8, BLOCK_B // 2, 2, 2]
    return gl.allocate_shared_memory(gl.float32, shape, SHARED)


@gluon.jit
def send_parts(parts, product, arrived):
    """Send each CTA's product (from * all units, rows) to the owners of the units."""
    CTAS: gl.constexpr = parts.shape[0]
    BLOCKS: gl.constexpr = parts.shape[2]
    PAIRS: gl.constexpr = parts.shape[4]
    mbarrier.expect(arrived, parts.nbytes_per_cta)
    tile = product.reshape([CTAS, CTAS, BLOCKS, 2, 8, PAIRS, 2]).permute((1, 0, 2, 4, 5, 6, 3))
    async_store(parts, tile, arrived)


@gluon.jit
def sum_of_parts(parts, PARTS: gl.constexpr, UNITS: gl.constexpr):
    """The sum over the senders: (units, rows)."""
    WHOLE: gl.constexpr = parts.shape[0] * parts.shape[2] * 16
    tile = gl.sum(parts.load(PARTS), 1).permute((0, 1, 2, 5, 3, 4))
    return gl.convert_layout(tile.reshape([WHOLE, parts.shape[4] * 2]), UNITS, assert_trivial=True)
