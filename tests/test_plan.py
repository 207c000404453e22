"""What is planned, and that it can be told why."""

import itertools
from dataclasses import replace

import pytest
import torch

from rnn.cells import CELLS
from rnn.kernels.chips import CHIPS
from rnn.kernels.limits import Layer, NoPlan, Plan
from rnn.kernels.plan import plan

A100, H100, RTX_4090, B200, MI300X = (
    CHIPS[target].limits() for target in ("sm_80", "sm_90", "sm_89", "sm_100", "gfx942")
)
H100 = H100._replace(no_hopper="is left out here")  # test_hopper.py has its plans
each_chip = pytest.mark.parametrize(
    "limits", [A100, H100, RTX_4090, B200, MI300X], ids=lambda x: x.name
)
PRECISIONS = ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))


def layer(cell, hidden_size, batch=1, directions=1, dtype=torch.bfloat16, tf32=True) -> Layer:
    c = CELLS[cell]
    numbers = c.gates, c.states, c.stored, len(c.params)
    return Layer(*numbers, hidden_size, batch, directions, dtype, tf32)


LARGEST = {  # bfloat16, float32 rounded to tf32, float32
    ("rnn_tanh", "A100"): (2304, 1728, 1152),
    ("rnn_tanh", "H100"): (3328, 2112, 1664),
    ("rnn_tanh", "B200"): (3328, 2368, 1664),
    ("rnn_tanh", "RTX 4090"): (2048, 1408, 640),
    ("rnn_tanh", "MI300X"): (128, 64, 64),
    ("gru", "A100"): (1024, 512, 384),
    ("gru", "H100"): (1152, 682, 480),
    ("gru", "B200"): (1152, 1152, 480),
    ("gru", "RTX 4090"): (512, 256, 128),
    ("gru", "MI300X"): (64, 32, 32),
    ("lstm", "A100"): (1024, 512, 256),
    ("lstm", "H100"): (1024, 512, 384),
    ("lstm", "B200"): (1152, 768, 384),
    ("lstm", "RTX 4090"): (512, 256, 128),
    ("lstm", "MI300X"): (64, 32, 32),
}


@pytest.mark.parametrize(("cell", "chip"), LARGEST, ids=str)
def test_largest_hidden_size(cell, chip):
    """As the README's table says; every smaller one is resident too."""
    limits = next(c for c in (A100, H100, RTX_4090, B200, MI300X) if c.name == chip)
    for (dtype, tf32), largest in zip(PRECISIONS, LARGEST[cell, chip]):
        near = range(max(1, largest - 20), largest + 21)
        sizes = [*range(1, 130), *near, *range(130, largest + 600, 67)]
        for H in sizes:
            fits = isinstance(plan(layer(cell, H, dtype=dtype, tf32=tf32), limits), Plan)
            assert fits == (H <= largest), H


@pytest.mark.parametrize(
    ("cell", "H", "dtype", "limits"),
    [
        ("lstm", 768, torch.bfloat16, H100),
        ("lstm", 768, torch.bfloat16, A100),
        ("gru", 1024, torch.bfloat16, H100),
        ("rnn_tanh", 1152, torch.float32, H100),
    ],
)
def test_sizes_that_people_use_stay_on_the_chip(cell, H, dtype, limits):
    assert isinstance(plan(layer(cell, H, 16, dtype=dtype), limits), Plan)


