"""rnn.Recurrent as a module: in graphs, in files, step by step, in patterns; what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from own_cells import (  # noqa: F401
    CALLS,
    DEEP,
    DOUBLE,
    LEAKY,
    LENGTHS,
    PEEPHOLE,
    H,
    I,
    each_cell,
    each_own,
    given,
    in_the_tables,
    loop,
    module,
    packed,
)
from torch import Tensor
from twins import IEEE, assert_same, everything, objective, tensors

import rnn
from rnn.cells import CELLS, Cell

pytestmark = IEEE

# Graphs.


@each_own
@pytest.mark.parametrize(
    "backend, config", [("torch", DEEP), ("triton", {})], ids=["torch", "triton"]
)
def test_compiled_a_layer_is_one_op(cell, backend, config):
    of = module(cell, **config, backend=backend)
    x, hx = given(of, T=3)
    count = []

    def counting(graph, inputs):
        count.append([str(n.target) for n in graph.graph.nodes].count("fused_rnn.layer"))
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(of, backend=counting, fullgraph=True)
    got = everything(of, x, hx, lambda m, x, hx: compiled(x, hx, lengths=LENGTHS // 2))
    assert_same(got, everything(of, x, hx, lambda m, x, hx: m(x, hx, lengths=LENGTHS // 2)))
    assert count == [of.num_layers]


@each_own
def test_the_op_passes_opcheck(cell):
    of = module(cell, 3, backend="torch")
    x, hx = given(of)
    said = rnn.layer.Spec(cell.name, 1)._asdict()
    del said["sizes"]
    each = x, [*tensors(hx), *of.parameters()], None, None
    torch.library.opcheck(
        torch.ops.fused_rnn.layer, each, {**said, "backend": "torch", "save": True}
    )


@each_own
@pytest.mark.parametrize("strict", [False, True])
def test_export(cell, strict):
    """For any number of steps and rows; also where torch.nn's cells have their operator."""
    of = module(cell)
    x, _ = given(of)
    x = x.detach()
    dims = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    for shapes in (None, dims):
        exported = torch.export.export(of, (x,), dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        assert_same(loaded(x), of(x))
    longer = given(of, T=9, B=2)[0].detach()
    assert_same(loaded(longer), of(longer))


@each_own
def test_traced_it_is_its_steps(cell):
    of = module(cell).eval()
    x, _ = given(of)
    with torch.no_grad():
        assert_same(torch.jit.trace(of, (x,))(2 * x), of(2 * x))


@each_own
def test_what_needs_an_operator_of_torch_is_refused(cell):
    of = module(cell)
    with pytest.raises(RuntimeError, match=f"none of the cell '{cell.name}'"):
        torch.jit.script(of)
    (line,) = rnn.convert(of, to="torch")
    assert str(line).startswith("the model itself: rnn.Recurrent, not converted: torch.nn has no")
    assert rnn.convert(of)[0].why_not == "it is one already" and type(of) is rnn.Recurrent
    with pytest.raises(TypeError, match="proj_size"):
        rnn.Recurrent(cell, I, H, proj_size=3)


# The module itself.


@each_own
def test_parameters(cell):
    of = rnn.Recurrent(cell, I, H, **DEEP, dtype=torch.float64)
    own, G = [name for name, _ in cell.own_params], cell.gates
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *own]
    ends = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert [n for n, _ in of.named_parameters()] == [n + end for end in ends for n in names]
    assert of.weight_ih_l0.shape == (G * H, I) and of.weight_ih_l1_reverse.shape == (G * H, 2 * H)
    assert of.weight_hh_l0.shape == (G * H, H) and of.bias_hh_l1.shape == (G * H,)
    assert all(getattr(of, n + end).shape == (H,) for n in own for end in ends)
    assert all(p.dtype == torch.float64 and p.requires_grad for p in of.parameters())
    for end in ends:
        bound = H**-0.5
        for n in names[:4]:
            drawn = getattr(of, n + end)
            assert drawn.abs().max() <= bound and drawn.std() > 0.4 * bound
    assert repr(of) == (
        f"Recurrent({cell.name}, {I}, {H}, num_layers=2, bidirectional=True, backend=auto)"
    )


def test_initial_values_of_own_params():
    of = rnn.Recurrent(LEAKY, I, H)
    assert torch.equal(of.rate_l0, torch.full((H,), 0.25))
    torch.nn.init.zeros_(of.rate_l0)
    of.reset_parameters()
    assert torch.equal(of.rate_l0, torch.full((H,), 0.25))
    wide = rnn.Recurrent(PEEPHOLE, I, 500)
    assert not wide.peep_f_l0.any() and 0.08 < wide.peep_i_l0.std() < 0.12
    empty = rnn.Recurrent(LEAKY, I, H, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty.rate_l0, of.rate_l0)


