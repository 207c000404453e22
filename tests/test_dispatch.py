"""Which backend runs, and what happens where a kernel cannot be had."""

import pytest
import torch
from cases import Case, problem
from test_recurrence import run

from rnn import dispatch
from rnn.cells import CELLS
from rnn.kernels.limits import KernelUnavailable, NoPlan, Plan

pytest.importorskip("triton")
CASE = Case("gru", T=3, B=2, H=5)


@pytest.fixture
def kernels_by_auto(monkeypatch):
    """As on a machine with a GPU: auto plans for the kernels, which the interpreter runs."""
    monkeypatch.setattr(dispatch, "_limits", lambda *args: dispatch.INTERPRETER)
    monkeypatch.setattr(dispatch, "_unavailable", {})


def chosen() -> Plan | NoPlan:
    where = torch.float32, torch.device("cpu")
    return dispatch.choose("auto", CELLS[CASE.cell], CASE.H, CASE.B, 1, *where)


def fail(*args):
    raise KernelUnavailable("the compiler says no")


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_a_kernel_that_does_not_compile_is_replaced_with_the_reason(
    pass_name, kernels_by_auto, monkeypatch
):
    p = problem(CASE).to(torch.float32)
    expected = run(CASE, p, "torch")
    assert isinstance(chosen(), Plan)
    monkeypatch.setattr(dispatch.kernels, pass_name, fail)
    got = run(CASE, p, "auto")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-2, msg=name)
    assert "the compiler says no" in chosen().why  # and so it is not tried again


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_where_the_kernels_were_asked_for_it_raises(pass_name, kernels_by_auto, monkeypatch):
    monkeypatch.setattr(dispatch.kernels, pass_name, fail)
    with pytest.raises(KernelUnavailable, match="the compiler says no"):
        run(CASE, problem(CASE).to(torch.float32), "triton")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("PassManager::run failed"), KernelUnavailable),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
    ],
    ids=["compiler", "device", "memory"],
)
def test_an_error_of_the_compiler_alone_makes_a_kernel_unavailable(raised, expected):
    plan = dispatch.choose("triton", CELLS["gru"], 5, 2, 1, torch.float32, torch.device("cpu"))
    with pytest.raises(expected) as caught, dispatch.kernels.compiled("forward pass", plan):
        raise raised
    assert type(caught.value) is expected
