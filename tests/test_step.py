"""module.step: a sequence step by step is the sequence as a whole."""

import pytest
import torch
from twins import IEEE, assert_same, each_backend, each_cell, problem, tensors, twins

import rnn

pytestmark = IEEE


def stream(module, x, hx):
    time = 1 if module.batch_first and x.dim() == 3 else 0
    outputs, state = [], hx
    for x_t in x.unbind(time):
        output, state = module.step(x_t, state)
        outputs.append(output)
    return torch.stack(outputs, time), state


SIZES = [  # T, B, I, H
    *((6, B, 5, 7) for B in (1, 2, 3, 4, 5, 8)),
    *((5, B, 16, 32) for B in (1, 2, 3, 4, 17)),
    *((4, B, 33, 64) for B in (1, 3, 33)),
    *((20, B, 2, 7) for B in (4, 6)),
    (7, 1, 1, 1),
    (3, 4, 511, 7),
    (3, 12, 1000, 64),
    (3, 1, 64, 256),
    (2, 6, 64, 255),
]


@each_cell
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_to_the_last_bit_in_float64(cell, size, grad):
    T, B, I, H = size
    _, ours = twins(cell, I, H, num_layers=2, dtype=torch.float64)
    x, hx = problem(ours, T, B)
    with torch.set_grad_enabled(grad):
        for a, b in zip(tensors(stream(ours, x, hx)), tensors(ours(x, hx)), strict=True):
            assert torch.equal(a, b)


@each_backend
@each_cell
@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "batch_first": True, "bias": False}])
def test_to_rounding_on_every_backend(cell, config, backend):
    _, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours)
    assert_same(stream(ours, x, hx), ours(x, hx))
    assert_same(stream(ours, x, None), ours(x))


@each_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(cell, batch_first):
    _, ours = twins(cell, num_layers=2, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    got = tensors(stream(ours, x, None))
    assert got[0].shape == (6, 7) and got[1].shape == (2, 7)
    assert all(torch.equal(a, b) for a, b in zip(got, tensors(ours(x)), strict=True))


@each_cell
def test_gradients_go_through_all_steps(cell):
    _, ours = twins(cell, num_layers=2, dtype=torch.float64)
    x, hx = problem(ours)
    leaves = [x, *tensors(hx), *ours.parameters()]
    step_by_step, whole = (
        torch.autograd.grad(call(x, hx)[0].square().sum(), leaves)
        for call in (lambda x, hx: stream(ours, x, hx), ours)
    )
    assert_same(step_by_step, whole)


def test_projection():
    _, ours = twins("lstm", proj_size=3, dtype=torch.float64)
    x, hx = problem(ours)
    assert_same(stream(ours, x, hx), ours(x, hx))


def test_dropout_in_training_draws_a_mask_for_each_step():
    ours = rnn.RNN(2, 100, 2, "relu", dropout=0.25)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        ours.bias_ih_l0.fill_(1.0)  # the first layer says 1, and the second repeats it
        ours.weight_ih_l1.copy_(torch.eye(100))
        first, state = ours.step(torch.zeros(4, 2))
        second, _ = ours.step(torch.zeros(4, 2), state)
        kept = torch.stack([first, second]) > 0
        assert not torch.equal(kept[0], kept[1]) and 0.6 < kept.double().mean() < 0.9
        ours.eval()
        assert ours.step(torch.zeros(4, 2))[0].eq(1).all()


def test_hooks_run():
    """Those that compute weights before each call, say."""
    ours, seen = rnn.GRU(5, 7), []
    ours.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    ours.step(torch.randn(3, 5))
    assert seen == [(1, 3, 5)]


@pytest.mark.parametrize(
    ("config", "shape", "says"),
    [
        ({"bidirectional": True}, (3, 5), "one direction"),
        ({}, (6, 3, 5), r"\(B, I\) or \(I,\), got \(6, 3, 5\)"),
        ({}, (), r"got \(\)"),
    ],
    ids=["bidirectional", "3-D", "0-D"],
)
def test_refuses(config, shape, says):
    with pytest.raises(ValueError, match=says):
        rnn.GRU(5, 7, **config).step(torch.zeros(shape))


@pytest.mark.gpu
@each_cell
@pytest.mark.parametrize("H", [64, 512])
def test_a_cuda_graph_captures_it(cell, H):
    module = twins(cell, 32, H, num_layers=2, backend="auto")[1].cuda().eval()
    x, *hx = (t.detach().cuda() for t in tensors(problem(module, 6, 4)))
    given = hx if len(hx) > 1 else hx[0]
    with torch.no_grad():
        want = stream(module, x, given)
        x_t, state = x[0].clone(), [s.clone() for s in hx]
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(side):  # compiles what is not compiled yet
            module.step(x_t, state if len(state) > 1 else state[0])
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output, after = module.step(x_t, state if len(state) > 1 else state[0])
            for s, a in zip(state, tensors(after)):
                s.copy_(a)
        for s, first in zip(state, hx):
            s.copy_(first)
        outputs = []
        for step in x:
            x_t.copy_(step)
            graph.replay()
            outputs.append(output.clone())
    assert_same([torch.stack(outputs), state], want)
