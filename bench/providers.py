"""Who is measured. A provider builds a model for a case, or says why it cannot.

All get the padded input (T, B, I), start from zero states and return the padded output and the
last states, so that packing, padding and input projections count for all of them.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn
from rnn.layer import Spec, plain
from rnn.modules import cell_named, module_of

from .cases import Case

Weights = dict[str, Tensor]  # a state_dict of torch.nn
Results = tuple[Tensor, ...]  # output (T, B, D * H), then each last state (L * D, B, H)


class Model(NamedTuple):
    forward: Callable[[Tensor], Results]
    parameters: list[Tensor]  # in the order of torch.nn
    ran: str = ""  # of ours: the backend and why, as rnn.explain says of the first layer


class CannotError(Exception):
    """A provider cannot run a case; the message says why."""


def construct(case: Case, weights: Weights | None = None, **options: Any) -> Any:
    """This library's module; of those weights, where they lie and in their dtype."""
    if weights:
        like = weights["weight_ih_l0"]
        options |= {"device": like.device, "dtype": like.dtype}
    options |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    module = module_of(case.cell)(case.I, case.H, **options)
    if weights:
        module.load_state_dict(weights)
    return module


def flat(output: Tensor, states: Tensor | tuple[Tensor, ...]) -> Results:
    return (output, *states) if isinstance(states, tuple) else (output, states)


def build_ours(backend: str) -> Callable[[Case, Weights], Model]:
    def build(case: Case, weights: Weights) -> Model:
        module = construct(case, weights, backend=backend)
        x = weights["weight_ih_l0"].new_empty(case.T, case.B, case.I)
        lengths = case.lengths()
        lengths = None if lengths is None else lengths.to(x.device)
        ran = rnn.explain(module, x).splitlines()[0].removeprefix("layer 0: ")
        return Model(lambda x: flat(*module(x, lengths=lengths)), list(module.parameters()), ran)

    return build


def build_torch_nn(case: Case, weights: Weights) -> Model:
    module = construct(case, weights)
    if not all(found.now.startswith("torch.nn.") for found in rnn.convert(module, to="torch")):
        raise CannotError(f"torch.nn has no {case.cell}")
    lengths = case.lengths()  # pack_padded_sequence wants them on the CPU

    def forward(x: Tensor) -> Results:
        if lengths is None:
            return flat(*module(x))
        output, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return flat(pad_packed_sequence(output, total_length=case.T)[0], states)

    return Model(forward, list(module.parameters()))


def build_loop(case: Case, weights: Weights, layer: Callable[..., Results] = plain) -> Model:
    """The equation, step by step; also what is right, in float64."""
    leaves = [w.detach().requires_grad_() for w in weights.values()]
    lengths, D = case.lengths(), case.directions
    lengths = None if lengths is None else lengths.to(leaves[0].device)
    each, cell = len(leaves) // case.layers, cell_named(case.cell)

    def forward(x: Tensor) -> Results:
        state0 = [x.new_zeros(D, case.B, case.H)] * cell.states
        states = []
        for i in range(case.layers):
            own = leaves[i * each : (i + 1) * each]
            x, *last = layer(Spec(cell.name, D), x, lengths, *state0, *own)
            states.append(last)
        return (x, *(torch.cat(s) for s in zip(*states)))

    return Model(forward, leaves)


def build_compiled(case: Case, weights: Weights) -> Model:
    if case.T > 64:
        raise CannotError("torch.compile unrolls the loop: minutes for more than 64 steps")
    return build_loop(case, weights, torch.compile(plain))


FLASHRNN = {"rnn_tanh": "elman", "lstm": "lstm"}  # its GRU has gates and biases of its own


def build_flashrnn(case: Case, weights: Weights) -> Model:
    """NX-AI/flashrnn 1.0 with one head: W_ih x (B, T, gates, heads, H), W_hh and one bias."""
    deep = case.layers > 1 or case.bidirectional or case.packed
    if case.cell not in FLASHRNN or case.dtype == "float64" or deep:
        raise CannotError("flashrnn is one layer, in one direction, of equally long rows")
    from flashrnn import flashrnn

    leaves = [w.detach().requires_grad_() for w in weights.values()]

    def forward(x: Tensor) -> Results:
        w_ih, w_hh, b_ih, b_hh = leaves
        states, last = flashrnn(
            F.linear(x.transpose(0, 1), w_ih).unflatten(2, (-1, 1, case.H)),
            w_hh.view(-1, 1, case.H, case.H),
            (b_ih + b_hh).view(-1, 1, case.H),
            function=FLASHRNN[case.cell],
            backend="cuda_fused" if x.is_cuda else "vanilla",
            dtype=str(x.dtype).removeprefix("torch."),
        )  # (states, B, T, heads, H) and the same of the last step
        return (states[0, :, :, 0].transpose(0, 1), *last[:, :, 0, 0].unsqueeze(1))

    return Model(forward, leaves)


PROVIDERS: dict[str, Callable[[Case, Weights], Model]] = {  # they raise CannotError
    "auto": build_ours("auto"),  # this library as it comes
    "torch-path": build_ours("torch"),
    "torch.nn": build_torch_nn,  # cuDNN on a GPU, PyTorch's C++ on a CPU
    "flashrnn": build_flashrnn,  # on a CPU its loop in PyTorch
    "loop": build_loop,
    "compiled": build_compiled,
}
OURS = ("auto", "torch-path")
DEFAULT = ["auto", "torch.nn"] + ["flashrnn"] * (importlib.util.find_spec("flashrnn") is not None)
