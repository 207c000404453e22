"""What is planned, and that it can be told why."""

import itertools

import pytest
import torch

from rnn.kernels.plan import Limits, NoPlan, Plan, plan

A100 = Limits("A100", 163 * 1024, 108, "mma")
H100 = Limits("H100", 227 * 1024, 132, "wgmma")
RTX_4090 = Limits("RTX 4090", 99 * 1024, 128, "mma")


def largest(dtype, tf32, limits):
    fits = [h for h in range(1, 2049) if isinstance(plan(1, h, 1, 1, dtype, tf32, limits), Plan)]
    assert fits == list(range(1, fits[-1] + 1))
    return fits[-1]


@pytest.mark.parametrize(
    ("dtype", "tf32", "limits", "hidden_size"),
    [
        (torch.bfloat16, True, A100, 256),
        (torch.float16, True, H100, 256),
        (torch.float32, True, H100, 128),
        (torch.float32, False, A100, 128),
        (torch.bfloat16, True, RTX_4090, 128),
        (torch.float32, True, RTX_4090, 128),
        (torch.float32, False, RTX_4090, 64),
    ],
)
def test_largest_hidden_size(dtype, tf32, limits, hidden_size):
    assert largest(dtype, tf32, limits) == hidden_size


@pytest.mark.parametrize("limits", [A100, H100, RTX_4090], ids=lambda x: x.name)
def test_every_plan_fits(limits):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for H, B, D, dtype, tf32 in itertools.product(
        (1, 2, 16, 17, 33, 100, 128, 129, 256), (1, 7, 16, 37, 4096), (1, 2), dtypes, (True, False)
    ):
        p = plan(1, H, B, D, dtype, tf32, limits)
        if isinstance(p, NoPlan):
            continue
        assert p.sram <= limits.sram
        assert p.block_h >= max(H, 16) and p.block_h < 2 * max(H, 16)
        assert (p.tiles - 1) * p.block_b < B <= p.tiles * p.block_b
        assert p.num_warps & (p.num_warps - 1) == 0 and 4 <= p.num_warps <= 16
        assert p.grid == (p.tiles, 1, D)


def test_a_new_batch_changes_the_grid_alone():
    """So that no new kernel is compiled for it."""
    plans = [plan(1, 256, B, 1, torch.bfloat16, True, H100) for B in (1, 16, 37, 100_000)]
    assert len({(p.block_h, p.block_b, p.num_warps, p.num_stages) for p in plans}) == 1


def test_reasons():
    assert "float64" in str(plan(1, 8, 1, 1, torch.float64, True, H100))
    reason = str(plan(1, 257, 1, 1, torch.bfloat16, True, H100))
    assert "hidden size 257" in reason and "H100 has 227" in reason


def test_a_plan_explains_itself():
    text = str(plan(1, 200, 37, 2, torch.bfloat16, True, A100))
    assert "of 163 KiB (A100)" in text and "256 units x 16 rows" in text
