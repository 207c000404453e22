"""Who is measured. A provider builds a model for a case, or says why it cannot.

All get the padded input (T, B, I), start from zero states and return the padded output and the
last states, so that packing, padding and input projections count for all of them.

`auto`, `torch-path` and `torch.nn` can run every case, `eager` and `flashrnn` one layer in one
direction. Haste (lmnt-com/haste) is not here: it does not compile with today's PyTorch (2.13),
which no longer has the C++ functions that it calls.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn
from rnn.modules import MODULES

from .cases import TWINS, Case

Weights = dict[str, Tensor]  # a state_dict of torch.nn
Results = tuple[Tensor, ...]  # output (T, B, D * H), then each last state (L * D, B, H)


class Model(NamedTuple):
    forward: Callable[[Tensor], Results]
    parameters: list[Tensor]  # in the order of torch.nn
    ran: str = ""  # of ours: the backend and why, as rnn.explain says of the first layer


class CannotError(Exception):
    """A provider cannot run a case; the message says why."""


class Provider(NamedTuple):
    about: str
    build: Callable[[Case, Weights], Model]  # raises CannotError


def construct(network: Callable[..., Any], case: Case, weights: Weights, **options: Any) -> Any:
    """A network of torch.nn or of ours, with those weights, where they lie and in their dtype."""
    like = weights["weight_ih_l0"]
    module = network(
        case.I,
        case.H,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        device=like.device,
        dtype=like.dtype,
        **options,
    )
    module.load_state_dict(weights)
    return module


def flat(output: Tensor, states: Tensor | tuple[Tensor, ...]) -> Results:
    return (output, *states) if isinstance(states, tuple) else (output, states)


def build_ours(backend: str) -> Callable[[Case, Weights], Model]:
    def build(case: Case, weights: Weights) -> Model:
        module = construct(MODULES[case.cell], case, weights, backend=backend)
        x = weights["weight_ih_l0"].new_empty(case.T, case.B, case.I)
        lengths = case.lengths()
        lengths = None if lengths is None else lengths.to(x.device)
        ran = rnn.explain(module, x).splitlines()[0].removeprefix("layer 0: ")
        return Model(lambda x: flat(*module(x, lengths=lengths)), list(module.parameters()), ran)

    return build


def build_torch_nn(case: Case, weights: Weights) -> Model:
    module = construct(TWINS[case.cell].network, case, weights)
    lengths = case.lengths()  # pack_padded_sequence wants them on the CPU

    def forward(x: Tensor) -> Results:
        if lengths is None:
            return flat(*module(x))
        output, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return flat(pad_packed_sequence(output, total_length=case.T)[0], states)

    return Model(forward, list(module.parameters()))


def one_layer(case: Case) -> None:
    if case.layers > 1 or case.bidirectional or case.packed:
        raise CannotError("it is one layer, in one direction, of rows of equal length")


def build_eager(case: Case, weights: Weights) -> Model:
    """The loop that one writes by hand over torch.nn's single steps."""
    one_layer(case)
    like = weights["weight_ih_l0"]
    step: Any = TWINS[case.cell].step(case.I, case.H, device=like.device, dtype=like.dtype)
    step.load_state_dict({name.removesuffix("_l0"): w for name, w in weights.items()})

    def forward(x: Tensor) -> Results:
        state, hidden = None, []
        for x_t in x.unbind(0):
            state = step(x_t, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        last = state if isinstance(state, tuple) else (state,)
        return (torch.stack(hidden), *(s.unsqueeze(0) for s in last))

    return Model(forward, list(step.parameters()))


FLASHRNN = {"rnn_tanh": "elman", "gru": "gru", "lstm": "lstm"}


def build_flashrnn(case: Case, weights: Weights) -> Model:
    """NX-AI/flashrnn 1.0 with one head. It takes W_ih x (B, T, gates, heads, H), W_hh and one bias
    for each gate; its GRU has the gates n, r, z in W_hh and four biases: b_hn, r, z, b_in."""
    if importlib.util.find_spec("flashrnn") is None:
        raise CannotError("flashrnn is not installed")
    if case.cell not in FLASHRNN or case.dtype == "float64":
        raise CannotError(f"flashrnn has no {case.cell} in {case.dtype}")
    one_layer(case)
    from flashrnn import flashrnn

    leaves = [w.detach().requires_grad_() for w in weights.values()]

    def forward(x: Tensor) -> Results:
        w_ih, w_hh, b_ih, b_hh = leaves
        bias = b_ih + b_hh
        if case.cell == "gru":
            H = case.H
            w_hh = w_hh.roll(H, 0)  # r, z, n -> n, r, z
            bias = torch.cat((b_hh[2 * H :], bias[: 2 * H], b_ih[2 * H :]))
        states, last = flashrnn(
            F.linear(x.transpose(0, 1), w_ih).unflatten(2, (-1, 1, case.H)),
            w_hh.view(-1, 1, case.H, case.H),
            bias.view(-1, 1, case.H),
            function=FLASHRNN[case.cell],
            backend="cuda_fused" if x.is_cuda else "vanilla",
            dtype=str(x.dtype).removeprefix("torch."),
        )  # (states, B, T, heads, H) and the same of the last step
        return (states[0, :, :, 0].transpose(0, 1), *last[:, :, 0, 0].unsqueeze(1))

    return Model(forward, leaves)


PROVIDERS = {
    "auto": Provider('this library as it comes, backend="auto"', build_ours("auto")),
    "torch-path": Provider(
        'this library\'s PyTorch path, backend="torch"; only where --providers names it',
        build_ours("torch"),
    ),
    "torch.nn": Provider("cuDNN on a GPU, PyTorch's C++ on a CPU", build_torch_nn),
    "eager": Provider(
        "a Python loop over torch.nn's single steps; in 16 bits it sums the weights' gradients in "
        "16 bits, step by step, and the check may call it wrong",
        build_eager,
    ),
    "flashrnn": Provider(
        "NX-AI/flashrnn where it is installed; on a CPU its loop in PyTorch", build_flashrnn
    ),
}
OURS = ("auto", "torch-path")
DEFAULT = [name for name in PROVIDERS if name != "torch-path"]
