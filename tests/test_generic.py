"""rnn.Recurrent: any cell as a module, on every backend, against a plain loop in float64."""

import copy
import io
import pickle

import pytest
import torch
from cases import EACH_CELL, check
from own_cells import LEAKY, OWN, PEEPHOLE, in_the_tables  # noqa: F401
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import IEEE, assert_same, everything, objective, tensors

import rnn
from rnn.cells import CELLS, Cell
from rnn.in_place import IN_PLACE

pytestmark = IEEE
I, H = 5, 17
CELLS_HERE = [LEAKY, CELLS["lstm"], PEEPHOLE]  # of one, two and three states
DEEP = {"num_layers": 2, "bidirectional": True}
DOUBLE = {"dtype": torch.float64, "backend": "torch"}
LENGTHS = torch.tensor([2, 6, 0])
each_cell = pytest.mark.parametrize("cell", CELLS_HERE, ids=lambda c: c.name)
each_own = pytest.mark.parametrize("cell", OWN.values(), ids=OWN)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def module(cell, hidden_size=H, seed=0, **options):
    """With weights that are all drawn, the cell's own among them."""
    torch.manual_seed(seed)
    made = rnn.Recurrent(cell, I, hidden_size, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.split("_l")[0] in dict(cell.own_params):
                p.uniform_(0.1, 0.9)
    return made


def given(of, T=6, B=3):
    """An input (T, B, I) in the module's layout and states, as leaves."""
    generator = torch.Generator().manual_seed(T + B)
    dtype = of.weight_hh_l0.dtype

    def leaf(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    layers = of.num_layers * of.directions
    hx = tuple(leaf(layers, B, of.hidden_size) for _ in range(CELLS[of.cell].states))
    x = leaf(*((B, T) if of.batch_first else (T, B)), I)
    return x, hx if len(hx) > 1 else hx[0]


def loop(of, x, hx=None, lengths=None, resets=None):
    """What the module computes, step by step; x is (T, B, I)."""
    cell, (T, B) = CELLS[of.cell], x.shape[:2]
    weights, last = dict(of.named_parameters()), []
    inner = len(cell.inner_bias)
    for layer in range(of.num_layers):
        outputs = []
        for backwards in [False, True][: of.directions]:
            end = f"_l{layer}" + "_reverse" * backwards
            W_ih, W_hh = weights["weight_ih" + end], weights["weight_hh" + end]
            b_ih = weights["bias_ih" + end] if of.bias else 0.0
            b_hh = weights["bias_hh" + end] if of.bias else 0.0
            params = [x.new_zeros(of.hidden_size)] * inner  # b_hh is in h_gates, all of it
            params += [weights[name + end] for name, _ in cell.own_params]
            zeros = x.new_zeros(B, of.hidden_size)
            state = (zeros,) * cell.states
            if hx is not None:
                state = tuple(s[len(last)] for s in tensors(hx))
            output = [zeros] * T
            for t in reversed(range(T)) if backwards else range(T):
                if resets is not None and t + backwards < T:  # where a segment begins, or has begun
                    begins = resets[t + backwards]
                    if lengths is not None:
                        begins = begins & (t + backwards < lengths)
                    state = tuple(torch.where(begins[:, None], zeros, s) for s in state)
                x_gates = (x[t] @ W_ih.t() + b_ih).chunk(cell.gates, 1)
                h_gates = (state[0] @ W_hh.t() + b_hh).chunk(cell.gates, 1)
                new, _ = cell.step(x_gates, h_gates, state, tuple(params))
                active = torch.ones(B, 1, dtype=torch.bool)
                if lengths is not None:
                    active = (t < lengths)[:, None]
                state = tuple(torch.where(active, a, b) for a, b in zip(new, state))
                output[t] = torch.where(active, state[0], zeros)
            outputs.append(torch.stack(output))
            last.append(state)
        x = torch.cat(outputs, 2)
    state_n = tuple(torch.stack(s) for s in zip(*last))
    return x, state_n if len(state_n) > 1 else state_n[0]


def in_float64(of, x, hx):
    """The same module, input and states in float64, as leaves."""
    twin = copy.deepcopy(of).double()
    x, *hx = (t.detach().double().requires_grad_() for t in (x, *tensors(hx)))
    return twin, x, tuple(hx) if len(hx) > 1 else hx[0]


def packed(of, x, hx=None, **kwargs):
    """The call on packed rows, of lengths 6, 2 and 1; the loop on those lengths."""
    lengths = torch.tensor([2, 6, 1])
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state = of(rows, hx)
    assert isinstance(output, PackedSequence)
    return torch.nn.utils.rnn.pad_packed_sequence(output)[0], state


RESETS = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) < 0.4
CALLS = {
    "padded": {},
    "lengths": {"lengths": LENGTHS},
    "packed": {"lengths": torch.tensor([2, 6, 1])},
    "resets": {"resets": RESETS},
    "resets and lengths": {"resets": RESETS, "lengths": LENGTHS},
}


def assert_like_the_loop(of, call, T=6, B=3):
    """Results and all gradients, to rounding of the dtype."""
    x, hx = given(of, T, B)
    by_call = packed if call == "packed" else lambda m, x, hx: m(x, hx, **CALLS[call])
    got = everything(of, x, hx, by_call)
    expected = everything(*in_float64(of, x, hx), lambda m, x, hx: loop(m, x, hx, **CALLS[call]))
    assert len(got) == len(expected)
    if of.weight_hh_l0.dtype == torch.float64:
        assert_same(got, expected)
    else:
        assert_same({n: g.double() for n, g in got.items()}, expected, 1e-5)


# Against the loop.


@each_own
@pytest.mark.parametrize("case", EACH_CELL, ids=str)
def test_the_function_on_the_torch_backend(cell, case, nan_filled):
    check(case._replace(cell=cell.name), torch.float64, "torch", "cpu")


@each_own
@pytest.mark.parametrize("case", [case for case in EACH_CELL if case.B < 7], ids=str)
def test_the_function_in_the_kernels(cell, case, nan_filled):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(case._replace(cell=cell.name), torch.float32, "triton", device)


@each_cell
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("config", [{}, DEEP, {"bias": False}], ids=["plain", "deep", "no-bias"])
def test_module_on_the_torch_backend(cell, config, call, nan_filled):
    assert_like_the_loop(module(cell, **config, **DOUBLE), call)


@pytest.mark.parametrize("cell, call", [(PEEPHOLE, call) for call in CALLS] + [(LEAKY, "packed")])
def test_module_in_the_kernels(cell, call, nan_filled):
    assert_like_the_loop(module(cell, bidirectional=True, backend="triton"), call)


def test_two_layers_in_the_kernels(nan_filled):
    assert_like_the_loop(module(PEEPHOLE, **DEEP, backend="triton"), "padded", T=2)


@each_own
@each_backend
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 33), (3, 1, 17)], ids=str)
def test_odd_sizes(cell, backend, sizes):
    T, B, hidden = sizes
    assert_like_the_loop(module(cell, hidden, bidirectional=True, backend=backend), "padded", T, B)


