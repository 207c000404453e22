"""rnn.check_cell: what it reports, and that it can say no."""

from dataclasses import replace

import pytest
import torch

import rnn
from rnn.cells import CELLS

pytestmark = [
    pytest.mark.usefixtures("derived"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture
def cell(derived):
    @rnn.cell(gates=1, states=2, params={"rate": 0.5})
    def leaky(x, h_gates, state, params):
        a = torch.sigmoid(params["rate"])
        v = (1 - a) * state[1] + a * (x[0] + h_gates[0])
        return torch.tanh(v), v

    return leaky


def test_report(cell):
    report = rnn.check_cell(cell, chip="sm_90", hidden_size=128)
    assert (report.gates, report.states, report.params, report.kept) == (1, 2, ("rate",), 3)
    assert max(report.errors.values()) < 1 and len(report.errors) >= 2
    assert report.clocks is not None and min(report.clocks) > 100
    text = str(report)
    assert "finite differences in float64" in text and "Hopper engine" in text
    assert "3 numbers, 6 bytes in 16 bits" in text and "not measured" in text
    if torch.cuda.is_available() or rnn.dispatch.kernels is not None:
        assert any("triton" in name for name in report.errors)


def test_a_cell_that_no_kernel_takes():
    report = rnn.check_cell("lstm", chip="gfx942", hidden_size=4096)
    assert report.clocks is None and "clocks a step: none" in str(report)


def test_a_surrogate_gradient_is_no_fault():
    def step(x, h_gates, state, params):
        u = x[0] + h_gates[0]
        return (rnn.straight_through((u > 0).to(u.dtype), torch.tanh(u)),)

    report = rnn.check_cell(rnn.cell(gates=1)(step))
    assert "autograd, for its step calls detach()" in str(report)


def test_a_wrong_derivative(cell, monkeypatch):
    def times_slopes(*args):
        d_x, d_h, d_prev, d_params = cell.times_slopes(*args)
        return d_x, d_h, d_prev, tuple(1.01 * d for d in d_params)

    monkeypatch.setitem(CELLS, "wrong", replace(cell, name="wrong", times_slopes=times_slopes))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        rnn.check_cell("wrong")


def test_backends_that_differ(cell, monkeypatch):
    pytest.importorskip("triton")
    from rnn.kernels.cells import CELLS as TILES
    from rnn.kernels.cells import tiles_of

    def step(x, h_gates, state, params):
        v = (1 - params["rate"]) * state[1] + params["rate"] * (x[0] + h_gates[0])
        return torch.tanh(v), v

    other = rnn.cell(gates=1, states=2, params={"rate": 0.5})(step)
    monkeypatch.setitem(TILES, cell.name, tiles_of(other))
    with pytest.raises(RuntimeError, match=r'output of leaky_\w+ on backend="triton".*differs'):
        rnn.check_cell(cell)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"chip must be one of .*'sm_90'.*, got 'sm_75'"):
        rnn.check_cell("gru", chip="sm_75")
    with pytest.raises(ValueError, match="cell must be one of"):
        rnn.check_cell("nothing")