@each_chip
@pytest.mark.parametrize("cell", CELLS)
def test_every_plan_fits(cell, limits):
    for H, B, D, dtype, tf32 in itertools.product(
        (1, 2, 16, 17, 33, 100, 128, 129, 256, 384, 768, 1000, 1152),
        (1, 7, 16, 37, 4096),
        (1, 2),
        (torch.float32, torch.bfloat16, torch.float16),
        (True, False),
    ):
        p = plan(layer(cell, H, B, D, dtype, tf32), limits)
        if isinstance(p, NoPlan):
            continue
        G, size = CELLS[cell].gates, torch.empty(0, dtype=dtype).element_size()
        assert G * p.block_s * H * size * p.parts <= p.sram <= limits.sram
        assert p.block_s >= 16 and p.block_s & (p.block_s - 1) == 0
        assert p.chunk >= 16 and p.chunk & (p.chunk - 1) == 0
        assert (p.slices - 1) * p.block_s < H <= p.slices * p.block_s
        assert (p.chunks(H) - 1) * p.chunk < H <= p.chunks(H) * p.chunk
        assert p.slices == 1 or (p.steps == p.steps_backward == 1 and not p.direct)
        assert p.slices > 1 or (p.chunk == p.block_s and p.pieces == p.pieces_backward == 1)
        assert all(p.chunk // pieces >= 16 for pieces in (p.pieces, p.pieces_backward))
        assert (p.tiles - 1) * p.block_b < B <= p.tiles * p.block_b
        assert p.num_warps & (p.num_warps - 1) == 0 and 4 <= p.num_warps <= 16
        grids = p.grids()
        assert [first for first, _ in grids] == list(range(0, p.tiles, grids[0][1][0]))
        assert sum(grid[0] for _, grid in grids) == p.tiles
        if p.slices > 1:  # blocks that wait for each other are all resident at once
            assert all(x * y * z <= limits.sms for _, (x, y, z) in grids)


@pytest.mark.parametrize("H", [384, 768, 1152, 1536])
def test_a_hidden_size_costs_what_it_holds(H):
    """And not the next power of two: no more than a sixth of what is kept is padding."""
    for cell, limits in itertools.product(CELLS, (A100, H100)):
        p = plan(layer(cell, H, 16), limits)
        if isinstance(p, Plan):
            assert p.slices * p.block_s == H
            assert p.chunks(H) * p.chunk <= H * 7 // 6 or p.chunks(H) * p.chunk - H < 256


def test_a_new_batch_changes_the_grid_alone():
    """Of batches that fill as much of the chip: so that no new kernel is compiled for them."""
    for cell, H, batches in (
        ("lstm", 128, (1, 16, 37)),
        ("gru", 1024, (9, 12, 16)),
        ("rnn_tanh", 256, (5000, 10_000, 100_000)),
    ):
        plans = [plan(layer(cell, H, B), H100) for B in batches]
        same = {replace(p, tiles=0, clocks=0) for p in plans}
        assert len(same) == 1, (cell, H)


def test_a_new_batch_is_planned_from_what_is_known(monkeypatch):
    """What does not depend on the batch is not worked out again, which is what takes the time."""
    every = CHIPS["sm_90"].limits()  # both engines
    first, again = (layer("lstm", 77, B) for B in (16, 17))
    plan(first, every)
    for rules in ("plan.plan_slices", "hopper_plan.forward_passes", "hopper_plan.backward_passes"):
        monkeypatch.delattr(f"rnn.kernels.{rules}")
    assert isinstance(plan(again, every), Plan)


def test_few_rows_go_in_low_tiles_and_many_in_high_ones():
    """16 rows are two tiles of 8 where the chip has room for them."""
    for cell in CELLS:
        few, many = (plan(layer(cell, 128, B), H100) for B in (16, 4096))
        assert (few.block_b, few.tiles) == (8, 2)
        assert (many.block_b, many.tiles) == (16, 256)


def test_several_steps_share_a_read_where_w_hh_is_read_into_registers():
    """With mma alone, and fewer of them where fewer registers are left."""
    for H in (64, 128, 256):
        p = plan(layer("rnn_tanh", H, 16), A100)
        assert (p.block_b, p.steps, p.steps_backward) == (8, 4, 4)
    lstm = plan(layer("lstm", 128, 16), A100)
    assert (lstm.steps, lstm.steps_backward) == (2, 1)
    for limits in (H100, B200, MI300X):
        p = plan(layer("rnn_tanh", 64, 16), limits)
        assert p.steps == p.steps_backward == 1


SIMULATED = {  # clocks of a step, forward and backward, of the compiled loops; bfloat16, 16 rows
    ("rnn_tanh", 128, "sm_80"): (497, 590),
    ("rnn_tanh", 256, "sm_80"): (958, 1249),
    ("gru", 128, "sm_80"): (949, 1729),
    ("lstm", 128, "sm_80"): (1361, 2742),
    ("rnn_tanh", 64, "sm_90"): (520, 492),
    ("rnn_tanh", 128, "sm_90"): (743, 797),
    ("rnn_tanh", 256, "sm_90"): (1820, 1895),
    ("gru", 128, "sm_90"): (2428, 2551),
    ("lstm", 128, "sm_90"): (3126, 3154),
}


@pytest.mark.parametrize(("cell", "H", "target"), SIMULATED)
def test_the_model_is_near_what_was_simulated(cell, H, target):
    p = plan(layer(cell, H, 16), CHIPS[target].limits()._replace(no_hopper="is left out here"))
    assert p.clocks == pytest.approx(sum(SIMULATED[cell, H, target]) / 2, rel=0.25)


def test_more_gates_take_more_of_everything():
    plans = [plan(layer(cell, 128, 16), H100) for cell in ("rnn_tanh", "gru", "lstm")]
    for less, more in itertools.pairwise(plans):
        assert less.sram < more.sram and less.clocks < more.clocks


def test_no_slices_where_blocks_may_not_wait_for_each_other():
    alone = H100._replace(cooperative=False)
    assert isinstance(plan(layer("rnn_tanh", 512), H100), Plan)
    assert isinstance(plan(layer("rnn_tanh", 512), alone), NoPlan)
    assert not MI300X.cooperative


def test_reasons():
    assert "float64" in str(plan(layer("rnn_tanh", 8, dtype=torch.float64), H100))
    reason = str(plan(layer("lstm", 2049), H100))
    assert "4 gate(s)" in reason and "hidden size 2049" in reason and "132 of 227 KiB" in reason
    assert isinstance(plan(layer("gru", 1024), A100), Plan)
    two = plan(layer("gru", 1024, directions=2), A100)
    assert isinstance(two, NoPlan) and "2 direction(s)" in str(two) and "108" in str(two)


def test_a_plan_explains_itself():
    text = str(plan(layer("rnn_tanh", 200, 37, 2), A100))
    assert "1 block(s)" in text and "of 163 KiB each (A100)" in text
    assert "256 units x 8 rows" in text
    text = str(plan(layer("gru", 1000, 1000), H100))
    assert "block(s)" in text and "launches" in text