@each_own
def test_without_hx_without_a_batch_and_batch_first(cell):
    of = module(cell, **DEEP, **DOUBLE, batch_first=True)
    x, _ = given(of)
    output, state = of(x)
    expected = loop(of, x.transpose(0, 1))
    assert_same((output.transpose(0, 1), state), expected)
    alone, state_alone = of(x[1])
    assert_same(alone, output[1], 1e-12)
    assert_same(state_alone, [s[:, 1] for s in tensors(state)], 1e-12)


@pytest.mark.parametrize("name", sorted(IN_PLACE))
@pytest.mark.parametrize("case", EACH_CELL, ids=str)
def test_cells_without_a_form_in_place(name, case, monkeypatch, nan_filled):
    """The built-in cells by their step and VJP alone."""
    monkeypatch.delitem(IN_PLACE, name)
    check(case._replace(cell=name), torch.float64, "torch", "cpu")


def test_states_that_only_change_places(monkeypatch):
    """Their gradients are each other's: none is written over before it is read."""

    def step(x_gates, h_gates, state, params):
        h = torch.tanh(x_gates[0] + h_gates[0] + state[1])
        return (h, state[2], state[1]), ()

    def step_vjp(d_state, state_prev, state, saved, params):
        d = d_state[0] * (1 - state[0] * state[0])
        return (d,), (d,), (None, d_state[2] + d, d_state[1]), ()

    cell = Cell("exchange", 1, 3, 0, step, step_vjp)
    monkeypatch.setitem(CELLS, "exchange", cell)
    of = module(cell, bidirectional=True, **DOUBLE)
    assert_like_the_loop(of, "lengths")
    of.backend = "triton"
    with pytest.raises(RuntimeError, match="the cell exchange has no tiles"):
        of(given(of)[0])


