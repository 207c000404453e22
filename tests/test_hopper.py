"""The Hopper engine: which layers it takes, and what happens where it cannot run.

Gluon has no interpreter. Its kernels are compiled and their machine code is read in
test_compiled.py; on a GPU their results are held to float64 here.
"""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from cases import Case, by_equation, problem
from test_plan import layer

from rnn import dispatch
from rnn.cells import CELLS
from rnn.kernels.chips import CHIPS
from rnn.kernels.hopper_plan import HopperPlan, Pass, clusters, forward_passes, passes
from rnn.kernels.limits import KernelUnavailable, NoPlan
from rnn.kernels.plan import PortablePlan, plan

pytest.importorskip("triton")

from launched import run

H100 = CHIPS["sm_90"].limits()


with_clusters = pytest.mark.skipif(not clusters(), reason="clusters need Triton 3.8")


def passes_of(p: HopperPlan) -> tuple[Pass, Pass]:
    return p.forward, p.backward


@pytest.mark.parametrize("cell", CELLS)
def test_every_plan_fits(cell):
    taken = 0
    for H, B, D, dtype in itertools.product(
        (1, 16, 17, 33, 64, 100, 128, 200, 256, 384, 512, 513, 768, 1000, 1024),
        (1, 8, 17, 4096),
        (1, 2),
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        p = plan(layer(cell, H, B, D, dtype), H100)
        if not isinstance(p, HopperPlan):
            continue
        taken += 1
        G, size = CELLS[cell].gates, torch.empty(0, dtype=dtype).element_size()
        assert (p.tiles - 1) * p.block_b < B <= p.tiles * p.block_b
        assert p.grid() == (p.tiles, D)
        for how in passes_of(p):
            whole = how.ctas * how.block_s
            assert H <= whole and whole & (whole - 1) == 0
            assert how.ctas in (1, 2, 4, 8, 16) and how.num_warps in (4, 8, 16)
            assert how.sram <= p.sram <= H100.sram
            assert how.ahead in (2, 4)
        # A matrix instruction has 64 rows, each warp 16 of them, and no two warps the same ones.
        rows = p.forward.block_s * (1 if G == 1 else 4)
        assert rows % 64 == 0 and 16 * p.forward.num_warps <= rows
        whole = p.backward.ctas * p.backward.block_s
        assert whole % 64 == 0 and 16 * p.backward.num_warps <= whole and p.backward.block_s >= 16
        assert p.backward.ctas > 1 or whole >= 64
        # A swizzled row of an operand is cut at whole swizzles only.
        assert (
            p.forward.chunk * size >= 128 or p.forward.chunk == p.forward.ctas * p.forward.block_s
        )
        assert 0 <= p.forward.held <= -(-H // p.forward.chunk)
        assert 0 <= p.backward.held <= G
    assert taken > 40


@pytest.mark.parametrize(
    ("cell", "H", "ctas"),
    [
        ("rnn_tanh", 64, 1),
        ("rnn_tanh", 256, 1),
        ("rnn_tanh", 512, 8),
        ("rnn_tanh", 1024, 16),
        ("gru", 256, 16),
        ("lstm", 128, 8),
        ("lstm", 512, 16),
    ],
)
@with_clusters
def test_few_rows_go_to_as_many_ctas_as_help(cell, H, ctas):
    p = plan(layer(cell, H, 16), H100)
    assert isinstance(p, HopperPlan) and p.forward.ctas == ctas
    assert (p.block_b, p.tiles) == (8, 2)


@with_clusters
def test_many_rows_go_to_few_ctas():
    few, many = (plan(layer("lstm", 64, B), H100) for B in (16, 2048))
    assert isinstance(few, HopperPlan) and isinstance(many, HopperPlan)
    assert many.forward.ctas < few.forward.ctas


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"packed": True}, "takes no packed rows"),
        ({"dtype": torch.float32, "tf32": False}, "rounds float32 products to tf32"),
        ({"hidden_size": 2048}, "has no room for W_hh"),
    ],
)
def test_why_not(changed, reason):
    p = plan(layer("rnn_tanh", 256, 16)._replace(**changed), H100)
    assert isinstance(p, PortablePlan)
    assert f"the Hopper engine {reason}" in str(p)


def test_other_chips_are_not_told_about_it():
    for target in ("sm_80", "sm_100", "gfx942"):
        p = plan(layer("rnn_tanh", 64, 16), CHIPS[target].limits())
        assert isinstance(p, PortablePlan) and "Hopper" not in str(p)


@with_clusters
def test_the_plan_says_what_the_other_engine_would_cost():
    p = plan(layer("lstm", 256, 16), H100)
    assert isinstance(p, HopperPlan)
    of_8 = p.otherwise  # of clusters that every chip takes
    assert isinstance(of_8, HopperPlan) and of_8.ctas == 8 and p.cost() < of_8.cost()
    assert isinstance(of_8.otherwise, PortablePlan)
    text = str(p)
    assert text.startswith("Hopper engine: W_hh stays in the registers of a cluster of 16 CTAs")
    assert f"{p.cost()} clocks a step by the model, not measured" in text
    assert f"the portable engine {of_8.otherwise.cost()}" in text


def forget():
    """What was planned, and from what."""
    plan.cache_clear()
    passes.cache_clear()


def test_without_clusters_one_cta_or_the_portable_engine(monkeypatch):
    monkeypatch.setattr("rnn.kernels.hopper_plan.clusters", lambda: False)
    forget()
    one, other = (plan(layer("rnn_tanh", H, 16), H100) for H in (128, 512))
    forget()
    assert isinstance(one, HopperPlan) and {how.ctas for how in passes_of(one)} == {1}
    assert isinstance(other, PortablePlan)


