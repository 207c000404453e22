"""torch.nn's module and ours, of one initialisation, and all results of a call by name."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnn

I, H = 5, 7
KINDS: dict[str, tuple] = {  # theirs, ours, and what both are told
    "rnn_tanh": (torch.nn.RNN, rnn.RNN, {}),
    "rnn_relu": (torch.nn.RNN, rnn.RNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, rnn.GRU, {}),
    "lstm": (torch.nn.LSTM, rnn.LSTM, {}),
}
CELLS = list(KINDS)
# Triton's interpreter knows float32; "auto" differs from "torch" in float32 alone.
RUNS: list[Any] = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("auto", torch.float32),
    ("triton", torch.float32),
]
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([2, 6, 0])  # of the rows of problem()
BACKENDS: list[Any] = ["torch", "auto", "triton"]
each_cell = pytest.mark.parametrize("cell", CELLS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r[0]}-{str(r[1])[6:]}")
# For whole files: float32 is held to float32, with tf32 off.
IEEE = [
    pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"]),
    pytest.mark.usefixtures("tf32"),
]


def twins(cell: str, *sizes: int, backend: str = "torch", **config: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours with the same weights; input size I and hidden size H."""
    theirs, ours, told = KINDS[cell]
    torch.manual_seed(0)
    one = theirs(*(sizes or (I, H)), **told, **config)
    other = ours(*(sizes or (I, H)), **told, **config, backend=backend)
    other.load_state_dict(one.state_dict())
    return one, other


def tensors(x: Any) -> list[Tensor]:
    """The tensors in results of any shape, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, PackedSequence):
        return [x.data]
    return [] if x is None else [t for part in x for t in tensors(part)]


def problem(module: Any, T: int = 6, B: int = 3, hx: bool = True) -> tuple[Tensor, Any]:
    """An input for module, (T, B, I) in its layout, and its states, or None; leaves."""
    generator = torch.Generator().manual_seed(T + B)
    dtype = module.weight_hh_l0.dtype

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    x = leaf(*((B, T) if module.batch_first else (T, B)), module.input_size)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size, module.hidden_size]
    states = tuple(leaf(layers, B, w) for w in widths[: 2 if "lstm" in module.mode.lower() else 1])
    return x, (states if len(states) > 1 else states[0]) if hx else None


def objective(results: Any) -> Tensor:
    """A number into which every result comes with a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for y in tensors(results):
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        total = total + (y * weights).sum()
    return total  # type: ignore[return-value]


def gradients(module: Any, *leaves: Any) -> dict[str, Tensor]:
    """.grad of all leaves and parameters, by name, each a copy."""
    named = {f"leaf {k}": x for k, x in enumerate(tensors(leaves))}
    named.update(module.named_parameters())
    return {n: x.grad.clone() for n, x in named.items() if x.grad is not None}


def everything(module: Any, x: Tensor, hx: Any = None, call: Any = None) -> dict[str, Tensor]:
    """The results of a call and, through .grad after backward(), all its gradients."""
    for leaf in [*tensors((x, hx)), *module.parameters()]:
        leaf.grad = None
    results = call(module, x, hx) if call else module(x, hx)
    objective(results).backward()
    values = {f"result {k}": y.detach() for k, y in enumerate(tensors(results))}
    return values | gradients(module, x, hx)


def assert_same(ours: Any, theirs: Any, tolerance: float | None = None) -> None:
    """Equal to rounding: of each tensor's largest number, 1e-5 in float32, 1e-12 in float64."""
    if not isinstance(ours, dict):
        ours, theirs = ({str(k): x for k, x in enumerate(tensors(r))} for r in (ours, theirs))
    assert ours.keys() == theirs.keys() and ours
    for name, b in theirs.items():
        a = ours[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if b.numel():
            bound = tolerance or (1e-12 if b.dtype == torch.float64 else 1e-5)
            bound *= max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def row_by_row(module: Any, x: Tensor, hx: Any, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What `lengths` means, said with torch.nn: each row alone, as long as it is, then zeros."""
    batch = 0 if module.batch_first else 1
    T, outputs, states = x.size(1 - batch), [], []
    for b, n in enumerate(lengths.tolist()):
        state = tuple(s[:, b] for s in tensors(hx))
        y = x.new_zeros(0, module(x.select(batch, b)[:1])[0].size(1))
        if n:
            given = state if len(state) > 1 else state[0]
            y, after = module(x.select(batch, b)[:n], given)
            state = tuple(tensors(after))
        outputs.append(torch.cat([y, y.new_zeros(T - n, y.size(1))]))
        states.append(state)
    return torch.stack(outputs, batch), [torch.stack(s, 1) for s in zip(*states)]
