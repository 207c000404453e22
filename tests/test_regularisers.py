"""Dropout of h, zoneout and clipping of the gradient of h, on both backends."""

import pickle
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    IEEE,
    KINDS,
    assert_same,
    each_backend,
    each_cell,
    everything,
    problem,
    tensors,
)

import rnn
from rnn import cells, recurrent
from rnn.kernels.chips import CHIPS
from rnn.kernels.limits import Layer
from rnn.kernels.plan import plan

pytestmark = IEEE

EACH = {
    "dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "clipping": {"recurrent_grad_clip": 0.2},
}
ALL = {name: value for regulariser in EACH.values() for name, value in regulariser.items()}
TORCH, FLOAT32, TRITON = RUNS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("triton", torch.float32),
]


def build(cell, hidden=7, backend="torch", dtype=torch.float64, **config):
    _, ours, told = KINDS[cell]
    torch.manual_seed(0)
    return ours(5, hidden, backend=backend, **told, **config).to(dtype)


def seeded(module, x, hx, seed=3, **call):
    torch.manual_seed(seed)
    return module(x, hx, **call)


@pytest.fixture
def drawn(monkeypatch):
    """The masks that are drawn, in their order: h_mask and keep of each layer, where it has one."""
    masks = []

    def recorded(draw, *args):
        masks.append(draw(*args))
        return masks[-1]

    for name in ("draw_h_mask", "draw_keep"):
        monkeypatch.setattr(recurrent, name, partial(recorded, getattr(recurrent, name)))
    return masks


def by_the_book(module, x, hx, masks, lengths=None):
    """A plain loop under autograd, with masks of (D, B, H) and (T, B, D * S * H)."""
    cell, D, H, T = cells.CELLS[module.cell], module.directions, module.hidden_size, x.size(0)
    masks, clip = [m.double() for m in masks], module.recurrent_grad_clip
    weights, last = iter(module.all_weights), []
    for layer in range(module.num_layers):
        h_mask = masks.pop(0) if module.training and module.recurrent_dropout else None
        keep = masks.pop(0) if module.zoneout else None
        outputs = []
        for d in range(D):
            w_ih, w_hh, b_ih, b_hh = next(weights)
            state = [s[layer * D + d] for s in tensors(hx)]
            output = [None] * T
            for t in reversed(range(T)) if d else range(T):
                h = state[0]
                if clip is not None:
                    h = h * 1.0
                    h.register_hook(lambda g: g.clamp(-clip, clip))
                old = [h, *state[1:]]
                inner = [b_hh[k * H : (k + 1) * H] for k in cell.inner_bias]
                b_rest = b_hh.clone()
                for k in cell.inner_bias:
                    b_rest[k * H : (k + 1) * H] = 0
                gates = (x[t] @ w_ih.t() + b_ih + b_rest).chunk(cell.gates, 1)
                h_gates = ((h if h_mask is None else h_mask[d] * h) @ w_hh.t()).chunk(cell.gates, 1)
                new = list(cell.step(gates, h_gates, tuple(old), tuple(inner))[0])
                if keep is not None:
                    k = keep[t].chunk(D, 1)[d].chunk(len(new), 1)
                    new = [k * a + (1 - k) * b for k, a, b in zip(k, old, new)]
                active = torch.ones(x.size(1), 1, dtype=torch.bool)
                if lengths is not None:
                    active = (t < lengths)[:, None]
                output[t] = torch.where(active, new[0], 0.0)
                state = [torch.where(active, a, b) for a, b in zip(new, state)]
            outputs.append(torch.stack(output))
            last.append(state)
        x = torch.cat(outputs, 2)
    state_n = tuple(torch.stack(s) for s in zip(*last))
    return x, state_n if len(state_n) > 1 else state_n[0]


DEEP = {"num_layers": 2, "bidirectional": True}
SIZES = {  # hidden, T, B, lengths, more
    "one": (1, 1, 1, None, {}),
    "layer": (33, 3, 2, None, {}),
    "deep": (17, 5, 3, torch.tensor([2, 5, 0]), DEEP),
}
CASES = [  # regularisers, size, engine and dtype, whether in training
    *((name, "deep", TORCH, True) for name in EACH),
    *(("all", size, run, True) for size in SIZES for run in RUNS),
    *(("all", "deep", run, False) for run in RUNS),
]


