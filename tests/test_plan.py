"""What is planned, and that it can be told why."""

import itertools
from dataclasses import replace

import pytest
import torch

from rnn.kernels.chips import CHIPS
from rnn.kernels.plan import NoPlan, Plan, plan

A100, H100, RTX_4090, B200, MI300X = (
    CHIPS[target].limits() for target in ("sm_80", "sm_90", "sm_89", "sm_100", "gfx942")
)
each_chip = pytest.mark.parametrize(
    "limits", [A100, H100, RTX_4090, B200, MI300X], ids=lambda x: x.name
)


@pytest.mark.parametrize(
    ("limits", "bfloat16", "float32", "float32_ieee"),
    [
        (A100, 2048, 1024, 512),
        (H100, 2048, 1024, 512),
        (B200, 2048, 1024, 512),
        (RTX_4090, 1024, 512, 256),
        (MI300X, 128, 64, 64),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_largest_hidden_size(limits, bfloat16, float32, float32_ieee):
    """As the README's table says; every smaller one is resident too."""
    for dtype, tf32, largest in (
        (torch.bfloat16, True, bfloat16),
        (torch.float32, True, float32),
        (torch.float32, False, float32_ieee),
    ):
        fits = [
            isinstance(plan(1, h, 1, 1, dtype, tf32, limits), Plan) for h in range(1, largest + 2)
        ]
        assert fits == [True] * largest + [False]


@each_chip
def test_every_plan_fits(limits):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for H, B, D, dtype, tf32 in itertools.product(
        (1, 2, 16, 17, 33, 100, 128, 129, 256, 1000, 2048),
        (1, 7, 16, 37, 4096),
        (1, 2),
        dtypes,
        (True, False),
    ):
        p = plan(1, H, B, D, dtype, tf32, limits)
        if isinstance(p, NoPlan):
            continue
        assert p.sram <= limits.sram
        assert max(H, 16) <= p.block_h < 2 * max(H, 16)
        assert (p.tiles - 1) * p.block_b < B <= p.tiles * p.block_b
        assert p.num_warps & (p.num_warps - 1) == 0 and 4 <= p.num_warps <= 16
        grids = p.grids()
        assert [first for first, _ in grids] == list(range(0, p.tiles, p.tiles_at_once))
        assert sum(grid[0] for _, grid in grids) == p.tiles
        if p.slices > 1:  # blocks that wait for each other are all resident at once
            assert all(x * y * z <= limits.sms for _, (x, y, z) in grids)


def test_a_new_batch_changes_the_grid_alone():
    """So that no new kernel is compiled for it."""
    for H in (256, 1024):
        plans = [plan(1, H, B, 1, torch.bfloat16, True, H100) for B in (1, 16, 37, 100_000)]
        same = {replace(p, tiles=0, tiles_at_once=0) for p in plans}
        assert len(same) == 1


def test_a_large_batch_takes_wider_tiles_or_more_launches():
    small, large = (plan(1, 512, B, 1, torch.bfloat16, True, H100) for B in (100, 1000))
    assert (small.slices, small.block_b, len(small.grids())) == (8, 16, 1)
    assert (large.slices, large.block_b, len(large.grids())) == (4, 32, 1)
    assert len(plan(1, 1024, 1000, 1, torch.bfloat16, True, H100).grids()) == 8


def test_no_slices_where_blocks_may_not_wait_for_each_other():
    alone = H100._replace(cooperative=False)
    assert isinstance(plan(1, 512, 1, 1, torch.bfloat16, True, H100), Plan)
    assert isinstance(plan(1, 512, 1, 1, torch.bfloat16, True, alone), NoPlan)
    assert not MI300X.cooperative


def test_reasons():
    assert "float64" in str(plan(1, 8, 1, 1, torch.float64, True, H100))
    reason = str(plan(1, 2049, 1, 1, torch.bfloat16, True, H100))
    assert "hidden size 2049" in reason and "132 of 227 KiB" in reason
    two = plan(1, 2048, 1, 2, torch.bfloat16, True, A100)
    assert isinstance(plan(1, 2048, 1, 1, torch.bfloat16, True, A100), Plan)
    assert isinstance(two, NoPlan) and "108" in str(two)  # 128 blocks for two directions


def test_a_plan_explains_itself():
    text = str(plan(1, 200, 37, 2, torch.bfloat16, True, A100))
    assert "1 block(s)" in text and "of 163 KiB each (A100)" in text
    assert "256 units x 16 rows" in text
    text = str(plan(1, 1000, 1000, 1, torch.bfloat16, True, H100))
    assert "16 block(s)" in text and "in 8 launches" in text
