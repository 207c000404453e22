"""torch.compile: each module is one graph, forward and backward, whatever its number of steps and
rows."""

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import (
    BACKENDS,
    IEEE,
    H,
    I,
    assert_same,
    each_cell,
    everything,
    objective,
    problem,
    tensors,
    twins,
)

import rnn
from rnn import layer
from rnn.cells import CELLS

pytestmark = [*IEEE, pytest.mark.usefixtures("fresh_compiler")]

SIZES = [(6, 3), (9, 3), (20, 5), (3, 2), (17, 4), (40, 6), (5, 9)]  # T, B
CONFIGS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "batch first, no bias": {"batch_first": True, "bias": False},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def compiled(module, **options):
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


def same_as_eager(ours, sizes=SIZES, tolerance=None, lengths=False, **options):
    """For each size: results and gradients of x, hx and all weights."""
    graph = compiled(ours, **options)
    for T, B in sizes:
        x, hx = problem(ours, T=T, B=B)
        given = {"lengths": torch.arange(B) % (T + 1)} if lengths else {}
        expected = everything(ours, x, hx, lambda m, x, hx, g=given: m(x, hx, **g))
        got = everything(ours, x, hx, lambda m, x, hx, g=given: graph(x, hx, **g))
        assert_same(got, expected, tolerance)


@each_cell
@each_config
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_one_graph_for_every_number_of_steps_and_rows(cell, config, backend):
    same_as_eager(twins(cell, backend=backend, **config)[1], dynamic=True)
    assert graphs() == 1


@each_cell
@pytest.mark.parametrize("backend", [BACKENDS[2]])
@pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])
def test_the_kernels_in_one_graph(cell, lengths, backend):
    ours = twins(cell, backend=backend, bidirectional=lengths, batch_first=not lengths)[1]
    same_as_eager(ours, [(4, 3), (3, 6)], lengths=lengths, dynamic=True)
    assert graphs() == 1


@each_cell
def test_no_new_graph_after_the_first_dynamic_one(cell):
    """Left to itself torch.compile takes sizes for fixed until they change: T, then B."""
    ours = twins(cell, backend="auto")[1]
    same_as_eager(ours, SIZES[:3])
    assert graphs() == 3
    same_as_eager(ours, SIZES)
    assert graphs() == 3


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_lengths_in_a_graph(cell, backend):
    ours = twins(cell, backend=backend, num_layers=2, bidirectional=True)[1]
    same_as_eager(ours, lengths=True, dynamic=True)
    assert graphs() == 1


@each_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_in_a_graph(cell, dtype):
    ours = twins(cell, backend="auto", dtype=dtype)[1]
    same_as_eager(ours, tolerance=2e-2 if dtype == torch.bfloat16 else None, dynamic=True)


@each_cell
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_in_a_graph(cell, where):
    ours = twins(cell, backend="auto", num_layers=2)[1]
    x, hx = problem(ours)

    def call(x, hx):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x, hx)

    expected = everything(ours, x, hx, lambda m, x, hx: call(x, hx))
    if where == "inside":
        graph = compiled(call)
    else:
        module = compiled(ours)

        def graph(x, hx):
            with torch.autocast("cpu", torch.bfloat16):
                return module(x, hx)

    got = everything(ours, x, hx, lambda m, x, hx: graph(x, hx))
    assert got["result 0"].dtype == torch.bfloat16
    assert_same(got, expected, 2e-2)


@each_cell
def test_dropout_of_one_seed_in_a_graph(cell):
    ours = twins(cell, num_layers=3, dropout=0.5)[1]
    results = []
    for module in (ours, compiled(ours)):
        torch.manual_seed(1)
        x, hx = problem(ours)
        results.append(everything(ours, x, hx, lambda m, x, hx, f=module: f(x, hx)))
    assert_same(*results)


@each_cell
def test_unbatched_and_without_states(cell):
    ours = twins(cell, backend="auto", num_layers=2)[1]
    graph = compiled(ours)
    x = problem(ours)[0].detach()
    assert_same(graph(x), ours(x))
    assert_same(graph(x[:, 0]), ours(x[:, 0]))


