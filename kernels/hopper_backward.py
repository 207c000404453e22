"""The Hopper engine's backward loop: back-propagation through time (Werbos, 1990), t in the
opposite order of the forward pass. hopper_forward.py says how both loops are built.

What a step reads of the states is, as it comes from device memory, either the states after the step
or, for a cell that RECALLS those before it, these alone: the states after a step are then those
before the step that was walked last, and are at hand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .cluster import (
    allocate_arrivals,
    allocate_parts,
    await_exchange,
    parts_layout,
    send_parts,
    sum_of_parts,
)
from .hopper_forward import RUNTIME
from .hopper_layouts import accumulator_layout, copies_layout, even_layout, units_layout
from .hopper_tiles import (
    advance,
    allocate_operands,
    allocate_slots,
    ask,
    columns_of_weights,
    finished,
    in_units,
    pieces_of,
    place_in,
    put,
    start_sum,
    take,
    walk,
)
from .portable_backward import RUNTIME_BACKWARD
from .steps import (
    add,
    at_step,
    existing,
    load_or_zero,
    load_params,
    store_tiles,
    store_wanted,
    to_float32,
    where_active,
    zero_where_not,
)


@gluon.jit
def ask_step(
    i, T, ptrs, mask, tiles, H: gl.constexpr, STATES: gl.constexpr, READS: gl.constexpr,
    RECALLS: gl.constexpr, SAVED: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """What the i-th step of the backward loop reads, in this order: the states after it, or before
    it where it RECALLS them, of which the pointers are one step ahead; what it saved; d_output."""
    states_mask = mask & (i + RECALLS < T)
    mask = mask & (i < T)
    for r in gl.static_range(len(READS)):
        ask(tiles[r], ptrs[r], states_mask, ALIGNED)
    for s in gl.static_range(SAVED):
        ask(tiles[len(READS) + s], ptrs[len(READS)] + (STATES - 1 + s) * H, mask, ALIGNED)
    if len(tiles) > len(READS) + SAVED:
        ask(tiles[len(READS) + SAVED], ptrs[len(ptrs) - 1], mask, ALIGNED)
    async_copy.commit_group()


@gluon.jit
def begun_before(i, T, backwards, lengths, LIKE: gl.constexpr):
    """Whether the i-th step of the backward loop exists and takes part: (1, 1) or (1, rows)."""
    begun = gl.full([1, 1], 0, gl.int32, LIKE) + i < T
    if lengths is not None:
        begun = begun & (at_step(i, T, backwards) < lengths)
    return begun


@gluon.jit
def take_states(
    i, T, backwards, tiles, state0, lengths, READS: gl.constexpr, RECALLS: gl.constexpr,
    UNITS: gl.constexpr,
):  # fmt: skip
    """The states that the i-th step reads. Before the step that comes first in time, state0."""
    states = take(tiles, 0, len(READS), UNITS)
    if RECALLS:
        states = where_active(begun_before(i + 1, T, backwards, lengths, UNITS), states, state0)
    return states


@gluon.jit
def by_number(tiles, READS: gl.constexpr, STATES: gl.constexpr):
    """The tiles of the states that are read, in float32, in their places among all; 0 elsewhere."""
    states = ()
    for s in gl.static_range(STATES):
        found = 0.0
        for r in gl.static_range(len(READS)):
            if READS[r] == s:
                found = tiles[r].to(gl.float32)
        states += (found,)
    return states


@gluon.jit
def backward_step(
    i, d_state, d_params, state, read, taken, read_ptrs, write_ptrs, slot, slot_ahead, buffer,
    operands, parts, arrived, state0, weights, params, T, backwards, copy_mask, read_strides, mask,
    write_strides, lengths, zero, H: gl.constexpr, READS: gl.constexpr, RECALLS: gl.constexpr,
    SAVED: gl.constexpr, STEP_VJP: gl.constexpr, APPROXIMATE: gl.constexpr, UNIT: gl.constexpr,
    ALIGNED: gl.constexpr, AHEAD: gl.constexpr, PARTS: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    STATES: gl.constexpr = len(d_state)
    if not RECALLS:  # else the states after this step were those before the last one
        state = read
    d_h = d_state[0]
    if len(taken) > SAVED:
        d_h += taken[SAVED].to(gl.float32)
    d_x_gates, d_h_gates, d_prev, d_params_step = STEP_VJP(
        (d_h,) + d_state[1:],
        by_number(read, READS, STATES),
        by_number(state, READS, STATES),
        to_float32(taken[:SAVED]),
        params,
        APPROXIMATE,
    )
    if lengths is not None:  # an inactive step passes no gradient to its gates
        active = at_step(i, T, backwards) < lengths
        d_x_gates = zero_where_not(active, d_x_gates)
        d_h_gates = zero_where_not(active, d_h_gates)
        d_params_step = zero_where_not(active, d_params_step)
    operand = ()
    for gate in gl.static_range(len(d_h_gates)):
        operand += (existing(d_h_gates[gate], mask, H),)
    put(buffer, operand)
    async_copy.wait_group(AHEAD - 2)
    pieces = ()
    for gate in gl.static_range(len(operands)):
        pieces += pieces_of(operands[gate], 1, operands[gate].shape[2])
    product = start_sum(weights, pieces, zero)
    # While the matrix unit works, the rest.
    if len(write_ptrs) > 0:
        store_tiles(write_ptrs[0], d_x_gates, mask, H, False)
    if len(write_ptrs) > 1:
        store_tiles(write_ptrs[1], d_h_gates, mask, H, False)
    if len(d_params) > 0:
        d_params = add(d_params, d_params_step)
    ask_step(i + AHEAD, T, read_ptrs, copy_mask, slot, H, STATES, READS, RECALLS, SAVED, ALIGNED)
    read_ptrs = advance(read_ptrs, read_strides, UNIT)
    write_ptrs = advance(write_ptrs, write_strides, UNIT)
    state = read
    read = take_states(i + 1, T, backwards, slot_ahead, state0, lengths, READS, RECALLS, UNITS)
    taken = take(slot_ahead, len(READS), len(taken), UNITS)
    product = finished(product)
    if arrived is None:
        d_h_prev = in_units(product, UNITS)
    else:
        send_parts(parts, product, arrived)
        await_exchange(i, arrived)
        d_h_prev = sum_of_parts(parts, PARTS, UNITS)
    d_before = (d_h_prev + d_prev[0],)
    for s in gl.static_range(1, STATES):
        d_before += (d_prev[s],)
    if lengths is None:
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
    T,
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
    BLOCK_S: gl.constexpr,  # units of a CTA: of one alone at least 64, of a cluster 16
    BLOCK_B: gl.constexpr,
    GATES: gl.constexpr,
    STORED: gl.constexpr,
    STEP_VJP: gl.constexpr,
    READS: gl.constexpr,  # the numbers of the states that STEP_VJP looks at
    RECALLS: gl.constexpr,  # it looks at those before the step
    APPROXIMATE: gl.constexpr,
    UNIT: gl.constexpr,
    AHEAD: gl.constexpr,  # steps, an even number
    CTAS: gl.constexpr,
    HELD: gl.constexpr,  # gates of W_hh in shared memory
):
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = output_ptr.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WHOLE: gl.constexpr = CTAS * BLOCK_S
    MMA: gl.constexpr = accumulator_layout(BLOCK_B, WARPS, BITS, CTAS)
    UNITS: gl.constexpr = (
        units_layout(False, BLOCK_S, BLOCK_B, WARPS, CTAS)
        if CTAS == 1
        else even_layout(BLOCK_S, BLOCK_B, WARPS, CTAS)
    )
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
    stored_offsets = direction * STORED * H + copy_rows * stored_stride_b * UNIT + copy_units
    read_ptrs, read_strides = (), ()
    for r in gl.static_range(len(READS)):
        if READS[r] == 0:
            ptrs, stride = walk(output_ptr + output_offsets, output_stride_t, UNIT, T, backwards)
        else:
            ptrs, stride = walk(
                stored_ptr + stored_offsets + (READS[r] - 1) * H, stored_stride_t, UNIT, T,
                backwards,
            )  # fmt: skip
        read_ptrs += (ptrs + RECALLS * UNIT * stride,)
        read_strides += (stride,)
    if SAVED > 0:
        ptrs, stride = walk(stored_ptr + stored_offsets, stored_stride_t, UNIT, T, backwards)
        read_ptrs += (ptrs,)
        read_strides += (stride,)
    if d_output_ptr is not None:
        d_output_offsets = direction * H + copy_rows * d_output_stride_b * UNIT + copy_units
        ptrs, stride = walk(d_output_ptr + d_output_offsets, d_output_stride_t, UNIT, T, backwards)
        read_ptrs += (ptrs,)
        read_strides += (stride,)
    rows, units = place_in(UNITS, 0, WHOLE, BLOCK_B)
    mask = (rows < B) & (units < H)
    d_gates_offsets = direction * GATES * H + rows * x_gates_stride_b * UNIT + units
    write_ptrs, write_strides = (), ()
    if d_x_gates_ptr is not None:
        ptrs, stride = walk(d_x_gates_ptr + d_gates_offsets, x_gates_stride_t, UNIT, T, backwards)
        write_ptrs += (ptrs,)
        write_strides += (stride,)
    if d_h_gates_ptr is not None:
        ptrs, stride = walk(d_h_gates_ptr + d_gates_offsets, x_gates_stride_t, UNIT, T, backwards)
        write_ptrs += (ptrs,)
        write_strides += (stride,)
    state_offsets = (direction * B + rows) * H + units
    lengths = None
    if lengths_ptr is not None:
        lengths = gl.load(lengths_ptr + rows, mask=rows < B, other=0)

    TAKEN: gl.constexpr = SAVED + (1 if d_output_ptr is not None else 0)
    slots = allocate_slots(dtype, BLOCK_S, BLOCK_B, CTAS, len(READS) + TAKEN, AHEAD)
    for k in gl.static_range(AHEAD):
        ask_step(k, T, read_ptrs, copy_mask, slots[k], H, STATES, READS, RECALLS, SAVED, ALIGNED)
        read_ptrs = advance(read_ptrs, read_strides, UNIT)
    # As in the forward pass: the loop never touches the pointer of W_hh.
    weight_hh_ptr += direction * GATES * H * H
    weights = columns_of_weights(weight_hh_ptr, H, BLOCK_S, CTAS, GATES, HELD, MMA)
    params = load_params(param_ptrs, direction * H + units, units < H)
    none = gl.zeros([WHOLE, BLOCK_B], gl.float32, UNITS)
    d_state = load_or_zero(d_state_n_ptrs, state_offsets, mask, none)
    d_params = ()
    if d_params_ptr is not None:
        for _ in gl.static_range(len(param_ptrs)):
            d_params += (none,)
    buffer0, operands0 = allocate_operands(dtype, BLOCK_S, BLOCK_B, CTAS, GATES)
    buffer1, operands1 = allocate_operands(dtype, BLOCK_S, BLOCK_B, CTAS, GATES)
    buffers, operands = (buffer0, buffer1), (operands0, operands1)
    parts, arrived = (None, None), (None, None)
    if CTAS > 1:
        parts0 = allocate_parts(BLOCK_S, BLOCK_B, CTAS)
        parts1 = allocate_parts(BLOCK_S, BLOCK_B, CTAS)
        parts, arrived = (parts0, parts1), allocate_arrivals()
    zero = gl.zeros([CTAS * WHOLE, BLOCK_B], gl.float32, MMA)
    state, state0 = (), ()
    if RECALLS:  # the states after the last step are read here, the others a step ahead
        begun = begun_before(0, T, backwards, lengths, UNITS)
        for r in gl.static_range(len(READS)):
            before_ptrs = state0_ptrs[READS[r]] + state_offsets
            if READS[r] == 0:
                ptrs = output_ptr + direction * H + rows * output_stride_b * UNIT + units
                ptrs, _ = walk(ptrs, output_stride_t, UNIT, T, backwards)
            else:
                ptrs = stored_ptr + (direction * STORED + READS[r] - 1) * H
                ptrs += rows * stored_stride_b * UNIT + units
                ptrs, _ = walk(ptrs, stored_stride_t, UNIT, T, backwards)
            state += (gl.load(gl.where(begun, ptrs, before_ptrs), mask=mask, other=0.0),)
            state0 += (gl.load(before_ptrs, mask=mask, other=0.0),)
    async_copy.wait_group(AHEAD - 1)
    read = take_states(0, T, backwards, slots[0], state0, lengths, READS, RECALLS, UNITS)
    if not RECALLS:
        state = read
    taken = take(slots[0], len(READS), TAKEN, UNITS)
    rest = T % AHEAD
    for i in range(0, T - rest, AHEAD):
        for k in gl.static_range(AHEAD):
            d_state, d_params, state, read, taken, read_ptrs, write_ptrs = backward_step(
                i + k, d_state, d_params, state, read, taken, read_ptrs, write_ptrs, slots[k],
                slots[(k + 1) % AHEAD], buffers[k % 2], operands[k % 2], parts[k % 2],
                arrived[k % 2], state0, weights, params, T, backwards, copy_mask, read_strides,
                mask, write_strides, lengths, zero, H, READS, RECALLS, SAVED, STEP_VJP,
                APPROXIMATE, UNIT, ALIGNED, AHEAD, PARTS, UNITS,
            )  # fmt: skip
    for k in gl.static_range(AHEAD - 1):
        if k < rest:
            d_state, d_params, state, read, taken, read_ptrs, write_ptrs = backward_step(
                T - rest + k, d_state, d_params, state, read, taken, read_ptrs, write_ptrs,
                slots[k], slots[k + 1], buffers[k % 2], operands[k % 2], parts[k % 2],
                arrived[k % 2], state0, weights, params, T, backwards, copy_mask, read_strides,
                mask, write_strides, lengths, zero, H, READS, RECALLS, SAVED, STEP_VJP,
                APPROXIMATE, UNIT, ALIGNED, AHEAD, PARTS, UNITS,
            )  # fmt: skip
    async_copy.wait_group(0)
    store_wanted(d_state0_ptrs, state_offsets, d_state, mask)
    if d_params_ptr is not None:  # one part for each batch tile; the host sums them in order
        unit = gl.arange(0, WHOLE, gl.SliceLayout(1, UNITS))
        for p in gl.static_range(len(d_params)):
            part = (p * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * D + direction
            d_param = gl.sum(gl.where(mask, d_params[p], 0.0), 1)  # of rows that exist
            gl.store(d_params_ptr + part * H + unit, d_param, mask=unit < H)
