"""rnn.recurrence refuses what does not fit together, and says what it wanted and what it got."""

import pytest
import torch
from twins import BACKENDS

import rnn

T, B, H = 4, 3, 5


def call(**changes):
    arguments = {
        "x_gates": torch.randn(T, B, H),
        "h0": torch.randn(B, H),
        "weight_hh": torch.randn(H, H),
        "cell": "rnn_tanh",
    }
    return rnn.recurrence(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"cell": "elman"}, ValueError, "rnn_relu.*elman"),
        ({"backend": "cudnn"}, ValueError, "triton.*cudnn"),
        ({"x_gates": torch.randn(0, B, H)}, RuntimeError, "T >= 1"),
        ({"x_gates": torch.randn(T, B, 2 * H)}, RuntimeError, r"\(T, B, 5\).*10"),
        ({"x_gates": torch.randn(B, H)}, RuntimeError, "x_gates"),
        ({"h0": torch.randn(B + 1, H)}, RuntimeError, r"\(3, 5\), got \(4, 5\)"),
        ({"weight_hh": torch.randn(H, H + 1)}, RuntimeError, r"got \(5, 6\)"),
        ({"weight_hh": torch.randn(H)}, RuntimeError, "1-D"),
        ({"weight_hh": torch.randn(3, H, H)}, RuntimeError, "one or two directions"),
        (
            {"h0": torch.randn(B, H).double()},
            ValueError,
            r"x_gates.: torch.float32.*h0.: torch.float64",
        ),
        ({"x_gates": torch.ones(T, B, H, dtype=torch.long)}, ValueError, "floating"),
        ({"h0": torch.randn(B, H, device="meta")}, RuntimeError, "meta"),
        ({"lengths": torch.tensor([1, 2, T + 1])}, ValueError, r"\[0, 4\]"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"\(3,\), got \(2,\)"),
        ({"lengths": [1, 2, 3]}, TypeError, "list"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses(changes, error, says):
    with pytest.raises(error, match=says):
        call(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", [BACKENDS[2]])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight_hh": torch.zeros(999, 999), "h0": torch.zeros(3, 999)}, "SRAM"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"x_gates": torch.zeros(T, 0, H), "h0": torch.zeros(0, H)}, "empty"),
    ],
    ids=["large", "float64", "bfloat16", "empty"],
)
def test_triton_is_never_replaced_in_silence(changes, says, backend):
    dtype = changes.pop("dtype", torch.float32)
    if "weight_hh" in changes:
        changes["x_gates"] = torch.zeros(T, B, 999)
    arguments = {
        "x_gates": torch.randn(T, B, H),
        "h0": torch.randn(B, H),
        "weight_hh": torch.randn(H, H),
        **changes,
    }
    arguments = {n: x.to(dtype) for n, x in arguments.items()}
    with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: .*{says}'):
        rnn.recurrence(**arguments, cell="rnn_tanh", backend=backend)


def test_one_direction_is_the_stack_of_one():
    p = {"x_gates": torch.randn(T, B, H), "h0": torch.randn(B, H), "weight_hh": torch.randn(H, H)}
    output, h_n = rnn.recurrence(**p, cell="rnn_tanh")
    stacked = {**p, "h0": p["h0"][None], "weight_hh": p["weight_hh"][None]}
    output_1, h_n_1 = rnn.recurrence(**stacked, cell="rnn_tanh")
    assert torch.equal(output, output_1) and torch.equal(h_n, h_n_1[0])


def test_autocast_leaves_the_dtypes_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = call()
    assert output.dtype == h_n.dtype == torch.float32


def test_one_graph_under_torch_compile():
    def recurrence(x_gates, h0, weight_hh):
        return rnn.recurrence(x_gates, h0, weight_hh, cell="rnn_tanh", backend="torch")

    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 7), torch.zeros(3, 7), torch.randn(7, 7) / 3
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for f in (recurrence, torch.compile(recurrence, backend="aot_eager", fullgraph=True)):
        output, h_n = f(*leaves)
        loss = output.square().sum() + h_n.sum()
        results.append([output, h_n, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