@each_cell
def test_frozen_parts_in_a_graph(cell):
    """Each leaf alone is given a gradient."""
    ours = twins(cell)[1]
    for wanted in range(len(tensors((*problem(ours), ours._flat_weights)))):
        dynamo.reset()
        x, hx = problem(ours)
        for k, leaf in enumerate([*tensors((x, hx)), *ours.parameters()]):
            leaf.requires_grad_(k == wanted)
        expected = everything(ours, x, hx)
        graph = compiled(ours)
        assert_same(everything(ours, x, hx, lambda m, x, hx, f=graph: f(x, hx)), expected)


@each_cell
def test_what_inductor_makes_of_it(cell):
    """The default compiler, in a model with more around the layer."""

    class Net(nn.Module):
        def __init__(self, recurrent):
            super().__init__()
            self.rnn, self.out = recurrent, nn.Linear(H, 2)

        def forward(self, x):
            return self.out(torch.relu(self.rnn(x * 2)[0]))

    ours = Net(twins(cell, backend="auto")[1])
    graph = torch.compile(ours, fullgraph=True, dynamic=True)
    for T, B in SIZES[:3]:
        results = []
        for module in (ours, graph):
            ours.zero_grad()
            x = problem(ours.rnn, T=T, B=B)[0]
            objective(module(x)).backward()
            results.append([x.grad, *(p.grad.clone() for p in ours.parameters())])
        assert_same(*results)
    assert graphs() == 1


@pytest.mark.parametrize("lengths", [False, True], ids=["padded", "lengths"])
def test_projection_in_a_graph(lengths):
    """PyTorch's operator inside of ours: traced, it would be unrolled for each T."""
    ours = twins("lstm", backend="auto", proj_size=4, num_layers=2, bidirectional=True)[1]
    same_as_eager(ours, lengths=lengths, dynamic=True)
    assert graphs() == 1


def packs(T, B=4):
    """x and a function that packs it, rows in any order."""
    lengths = torch.arange(B) % T + 1
    lengths[1] = T
    x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(T))
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def results_of_packed(call, ours, p, hx=None):
    """Results and gradients, that of the rows of x too."""
    ours.zero_grad()
    rows = p.data.detach().requires_grad_()
    output, state = call(PackedSequence(rows, *p[1:]), hx)
    objective((output, state)).backward()
    assert isinstance(output, PackedSequence) and output.batch_sizes.equal(p.batch_sizes)
    return [output.data, *tensors(state), rows.grad, *(q.grad.clone() for q in ours.parameters())]


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@each_config
def test_packed_sequences_in_a_graph(cell, config, backend):
    """Their number is known from the order that they come in, or from hx."""
    ours = twins(cell, backend=backend, **config)[1]
    graph = compiled(ours, dynamic=True)
    for T, B in ((6, 4), (9, 6), (3, 8)):
        p = packs(T, B)
        assert_same(results_of_packed(graph, ours, p), results_of_packed(ours, ours, p))
    assert graphs() == 1
    longest_first = pack_padded_sequence(torch.randn(6, 3, I), torch.tensor([6, 2, 1]))
    hx = problem(ours)[1]
    expected = results_of_packed(ours, ours, longest_first, hx)
    assert_same(results_of_packed(graph, ours, longest_first, hx), expected)


@each_cell
@pytest.mark.parametrize("backend", [BACKENDS[2]])
def test_packed_sequences_by_the_kernels_in_a_graph(cell, backend):
    ours = twins(cell, backend=backend)[1]
    p = packs(3)
    expected = results_of_packed(ours, ours, p)
    assert_same(results_of_packed(compiled(ours), ours, p), expected)


def test_packed_sequences_with_a_projection_in_a_graph():
    ours = twins("lstm", backend="auto", proj_size=4, num_layers=2)[1]
    graph = compiled(ours, dynamic=True)
    for T, B in ((6, 4), (9, 6)):
        p = packs(T, B)
        assert_same(results_of_packed(graph, ours, p), results_of_packed(ours, ours, p))
    assert graphs() == 1


