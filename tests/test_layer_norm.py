"""The layer-normalised LSTM and GRU: as their equations, by autograd through F.layer_norm."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import EACH_CELL, check
from torch.nn.utils.rnn import pack_padded_sequence
from twins import IEEE, assert_same, everything, problem, tensors

import rnn
from rnn import layer_norm, recurrent
from rnn.cells import CELLS
from rnn.kernels.chips import CHIPS
from rnn.kernels.limits import Layer
from rnn.kernels.plan import PortablePlan, plan
from rnn.layer_norm import NORMED

pytestmark = [
    *IEEE,
    pytest.mark.usefixtures("registered"),
    # of numpy, at rows that do not exist
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MODULES = {"lstm": rnn.LSTM, "gru": rnn.GRU}
BACKENDS = ["torch", "triton"]
each_cell = pytest.mark.parametrize("cell", MODULES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def registered(derived):
    layer_norm.register()


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


SIZES = [(1, 1, 1, None), (7, 6, 3, None), (17, 5, 3, torch.tensor([2, 5, 0])), (31, 3, 9, None)]
RUNS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]


@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize(("hidden", "T", "B", "lengths"), SIZES, ids=str)
@each_cell
def test_results_and_gradients(cell, hidden, T, B, lengths, backend, dtype, checked, nan_filled):
    """Padding holds NaN."""
    deep = {"num_layers": 2, "bidirectional": True} if hidden == 17 else {}
    module = build(cell, hidden, dtype, **deep, backend=backend)
    x, hx = problem(module, T, B)
    if lengths is not None:
        with torch.no_grad():
            x[torch.arange(T)[:, None] >= lengths] = torch.nan
    got = everything(module, x, hx, lambda m, x, hx: m(x, hx, lengths=lengths))
    if lengths is not None:
        with torch.no_grad():
            x.nan_to_num_()
    exact = build(cell, hidden, **deep)
    exact.load_state_dict(module.state_dict())
    x, hx = ([t.detach().double().requires_grad_() for t in tensors(at)] for at in (x, hx))
    want = everything(exact, x[0], hx, partial(by_the_book, lengths=lengths))
    want = {name: w.to(dtype) for name, w in want.items()}
    assert_same(got, want, 1e-10 if dtype == torch.float64 else 1e-4)


@each_backend
@pytest.mark.parametrize("shape", [EACH_CELL[k] for k in (0, 1, 7)], ids=str)
@each_cell
def test_the_step_alone(cell, shape, backend, checked, nan_filled):
    """By rnn.recurrence, to whom x_gates are given."""
    check(shape._replace(cell=f"{cell}_norm"), torch.float32, backend, "cpu")


@pytest.mark.parametrize("shape", [EACH_CELL[k] for k in (2, 5)], ids=str)
@each_cell
def test_the_kernels_in_16_bits(cell, shape, checked, nan_filled):
    check(shape._replace(cell=f"{cell}_norm"), torch.float16, "triton", "cpu")


RESETS = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) < 0.4
CALLS = {
    "lengths": lambda m, x, hx: m(x, hx, lengths=torch.tensor([2, 6, 0])),
    "packed": lambda m, x, hx: m(pack_padded_sequence(x, torch.tensor([6, 4, 1])), hx),
    "resets": lambda m, x, hx: m(x, hx, resets=RESETS),
}
CONFIGS = [
    {},
    {"bidirectional": True, "checkpoint_every": 4},
    {"recurrent_dropout": 0.5, "zoneout": 0.25, "recurrent_grad_clip": 0.5, "num_layers": 2},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "in pieces", "regularised"])
@pytest.mark.parametrize("call", CALLS)
@each_cell
def test_both_backends_agree(cell, call, config, checked, nan_filled):
    each = []
    for backend in BACKENDS:
        module = build(cell, dtype=torch.float32, backend=backend, **config)
        x, hx = problem(module)
        torch.manual_seed(1)
        each.append(everything(module, x, hx, CALLS[call]))
    assert_same(*each)


@each_backend
@each_cell
def test_the_layout_and_a_mixed_dtype_do_not_matter(cell, backend):
    module = build(cell, dtype=torch.float32, backend=backend)
    x, hx = problem(module)
    want = module(x, hx)
    module.batch_first = True
    output, last = module(x.transpose(0, 1), hx)
    assert_same((output.transpose(0, 1), last), want)
    if backend == "torch":  # the interpreter has no bfloat16
        with torch.autocast("cpu"):
            mixed, _ = module(x.transpose(0, 1), hx)
        assert mixed.dtype == torch.bfloat16
        assert_same(mixed.float(), output, 0.1)


@each_cell
def test_every_derivative(cell):
    module = build(cell, hidden=3)
    x, hx = problem(module, T=3, B=2)

    def f(x, *hx):
        return tuple(tensors(module(x, hx if len(hx) > 1 else hx[0])))

    assert torch.autograd.gradcheck(f, (x, *tensors(hx)), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *tensors(hx)), fast_mode=True)


@each_backend
@each_cell
def test_with_zoneout_and_in_a_graph(cell, backend):
    module = build(cell, dtype=torch.float32, zoneout=0.25, backend=backend).eval()
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
def test_one_block_holds_all_units(cell):
    x = torch.zeros(3, 2, 5)
    assert "SRAM of 1 block(s)" in rnn.explain(build(cell, 31, x.dtype, backend="triton"), x)
    too_large = build(cell, 200, x.dtype, backend="triton")
    why = r"normalises over all units needs one block .* hidden size 200 in float32 .*is too large"
    with pytest.raises(RuntimeError, match=why):
        too_large(x)


@pytest.mark.parametrize("cell", NORMED.values(), ids=lambda c: c.name)
def test_a_chip_of_many_blocks_has_one_for_it(cell):
    """And the Hopper engine none."""
    numbers = cell.gates, cell.states, cell.stored, len(cell.params)
    layer = Layer(*numbers, 128, 16, 1, torch.bfloat16, True, across=True)
    planned = plan(layer, CHIPS["sm_90"].limits())
    assert isinstance(planned, PortablePlan) and planned.slices == 1
    assert planned.why == "the Hopper engine has no step that reads all units of a row"
    none = plan(layer._replace(hidden_size=512), CHIPS["sm_90"].limits())
    assert "needs one block that holds all of W_hh" in str(none)


@each_cell
def test_parameters_and_copies(cell):
    """Saved, pickled into a process that has not built one, and never torch.nn's."""
    module = MODULES[cell](5, 7, 2, layer_norm=True, bidirectional=True)
    names = [f"{n}_l0" for n in ("weight_ih", "weight_hh", *dict(NORMED[cell.upper()].learned))]
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