def test_one_cta_with_no_register_to_spare_takes_whole_tiles_of_w_hh_alone():
    """Triton 3.8 spills elsewhere."""
    for H in (129, 160, 201, 255, 256):
        for both in passes(layer("rnn_tanh", H, 16), H100, 8):
            alone = [how for how in both if how.ctas == 1]
            assert bool(alone) == (H == 256), (H, alone)


def test_a_step_that_is_over_soon_is_asked_for_earlier():
    short, long = (next(forward_passes(layer("rnn_tanh", H, 16), H100, 8)) for H in (64, 256))
    assert (short.ahead, long.ahead) == (4, 2)


# What happens where a kernel cannot be had. The portable engine runs interpreted here.

CASE = Case("gru", T=3, B=3, H=5)
REFUSED = "Triton Error [CUDA]: a kernel launch error has occurred due to cluster misconfiguration"


@pytest.fixture
def hopper_fails(monkeypatch):
    """As on an H100 whose Triton cannot compile the kernels: what the portable engine runs there
    is interpreted. Returns the plan that fails."""
    portable = dispatch.choose(
        "triton", CELLS["gru"], CASE.H, CASE.B, 1, torch.float32, torch.device("cpu")
    )
    hopper = plan(layer("gru", CASE.H, CASE.B, dtype=torch.float32), H100)
    assert isinstance(hopper, HopperPlan)
    hopper = replace(hopper, otherwise=portable)

    def fail(*args, **kwargs):
        raise KernelUnavailable("the compiler says no")

    monkeypatch.setattr(dispatch.kernels, "unavailable", {})
    monkeypatch.setattr(dispatch.kernels, "launch_hopper", fail)
    monkeypatch.setattr(dispatch, "plan", lambda *args: hopper)
    return hopper


def test_the_portable_engine_takes_over_with_a_warning(hopper_fails):
    import rnn

    module = rnn.GRU(4, CASE.H, backend="triton")
    x = torch.randn(CASE.T, CASE.B, 4)
    with pytest.warns(UserWarning, match=r"the compiler says no; instead runs: .*portable"):
        output, h_n = module(x)
    (output.sum() + h_n.sum()).backward()
    got = [output, h_n, *(p.grad for p in module.parameters())]
    twin = torch.nn.GRU(4, CASE.H)
    twin.load_state_dict(module.state_dict())
    output, h_n = twin(x)
    (output.sum() + h_n.sum()).backward()
    for a, b in zip(got, [output, h_n, *(p.grad for p in twin.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is not tried again
        module(x)
    assert "portable engine: the compiler says no" in rnn.explain(module, x)


def test_what_takes_over_sums_params_over_its_own_tiles(hopper_fails, nan_filled):
    p = problem(CASE).to(torch.float32)
    want = run(CASE, p, hopper_fails.otherwise)
    low = replace(hopper_fails, block_b=1, tiles=CASE.B)
    with pytest.warns(UserWarning, match="the compiler says no"):
        got = run(CASE, p, low)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@with_clusters
def test_a_device_that_refuses_clusters_of_16_gets_8(monkeypatch):
    monkeypatch.setattr(dispatch.kernels, "unavailable", {})
    monkeypatch.setattr(dispatch, "_limits", lambda *args: H100)
    tried = []

    def chosen():
        how = torch.bfloat16, torch.device("cuda")
        return dispatch.choose("auto", CELLS["lstm"], 256, 16, 1, *how)

    @dispatch.kernels.falling_back
    def launch(plan):
        tried.append(plan.ctas)
        with dispatch.kernels.compiled("forward pass", plan):
            if plan.ctas > 8:
                raise RuntimeError(REFUSED)
        return plan

    first = chosen()
    with pytest.warns(UserWarning, match=REFUSED[-20:] + ".* instead runs: .* of 8 CTAs"):
        ran = launch(first)
    assert isinstance(ran, HopperPlan) and isinstance(ran.otherwise, PortablePlan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again
        assert launch(first) == chosen() == ran
    assert tried == [16, 8, 8]
    assert "a cluster of 8 CTAs" in str(chosen()) and REFUSED in str(chosen())


def test_without_another_engine_it_raises(hopper_fails, monkeypatch):
    import rnn

    monkeypatch.setattr(dispatch, "plan", lambda *args: replace(hopper_fails, otherwise=None))
    with pytest.raises(KernelUnavailable, match="the compiler says no"):
        rnn.GRU(4, CASE.H, backend="triton")(torch.randn(CASE.T, CASE.B, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("B", [1, 17])
@pytest.mark.parametrize("H", [16, 33, 64, 128, 200, 256, 384, 512, 768])
@pytest.mark.parametrize("cell", CELLS)
def test_results_on_a_gpu(cell, H, B, dtype):
    """Against float64: what the rounding of inputs and states explains, and no more."""
    case = Case(cell, T=5, B=B, H=H, ragged=True, reverse=True)
    p = problem(case)
    device = torch.device("cuda")
    how = dispatch.choose("auto", CELLS[cell], H, B, 1, dtype, device)
    if isinstance(how, NoPlan) or not isinstance(how, HopperPlan):
        pytest.skip(f"not the Hopper engine: {how}")
    got = run(case, p.to(dtype, device), how)
    want = by_equation(case, p.to(dtype).to(torch.float64))
    bound = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for name, x in want.items():
        error = (got[name].double().cpu() - x).norm() / x.norm().clamp_min(1e-3)
        assert error < bound, (name, float(error))