@pytest.mark.parametrize(("regularisers", "size", "run", "training"), CASES, ids=str)
@each_cell
def test_results_and_gradients(cell, size, regularisers, training, run, drawn, nan_filled):
    """As a plain loop in float64 with the same masks."""
    hidden, T, B, lengths, more = SIZES[size]
    backend, dtype = run
    if cell == "rnn_relu" and dtype != torch.float64:
        return  # a kink, where rounding decides between a gradient and none
    more = more | EACH.get(regularisers, ALL)
    module = build(cell, hidden, backend, dtype, **more).train(training)
    x, hx = problem(module, T, B)
    got = everything(module, x, hx, partial(seeded, lengths=lengths))
    exact = build(cell, hidden, **more).train(training)
    exact.load_state_dict(module.state_dict())
    x, hx = ([t.detach().double().requires_grad_() for t in tensors(leaves)] for leaves in (x, hx))
    want = everything(exact, x[0], hx, partial(by_the_book, masks=list(drawn), lengths=lengths))
    want = {name: w.to(dtype) for name, w in want.items()}
    assert_same(got, want, 1e-11 if dtype == torch.float64 else 2e-5)


@each_cell
def test_clipping_changes_the_gradient(cell):
    """The bound of these tests is one that matters; a high one is none."""
    results = []
    for clip in (None, 1e9, 0.2):
        module = build(cell, recurrent_grad_clip=clip)
        results.append(everything(module, *problem(module)))
    assert_same(results[0], results[1])
    assert_same(results[0]["result 0"], results[2]["result 0"])
    assert not torch.allclose(results[0]["weight_hh_l0"], results[2]["weight_hh_l0"], rtol=0.01)


def test_what_a_step_hands_on_is_clamped_and_the_rest_is_not():
    """One unit, h_t = relu(2 h_{t-1}): h_n's gradient of 1 comes to h_0 as 2^T, or as the bound."""
    for clip, want in ((None, 8.0), (1.5, 1.5), (3.0, 3.0)):
        module = rnn.RNN(1, 1, nonlinearity="relu", bias=False, recurrent_grad_clip=clip)
        torch.nn.init.constant_(module.weight_hh_l0, 2.0)
        torch.nn.init.zeros_(module.weight_ih_l0)
        h0 = torch.ones(1, 1, 1, requires_grad=True)
        module(torch.zeros(3, 1, 1), h0)[1].backward()
        assert h0.grad.item() == want


# Masks


@pytest.mark.parametrize("resets", [None, torch.arange(18).view(6, 3) % 4 == 2], ids=["", "cut"])
@each_cell
def test_one_seed_gives_one_mask_on_both_backends(cell, resets, drawn):
    module = build(cell, dtype=torch.float32, **ALL, **DEEP)
    x, hx = problem(module)
    outputs = []
    for module.backend in ("torch", "triton", "torch"):
        outputs.append(seeded(module, x, hx, resets=resets)[0])
    each = len(drawn) // 3
    first, second, third = drawn[:each], drawn[each : 2 * each], drawn[2 * each :]
    assert each == 4 and all(map(torch.equal, first, second))
    assert torch.equal(outputs[0], outputs[2]) and all(map(torch.equal, first, third))
    assert_same(outputs[1], outputs[0])
    assert not torch.equal(outputs[0], module(x, hx, resets=resets)[0])