@each_own
@each_backend
def test_the_same_bits_from_run_to_run(cell, backend):
    of = module(cell, bidirectional=True, backend=backend)
    x, hx = given(of, T=3)
    first, second = (
        everything(of, x, hx, lambda m, *a: m(*a, lengths=LENGTHS // 2)) for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm"])
def test_built_in_cells_give_the_built_in_modules(name):
    torch.manual_seed(0)
    generic = rnn.Recurrent(CELLS[name], I, H, **DEEP)
    torch.manual_seed(0)
    own = rnn.modules.MODULES[name](I, H, **DEEP)
    x, hx = given(own)
    a, b = everything(generic, x, hx), everything(own, x, hx)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# Derivatives of other forms.


def function_of_all(of, T=3, B=2):
    names = [n for n, _ in of.named_parameters()]
    x, hx = given(of, T, B)
    states = len(tensors(hx))
    leaves = (x, *tensors(hx), *(p.detach().clone().requires_grad_() for p in of.parameters()))

    def f(x, *rest):
        state = rest[0] if states == 1 else rest[:states]
        named = dict(zip(names, rest[states:]))
        kwargs = {"lengths": torch.tensor([1, T])}
        return tuple(tensors(functional_call(of, named, (x, state), kwargs)))

    return f, leaves


@each_own
def test_first_and_second_derivatives(cell):
    f, leaves = function_of_all(module(cell, 1, bidirectional=True, **DOUBLE))
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    f, leaves = function_of_all(module(cell, 1, **DOUBLE), T=2)
    assert gradgradcheck(f, leaves)


@each_own
def test_second_derivative_of_the_kernels(cell):
    seconds = []
    for backend in ("triton", "torch"):
        of = module(cell, backend=backend)
        x, hx = given(of, T=3)
        (first,) = torch.autograd.grad(of(x, hx)[0].square().sum(), x, create_graph=True)
        first.square().sum().backward()
        seconds.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    assert_same(*seconds, 1e-3)


@each_own
def test_vmap_and_jvp(cell):
    of = module(cell, 3, **DOUBLE)
    x, _ = given(of, B=4)
    many = torch.stack((x, 2 * x))
    with torch.no_grad():
        assert_same(vmap(lambda x: of(x)[0])(many), torch.stack([of(x)[0] for x in many]))
    p = {n: w.detach() for n, w in of.named_parameters()}
    tangent = {n: torch.ones_like(w) for n, w in p.items()}
    _, slope = jvp(lambda w: functional_call(of, w, (x,))[0], (p,), (tangent,))
    step = 1e-6
    ends = [
        functional_call(of, {n: w + sign * step for n, w in p.items()}, (x,))[0] for sign in (1, -1)
    ]
    assert_same(slope, (ends[0] - ends[1]) / (2 * step), 1e-7)


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
            lambda: rnn.Recurrent("lstm", I, H),
            lambda: rnn.Recurrent(LEAKY, I, 1.5),
            lambda: rnn.Recurrent(LEAKY, I, H, bias=1),
            lambda: rnn.Recurrent(LEAKY, I),
        ],
        ValueError: [
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
