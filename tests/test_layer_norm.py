"""The layer-normalised LSTM and GRU: as their equations, by autograd through F.layer_norm."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from twins import IEEE, assert_same, everything, problem, tensors

import rnn
from rnn import recurrent
from rnn.cells import CELLS
from rnn.layer_norm import NORMED

pytestmark = [*IEEE, pytest.mark.usefixtures("derived")]

MODULES = {"lstm": rnn.LSTM, "gru": rnn.GRU}
each_cell = pytest.mark.parametrize("cell", MODULES)


def build(cell, hidden=7, dtype=torch.float64, **config):
    """Gains and biases are no ones and zeros."""
    torch.manual_seed(0)
    module = MODULES[cell](5, hidden, layer_norm=True, **config).to(dtype)
    for name, weight in module.named_parameters():
        if name.startswith(("gain", "bias")):
            torch.nn.init.normal_(weight, mean=1.0)
    return module


def norm(gates, *gains):
    """Over all gates at once, each with its gain."""
    whole = torch.cat(gates, 1)
    parts = F.layer_norm(whole, whole.shape[1:]).chunk(len(gates), 1)
    return [gain * part for gain, part in zip(gains, parts)]


def lstm(x, h_gates, state, p):
    x = norm(x, *(p[f"gain_x_{g}"] for g in "ifgo"))
    h = norm(h_gates, *(p[f"gain_h_{g}"] for g in "ifgo"))
    i, f, g, o = (a + b + p[f"bias_{k}"] for k, a, b in zip("ifgo", x, h))
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * torch.tanh(norm([c], p["gain_c"])[0] + p["bias_c"]), c


def gru(x, h_gates, state, p):
    x = *norm(x[:2], p["gain_x_r"], p["gain_x_z"]), *norm(x[2:], p["gain_x_n"])
    h = *norm(h_gates[:2], p["gain_h_r"], p["gain_h_z"]), *norm(h_gates[2:], p["gain_h_n"])
    r, z = (x[0] + h[0] + p["bias_r"]).sigmoid(), (x[1] + h[1] + p["bias_z"]).sigmoid()
    n = torch.tanh(x[2] + p["bias_n"] + r * (h[2] + p["bias_hn"]))
    return ((1 - z) * n + z * state[0],)


def by_the_book(module, x, hx, lengths=None, keep=None):
    """A plain loop over layers, directions and steps."""
    G, step = (4, lstm) if isinstance(module, rnn.LSTM) else (3, gru)
    weights, last, k = dict(module.named_parameters()), [], 0
    for layer in range(module.num_layers):
        outputs = []
        for end in ("", "_reverse")[: module.directions]:
            ours = {
                n.split("_l")[0]: w for n, w in weights.items() if n.endswith(f"_l{layer}{end}")
            }
            state, output = [s[k] for s in tensors(hx)], {}
            for t in reversed(range(len(x))) if end else range(len(x)):
                x_gates = (x[t] @ ours["weight_ih"].t()).chunk(G, 1)
                h_gates = (state[0] @ ours["weight_hh"].t()).chunk(G, 1)
                new = step(x_gates, h_gates, state, ours)
                if keep is not None:
                    new = [keep * a + (1 - keep) * b for a, b in zip(state, new)]
                active = (t < lengths)[:, None] if lengths is not None else torch.tensor(True)
                output[t] = torch.where(active, new[0], 0.0)
                state = [torch.where(active, a, b) for a, b in zip(new, state)]
            outputs.append(torch.stack([output[t] for t in range(len(x))]))
            last.append(state)
            k += 1
        x = torch.cat(outputs, 2)
    state_n = tuple(torch.stack(s) for s in zip(*last))
    return x, state_n if len(state_n) > 1 else state_n[0]


SIZES = [(1, 1, 1, None), (7, 6, 3, None), (17, 5, 3, torch.tensor([2, 5, 0])), (33, 3, 2, None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("hidden", "T", "B", "lengths"), SIZES, ids=str)
@each_cell
def test_results_and_gradients(cell, hidden, T, B, lengths, dtype, nan_filled):
    deep = {"num_layers": 2, "bidirectional": True} if hidden == 17 else {}
    module = build(cell, hidden, dtype, **deep)
    x, hx = problem(module, T, B)
    got = everything(module, x, hx, lambda m, x, hx: m(x, hx, lengths=lengths))
    exact = build(cell, hidden, **deep)
    exact.load_state_dict(module.state_dict())
    x, hx = ([t.detach().double().requires_grad_() for t in tensors(at)] for at in (x, hx))
    want = everything(exact, x[0], hx, partial(by_the_book, lengths=lengths))
    want = {name: w.to(dtype) for name, w in want.items()}
    assert_same(got, want, 1e-10 if dtype == torch.float64 else 1e-4)


@each_cell
def test_every_derivative(cell):
    module = build(cell, hidden=3)
    x, hx = problem(module, T=3, B=2)

    def f(x, *hx):
        return tuple(tensors(module(x, hx if len(hx) > 1 else hx[0])))

    assert torch.autograd.gradcheck(f, (x, *tensors(hx)), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *tensors(hx)), fast_mode=True)


@each_cell
def test_with_zoneout_and_in_a_graph(cell):
    module = build(cell, zoneout=0.25).eval()
    x, hx = problem(module)
    want = everything(module, x, hx, partial(by_the_book, keep=0.25))
    assert_same(everything(module, x, hx), want)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(everything(module, x, hx, lambda m, x, hx: compiled(x, hx)), want)


def test_the_scale_of_what_comes_in_does_not_matter():
    module = build("lstm")
    x, _ = problem(module)
    assert_same(module(1e3 * x)[0], module(x)[0], 1e-3)


@each_cell
def test_the_kernels_say_why_they_do_not_run_it(cell):
    module = build(cell, dtype=torch.float32)
    x = torch.zeros(3, 2, 5)
    with pytest.raises(RuntimeError, match=r"normalises over all units .* take pointwise steps"):
        module.backend = "triton"
        module(x)
    module.backend = "auto"
    assert "layer 0: torch: a step of" in rnn.explain(module, x)


@each_cell
def test_parameters_and_copies(cell):
    """Saved, pickled into a process that has not built one, and never torch.nn's."""
    module = MODULES[cell](5, 7, 2, layer_norm=True, bidirectional=True)
    names = [f"{n}_l0" for n in ("weight_ih", "weight_hh", *NORMED[cell.upper()].params)]
    assert [n for n, _ in module.named_parameters() if n.endswith("_l0")] == names
    assert (module.gain_x_i_l0 if cell == "lstm" else module.gain_x_r_l0).eq(1).all()
    assert "layer_norm=True" in repr(module)
    saved = pickle.dumps(module)
    del CELLS[module.cell]
    copy, x = pickle.loads(saved), torch.randn(3, 2, 5)
    assert torch.equal(copy(x)[0], module(x)[0])
    assert "torch.nn has no layer_norm" in str(rnn.convert(module, to="torch"))


def test_biases_are_its_own():
    assert rnn.LSTM(5, 7, 1, True, layer_norm=True).bias is False
    for config in ({"bias": False}, {"proj_size": 3}):
        with pytest.raises(ValueError, match="layer_norm=True needs bias=True and proj_size=0"):
            rnn.LSTM(5, 7, layer_norm=True, **config)
    assert recurrent.RecurrentBase.step(build("gru"), torch.zeros(2, 5).double())[0].shape == (2, 7)