def test_of_what_numbers_masks_are():
    module = rnn.LSTM(3, 50, recurrent_dropout=0.25, zoneout=(0.1, 0.6), bidirectional=True)
    x = torch.zeros(40, 20, 3)
    spec = module._spec(module._prepare(x, None, None), None)
    h_mask, keep = module._masks(spec, x, 20)
    assert h_mask.shape == (2, 20, 50) and keep.shape == (40, 20, 200)
    assert set(h_mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert set(keep.unique().tolist()) == {0.0, 1.0}

    def share(x, p):  # within five standard deviations
        assert abs(x.double().mean().item() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5

    share(h_mask == 0, 0.25)
    for part, p in zip(keep.chunk(4, 2), (0.1, 0.6, 0.1, 0.6)):
        share(part, p)
        share(part[1:] * part[:-1], p * p)  # drawn anew at each step


@each_cell
@each_backend
def test_the_ends_of_probability(cell, backend):
    module = build(cell, backend=backend, dtype=torch.float32, zoneout=1.0)
    x, hx = problem(module)
    assert_same(module(x, hx)[1], hx)
    module = build(cell, backend=backend, dtype=torch.float32, recurrent_dropout=1.0)
    no_product = build(cell, dtype=torch.float32)
    torch.nn.init.zeros_(no_product.weight_hh_l0)
    assert_same(module(x, hx), no_product(x, hx))


@each_cell
def test_evaluation_without_zoneout_is_torch_nns(cell):
    theirs, _, told = KINDS[cell]
    module = build(cell, recurrent_dropout=0.5, recurrent_grad_clip=1.0).eval()
    twin = theirs(5, 7, **told).double()
    twin.load_state_dict(module.state_dict())
    assert_same(module(*problem(module)), twin(*problem(module)))


@each_cell
def test_every_derivative(cell):
    module = build(cell, hidden=3, recurrent_dropout=0.3, zoneout=0.3, bidirectional=True)
    x, hx = problem(module, T=4, B=2)

    def f(x, *hx):
        return tuple(tensors(seeded(module, x, hx if len(hx) > 1 else hx[0])))

    leaves = (x, *tensors(hx))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


# With the other features of a call


@pytest.mark.parametrize("run", [TORCH, TRITON], ids=["torch", "triton"])
@each_cell
def test_packed_rows(cell, run, monkeypatch):
    """As padded ones of the same masks."""
    backend, dtype = run
    module = build(cell, 17, backend, dtype, **ALL, bidirectional=True)
    x, hx = problem(module)
    lengths = torch.tensor([6, 4, 1])
    states = cells.CELLS[cell].states
    keep = torch.bernoulli(torch.full((6, 3, 2 * states * 17), 0.3, dtype=dtype))
    for given in (keep, pack_padded_sequence(keep, lengths).data):
        monkeypatch.setattr(recurrent, "draw_keep", lambda *args, given=given: given)
        if given is keep:
            want = everything(module, x, hx, partial(seeded, lengths=lengths))
        else:

            def call(module, x, hx):
                output, state = seeded(module, pack_padded_sequence(x, lengths), hx)
                return torch.nn.utils.rnn.pad_packed_sequence(output)[0], state

            assert_same(everything(module, x, hx, call), want)


@pytest.mark.parametrize("call", ["whole", "lengths", "packed", "resets"])
@each_cell
def test_steps_that_are_computed_anew_see_the_same_masks(cell, call):
    """checkpoint_every changes no bit."""
    module = build(cell, **ALL, **DEEP, batch_first=True)
    x, hx = problem(module, T=7)

    def run(module, x, hx):
        if call == "packed":
            ends = torch.tensor([7, 3, 3])
            return seeded(module, pack_padded_sequence(x, ends, batch_first=True), hx)
        how = {"lengths": torch.tensor([2, 7, 0])} if call == "lengths" else {}
        if call == "resets":
            how["resets"] = torch.arange(21).view(3, 7) % 4 == 2
        return seeded(module, x, hx, **how)

    want = everything(module, x, hx, run)
    module.checkpoint_every = 3
    got = everything(module, x, hx, run)
    assert all(torch.allclose(got[name], x, rtol=1e-13, atol=1e-13) for name, x in want.items())


@each_cell
def test_a_graph_of_one_piece(cell):
    module = build(cell, dtype=torch.float32, **ALL, **DEEP)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, hx = problem(module)
    want = everything(module, x, hx, seeded)
    assert_same(everything(module, x, hx, lambda m, x, hx: seeded(compiled, x, hx)), want)


def test_opcheck():
    """PyTorch's own tests of an op, with masks among its tensors."""
    module = build("lstm", dtype=torch.float32, **ALL)
    x, state0 = problem(module)
    spec = module._spec(module._prepare(x, None, None), None)
    given = spec._asdict() | {"backend": "torch", "save": True}
    del given["sizes"]
    tensors = [*state0, *module._masks(spec, x, 3), *module.parameters()]
    torch.library.opcheck(torch.ops.fused_rnn.layer.default, (x, tensors, None, None), given)


@each_cell
def test_under_vmap(cell):
    """In training only where vmap is told what randomness means; in evaluation as a loop."""
    module = build(cell, **ALL)
    x = torch.randn(4, 6, 3, 5, dtype=torch.float64)

    def output(x):
        return module(x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(output)(x)
    rows = torch.vmap(output, randomness="different")(x[:1].expand_as(x))
    assert not torch.equal(rows[0], rows[1])
    rows = torch.vmap(output, randomness="same")(x[:1].expand_as(x))
    assert_same(rows[0], rows[1])
    module.eval()
    assert_same(torch.vmap(output)(x), torch.stack([output(row) for row in x]))


@each_cell
def test_steps_of_a_stream_in_evaluation(cell):
    module = build(cell, **ALL).eval()
    x, state = problem(module)
    want, outputs = module(x, state), []
    for x_t in x:
        output, state = module.step(x_t, state)
        outputs.append(output)
    assert_same((torch.stack(outputs), state), want)


def test_half_precision_and_autocast():
    module = build("gru", 16, dtype=torch.bfloat16, **ALL)
    x, hx = problem(module)
    output, _ = seeded(module, x, hx)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and module.weight_hh_l0.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert seeded(module.float(), x.float(), hx.float())[0].dtype == torch.bfloat16


# What is asked for, and what cannot be had

WRONG = [
    ({"recurrent_dropout": 1.5}, "recurrent_dropout should be a number in range"),
    ({"recurrent_dropout": True}, "recurrent_dropout should be a number"),
    ({"recurrent_dropout": "0.5"}, "recurrent_dropout should be a number"),
    ({"zoneout": -0.1}, "zoneout should be a number in range"),
    ({"zoneout": (0.1, 2.0)}, "zoneout should be a number in range"),
    ({"zoneout": (0.1, 0.1, 0.1)}, "zoneout should be a number or 2"),
    ({"zoneout": float("nan")}, "zoneout should be a number in range"),
    ({"recurrent_grad_clip": 0.0}, "recurrent_grad_clip should be a number above 0 or None"),
    ({"recurrent_grad_clip": float("nan")}, "recurrent_grad_clip should be a number above 0"),
    ({"recurrent_dropout": 0.5, "proj_size": 3}, "recurrent_dropout needs proj_size=0"),
]


@pytest.mark.parametrize(("config", "match"), WRONG, ids=str)
def test_wrong_values(config, match):
    with pytest.raises(ValueError, match=match):
        rnn.LSTM(5, 7, **config)


def test_a_pair_for_one_state():
    with pytest.raises(ValueError, match="zoneout should be a number"):
        rnn.GRU(5, 7, zoneout=(0.1, 0.2))


def test_what_torch_nn_lacks_is_not_given_to_it():
    module = torch.nn.Sequential(rnn.LSTM(5, 7, zoneout=(0.0, 0.1)))
    with pytest.raises(RuntimeError, match="has no zoneout"):
        torch.jit.script(module)
    assert "has no zoneout" in str(rnn.convert(module, to="torch"))
    module[0].zoneout = 0.0
    assert "-> torch.nn.LSTM" in str(rnn.convert(module, to="torch"))


def test_what_a_module_says_of_itself():
    module = rnn.LSTM(5, 7, recurrent_dropout=0.5, zoneout=(0.1, 0.2), recurrent_grad_clip=1)
    said = "recurrent_dropout=0.5, zoneout=(0.1, 0.2), recurrent_grad_clip=1.0"
    assert said in repr(module) and said in repr(pickle.loads(pickle.dumps(module)))
    assert module.state_dict().keys() == torch.nn.LSTM(5, 7).state_dict().keys()
    assert "dropout" not in repr(rnn.LSTM(5, 7))


def test_which_engine_runs():
    """PyTorch's own operator where nothing is on; never Hopper's, which says so."""
    x, module = torch.zeros(3, 2, 5), rnn.LSTM(5, 7, recurrent_dropout=0.5)
    assert "own operator" not in rnn.explain(module, x)
    assert "own operator" in rnn.explain(module.eval(), x)
    layer = Layer(4, 2, 5, 0, 128, 8, 1, torch.bfloat16, True)
    limits = CHIPS["sm_90"].limits()
    assert "Hopper" in str(plan(layer, limits))
    chosen = str(plan(layer._replace(regularised=True), limits))
    assert "portable engine: the Hopper engine has no dropout of h" in chosen