@each_own
def test_copies_and_files(cell, tmp_path):
    of = module(cell, **DEEP)
    x, hx = given(of)
    expected = everything(of, x, hx)
    torch.save(of.state_dict(), tmp_path / "weights.pt")
    other = module(cell, seed=1, **DEEP)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.save(of, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for twin in (other, loaded, copy.deepcopy(of), pickle.loads(pickle.dumps(of))):
        got = everything(twin, x, hx)
        assert all(torch.equal(got[n], expected[n]) for n in expected)
        assert repr(twin) == repr(of)


def test_a_file_whose_cell_is_unknown(monkeypatch):
    file = pickle.dumps(module(LEAKY))
    monkeypatch.delitem(CELLS, "leaky")
    with pytest.raises(RuntimeError, match=r"cell 'leaky' is not in rnn\.cells"):
        pickle.loads(file)


@each_cell
def test_step_by_step(cell):
    of = module(cell, num_layers=2, **DOUBLE)
    x, _ = given(of)
    output, state_n = of(x)
    state, steps = None, []
    for x_t in x:
        output_t, state = of.step(x_t, state)
        steps.append(output_t)
    assert_same((torch.stack(steps), state), (output, state_n))


@each_cell
@pytest.mark.parametrize("call", CALLS)
def test_checkpoint_every(cell, call):
    of = module(cell, **DEEP, **DOUBLE)
    x, hx = given(of)
    by_call = packed if call == "packed" else lambda m, x, hx: m(x, hx, **CALLS[call])
    expected = everything(of, x, hx, by_call)
    of.checkpoint_every = 2
    assert_same(everything(of, x, hx, by_call), expected)


@each_own
def test_autocast(cell):
    of = module(cell, **DEEP)
    x, hx = given(of)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(of, x, hx)
    assert got["result 0"].dtype == torch.bfloat16 and got["weight_hh_l0"].dtype == torch.float32
    expected = everything(of, x, hx)
    for name, want in expected.items():
        assert (got[name].float() - want).norm() <= 0.05 * want.norm(), name


@each_own
def test_dropout_between_the_layers(cell):
    of = module(cell, **DEEP, dropout=0.9, **DOUBLE)
    x, _ = given(of)
    assert (of(x)[0] - of.eval()(x)[0]).abs().max() > 1e-3
    assert_same(of(x), loop(of, x))


@each_own
def test_explain(cell):
    of = module(cell, num_layers=2)
    x = given(of)[0].detach()
    with torch.no_grad():
        lines = rnn.explain(of, x).splitlines()
    assert len(lines) == 2 and "operator" not in lines[0]
    of.backend = "triton"
    assert "layer 1: triton: W_hh stays in the SRAM" in rnn.explain(of, x)


@each_own
def test_patterns(cell):
    torch.manual_seed(0)
    x, labels = torch.randn(6, 3, I), torch.tensor([1, 0, 2])
    for pattern in (rnn.ManyToOne, rnn.ManyToMany):
        model = pattern(I, H, 4, cell=cell, **DEEP)
        target = labels if pattern is rnn.ManyToOne else labels.expand(6, 3)
        model.loss(x, target, lengths=LENGTHS).backward()
        assert all(p.grad is not None for p in model.parameters())
    model = rnn.EncoderDecoder(I, H, 4, cell=cell)
    model.loss(x, torch.randint(1, 4, (2, 3))).backward()
    assert model.generate(x, max_length=5, beam=2).symbols.size(1) == 3
    with pytest.raises(ValueError, match="cell must be one of"):
        rnn.OneToOne(I, H, 4, cell=cell.name)


# Misuse, with torch.nn's exceptions.

X, ONE = torch.randn(6, 3, I), torch.zeros(1, 3, H)
LONG = torch.zeros(1, 3, H + 1)
MISUSE_OF_ONE = {
    "a pair": ((ONE, ONE), AttributeError),
    "None in a tuple": ((None,), AttributeError),
    "features": (LONG, RuntimeError),
    "2-D": (ONE[0], RuntimeError),
    "float64": (ONE.double(), RuntimeError),
}
MISUSE_OF_THREE = {
    "a tensor": (ONE, IndexError),
    "tensors in one": (torch.zeros(3, 1, 3, H), TypeError),
    "a pair": ((ONE, ONE), IndexError),
    "four": ((ONE,) * 4, RuntimeError),
    "None": ((ONE, ONE, None), AttributeError),
    "features of the last": ((ONE, ONE, LONG), RuntimeError),
    "2-D last": ((ONE, ONE, ONE[0]), RuntimeError),
    "float64 last": ((ONE, ONE, ONE.double()), RuntimeError),
    "elsewhere": ((ONE, ONE, ONE.to("meta")), RuntimeError),
}
MISUSE = [(LEAKY, *m) for m in MISUSE_OF_ONE.values()]
MISUSE += [(PEEPHOLE, *m) for m in MISUSE_OF_THREE.values()]


@pytest.mark.parametrize(
    "cell, hx, error", MISUSE, ids=[*MISUSE_OF_ONE, *(f"three: {n}" for n in MISUSE_OF_THREE)]
)
def test_wrong_states(cell, hx, error):
    with pytest.raises(error) as raised:
        module(cell)(X, hx)
    assert type(raised.value) is error and "hx" in str(raised.value).replace("hidden", "hx")


@each_own
def test_wrong_inputs_and_weights(cell):
    of = module(cell)
    name = cell.own_params[0][0] + "_l0"
    for x, error in (
        (X[0, 0], ValueError),
        (X[None], ValueError),
        (X[..., 1:], RuntimeError),
        (X[:0], RuntimeError),
        (X.double(), ValueError),
    ):
        with pytest.raises(error):
            of(x)
    for weight, error in (
        (torch.zeros(H + 1), RuntimeError),
        (torch.zeros(H, dtype=torch.float64), RuntimeError),
        (None, TypeError),
    ):
        setattr(of, name, None if weight is None else torch.nn.Parameter(weight))
        with pytest.raises(error, match=name):
            of(X)


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_wrong_arguments(error):
    wrong = {
        TypeError: [
            lambda: rnn.Recurrent(rnn.LSTM, I, H),
            lambda: rnn.Recurrent(LEAKY, I, 1.5),
            lambda: rnn.Recurrent(LEAKY, I, H, bias=1),
            lambda: rnn.Recurrent(LEAKY, I),
        ],
        ValueError: [
            lambda: rnn.Recurrent("LSTM", I, H),  # the name is "lstm"
            lambda: rnn.Recurrent(LEAKY, 0, H),
            lambda: rnn.Recurrent(LEAKY, I, H, num_layers=0),
            lambda: rnn.Recurrent(LEAKY, I, H, dropout=2.0),
            lambda: rnn.Recurrent(LEAKY, I, H, backend="cuda"),
            lambda: rnn.Recurrent(LEAKY, I, H, checkpoint_every=0),
            lambda: rnn.Recurrent(copy.copy(LEAKY), I, H),  # in the table under this name: LEAKY
            lambda: rnn.Recurrent(Cell("none", 1, 1, 0, None, None), I, H),
        ],
    }[error]
    for call in wrong:
        with pytest.raises(error):
            call()


def test_wrong_arguments_of_the_function():
    x_gates, h0 = torch.randn(4, 3, 4 * H), torch.zeros(3, H)
    W, p = torch.zeros(4 * H, H), torch.zeros(H)

    def call(h0=(h0,) * 3, params=(p,) * 4, cell=PEEPHOLE):
        return rnn.recurrence(x_gates, h0, W, params, cell=cell)

    assert_same(call(), call(cell="peephole"))
    for kwargs, error, message in (
        ({"h0": h0}, TypeError, r"h0 of peephole must be the tuple \(h0\[0\], h0\[1\], h0\[2\]\)"),
        ({"h0": (h0,) * 2}, TypeError, "must be the tuple"),
        ({"h0": (h0, h0, h0[1:])}, RuntimeError, r"h0\[2\] must be \(3, 17\), got \(2, 17\)"),
        ({"params": (p,) * 3}, RuntimeError, "has the params"),
        ({"params": (p, p, p, p[1:])}, RuntimeError, r"peep_o must be \(17,\), got \(16,\)"),
        ({"cell": "peep"}, ValueError, "cell must be one of"),
        ({"cell": copy.copy(PEEPHOLE)}, ValueError, "is another one"),
    ):
        with pytest.raises(error, match=message):
            call(**kwargs)


def test_objective_sees_every_state():
    """Of the tests' own instrument: a gradient that is lost in one state alone is noticed."""
    of = module(PEEPHOLE, **DOUBLE)
    x, hx = given(of)
    got = everything(of, x, hx, lambda m, x, hx: (m(x, hx)[0], *m(x, hx)[1][:2]))
    assert not torch.equal(got["leaf 3"], everything(of, x, hx)["leaf 3"])
    assert isinstance(objective(of(x, hx)), Tensor)