@each_cell
def test_packed_rows_of_an_unknown_number_run_outside_of_the_graph(cell):
    """Longest first and without hx: how many they are is data. The rest is compiled, once."""
    ours = twins(cell, backend="auto")[1]

    def model(p):
        return ours(p)[0].data * 2

    sorted_packs = [
        pack_padded_sequence(problem(ours, T=T)[0].detach(), torch.tensor([T, 2, 1]))
        for T in range(4, 14)
    ]
    graph = torch.compile(model, backend="aot_eager")
    for p in sorted_packs:
        assert_same(graph(p), model(p))
    assert graphs() <= 2
    dynamo.reset()
    with pytest.raises(Exception, match="packed_rows_run_outside_of_graphs"):
        compiled(model)(sorted_packs[0])


def test_states_of_another_number_than_the_packed_rows_raise():
    ours = twins("gru")[1]
    p = pack_padded_sequence(torch.randn(6, 3, I), torch.tensor([6, 2, 1]))
    with pytest.raises(RuntimeError, match="the states must have 3 rows, got 4"):
        compiled(ours)(p, torch.randn(1, 4, H))


@each_cell
def test_recurrence_is_one_graph(cell):
    kind = CELLS[cell]
    h0, weight = torch.randn(2, H), torch.randn(kind.gates * H, H) / 3
    params = tuple(torch.randn(H) for _ in kind.params)

    def f(x_gates):
        state = h0 if kind.states == 1 else (h0, h0)
        return rnn.recurrence(x_gates, state, weight, params, cell=cell)

    graph = compiled(f, dynamic=True)
    for T in (3, 7, 4):
        x_gates = torch.randn(T, 2, kind.gates * H, requires_grad=True)
        results = []
        for g in (f, graph):
            y = tensors(g(x_gates))
            results.append([*y, *torch.autograd.grad(sum(t.square().sum() for t in y), x_gates)])
        assert_same(*results)
    assert graphs() == 1


@each_cell
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_auto_prefers_pytorchs_operator_as_in_eager_mode(cell, trained, monkeypatch):
    """Call by call, in one graph. Not in training on few steps: the op would run it twice."""
    by_operator = []
    run_stack = layer.run_stack

    def spy(stack, x, *rest):
        by_operator.append(len(x))
        return run_stack(stack, x, *rest)

    monkeypatch.setattr(layer, "run_stack", spy)
    ours = twins(cell, backend="auto")[1]
    graph = compiled(ours, dynamic=True)
    for T in (4, 20, 15, 16):
        x = torch.randn(T, 3, I)
        with torch.set_grad_enabled(trained):
            assert graph(x)[0].requires_grad is trained
            in_eager_mode = rnn.explain(ours, x).startswith("all layers: PyTorch's own operator")
        few = trained and cell != "lstm" and T < 16
        assert (T in by_operator) is (in_eager_mode and not few)
    assert graphs() == 1


TRANSFORMS = {
    "vmap": lambda f, w, x: vmap(lambda z: f(w, z[:, None])[0], in_dims=1)(x),
    "per-sample gradients": lambda f, w, x: vmap(
        grad(lambda w, z: f(w, z[:, None])[0].square().sum()), in_dims=(None, 1)
    )(w, x),
    "jvp": lambda f, w, x: jvp(lambda z: f(w, z)[0], (x,), (torch.ones_like(x),)),
    "grad": lambda f, w, x: grad(lambda z: f(w, z)[0].square().sum())(x),
}


@each_cell
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_in_a_graph(cell, transform):
    ours = twins(cell)[1]
    x, weights = problem(ours)[0].detach(), {n: p.detach() for n, p in ours.named_parameters()}

    def call(w, x):
        return functional_call(ours, w, (x,))

    def f(w, x):
        return transform(call, w, x)

    got, expected = compiled(f)(weights, x), f(weights, x)
    assert_same(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected))
