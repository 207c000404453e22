"""Who is measured. A provider is data: why it cannot run a case, and how it is built.

All start from the padded input (T, B, I) with h0 = 0 and end with the padded output: to those
that take a PackedSequence packing and padding belong, and input projections do to all.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnn.functional import choose
from rnn.kernels.plan import NoPlan

from .cases import CELLS, COMPILED_STEPS, DTYPES, Case, State

Weights = dict[str, Tensor]  # a state_dict of the class in torch.nn
Results = tuple[Tensor, ...]  # output (T, B, D * H) and each final state (L * D, B, H)


class Model(NamedTuple):
    forward: Callable[[Tensor], Results]
    parameters: list[Tensor]  # in the order of torch.nn


class Provider(NamedTuple):
    """why_not(case, device) is None where `build` can be called."""

    name: str
    about: str
    why_not: Callable[[Case, torch.device], str | None]
    build: Callable[[Case, Weights, torch.device], Model] | None  # None: it can run none yet


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let products of float32 be rounded to tf32, or not, as the dtype of a case says."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = DTYPES[dtype].tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def construct(
    factory: Callable, case: Case, weights: Weights, device: torch.device, **more: Any
) -> Any:
    """A network of torch.nn or of ours, with those weights."""
    module = factory(
        case.I,
        case.H,
        case.layers,
        bidirectional=case.bidirectional,
        device=device,
        dtype=DTYPES[case.dtype].torch,
        **CELLS[case.cell].arguments,
        **more,
    )
    module.load_state_dict(weights)
    return module


def flat(results: tuple[Tensor, Any]) -> Results:
    output, states = results
    return (output, *states) if isinstance(states, tuple) else (output, states)


# ------------------------------------------------------------------------------ ours, torch.nn


def cannot_tf32(case: Case, device: torch.device) -> str | None:
    return (
        "tf32 is a mode of NVIDIA GPUs" if case.dtype == "tf32" and device.type == "cpu" else None
    )


def why_not_fused(case: Case, device: torch.device) -> str | None:
    dtype = DTYPES[case.dtype].torch
    with precision(case.dtype):
        found = choose("auto", case.cell, case.H, case.B, case.directions, dtype, device)
    return found.why if isinstance(found, NoPlan) else None


def build_ours(backend: str) -> Callable[[Case, Weights, torch.device], Model]:
    def build(case: Case, weights: Weights, device: torch.device) -> Model:
        module = construct(CELLS[case.cell].ours, case, weights, device, backend=backend)
        lengths = case.lengths()
        lengths = None if lengths is None else lengths.to(device)
        return Model(lambda x: flat(module(x, lengths=lengths)), list(module.parameters()))

    return build


def build_torch_nn(case: Case, weights: Weights, device: torch.device) -> Model:
    module = construct(CELLS[case.cell].torch_nn, case, weights, device)
    lengths = case.lengths()  # which pack_padded_sequence wants on the CPU
    if lengths is None:
        return Model(lambda x: flat(module(x)), list(module.parameters()))

    def packed(x: Tensor) -> Results:
        output, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return flat((pad_packed_sequence(output, total_length=case.T)[0], states))

    return Model(packed, list(module.parameters()))


# ---------------------------------------------------------------------------- eager, compiled


def eager(
    step: Callable[[Tensor, Tensor, State], State],
    x: Tensor,  # (T, B, I)
    weights: list[list[Tensor]],  # W_ih, W_hh, b_ih, b_hh of each layer and direction
    states: int,  # that the cell carries
    directions: int,
    active: Tensor | None,  # (T, B, 1) bool
) -> Results:
    """The loop that one writes by hand: steps in Python, gradients by autograd. The input
    projection is one product over all steps, as whoever cares for time would write it."""
    finals: list[State] = []
    for first in range(0, len(weights), directions):
        outputs = []
        for d in range(directions):
            w_ih, w_hh, b_ih, b_hh = weights[first + d]
            x_gates = F.linear(x, w_ih, b_ih).unbind(0)
            state = (x.new_zeros(x.size(1), w_hh.size(1)),) * states
            steps = list(x_gates)
            for t in reversed(range(len(steps))) if d else range(len(steps)):
                new = step(x_gates[t], F.linear(state[0], w_hh, b_hh), state)
                steps[t] = new[0]
                if active is not None:
                    new = tuple(torch.where(active[t], n, s) for n, s in zip(new, state))
                state = new
            output = torch.stack(steps)
            outputs.append(output if active is None else output.masked_fill(~active, 0))
            finals.append(state)
        x = torch.cat(outputs, 2) if directions == 2 else outputs[0]
    return x, *(torch.stack(final) for final in zip(*finals))


def build_eager(case: Case, weights: Weights, device: torch.device) -> Model:
    return build_loop(case, weights, device, eager)


def build_compiled(case: Case, weights: Weights, device: torch.device) -> Model:
    torch.compiler.reset()  # of the cases before: they count against a limit of recompilations
    return build_loop(case, weights, device, torch.compile(eager, dynamic=False))


def build_loop(case: Case, weights: Weights, device: torch.device, loop: Callable) -> Model:
    cell = CELLS[case.cell]
    module = construct(cell.torch_nn, case, weights, device)
    lengths = case.lengths()
    active = None
    if lengths is not None:
        active = (torch.arange(case.T)[:, None] < lengths).unsqueeze(2).to(device)
    states = 2 if cell.torch_nn is torch.nn.LSTM else 1
    matrices = [list(group) for group in module.all_weights]
    return Model(
        lambda x: loop(cell.step, x, matrices, states, case.directions, active),
        list(module.parameters()),
    )


def why_not_compiled(case: Case, device: torch.device) -> str | None:
    unrolled = case.steps * case.directions
    if unrolled > COMPILED_STEPS:
        return (
            f"torch.compile unrolls the loop, {unrolled} steps here: at more than {COMPILED_STEPS} "
            "it takes minutes"
        )
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler} (CXX names another)"
    return cannot_tf32(case, device)


# ------------------------------------------------------------------------------------- peers

FLASHRNN = {"rnn_tanh": "elman"}  # the name of the cell there, where it computes the same


def one_layer(case: Case, device: torch.device, package: str, cells: dict[str, str]) -> str | None:
    """Why a package of CUDA kernels for one layer of equally long rows cannot run a case."""
    if case.cell not in cells:
        return f"{package} has no {case.cell}"
    if case.layers > 1 or case.bidirectional or case.packed:
        return f"{package} has one layer, in one direction, of rows equally long"
    if case.dtype == "float64":
        return f"{package} takes no float64"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None if device.type == "cuda" else f"{package} needs CUDA, and the device is {device}"


def why_not_flashrnn(case: Case, device: torch.device) -> str | None:
    return one_layer(case, device, "flashrnn", FLASHRNN)


def build_flashrnn(case: Case, weights: Weights, device: torch.device) -> Model:
    """NX-AI/flashrnn: flashrnn(Wx (B, T, G, heads, D), R (G, heads, D, D), b (G, heads, D)) gives
    the states (S, B, T, heads, D) and the last ones; one head here, R of dimensions out, in."""
    from flashrnn import flashrnn

    module = construct(CELLS[case.cell].torch_nn, case, weights, device)
    w_ih, w_hh, b_ih, b_hh = module.all_weights[0]
    G, H = case.gates, case.H

    def forward(x: Tensor) -> Results:
        x_gates = F.linear(x.transpose(0, 1), w_ih)  # (B, T, G * H)
        states, last = flashrnn(
            x_gates.unflatten(2, (G, 1, H)),
            w_hh.view(G, 1, H, H),
            (b_ih + b_hh).view(G, 1, H),
            function=FLASHRNN[case.cell],
            backend="cuda_fused",
            dtype=str(DTYPES[case.dtype].torch).removeprefix("torch."),
        )
        output = states[0, :, :, 0].transpose(0, 1)
        return output, *(state[:, 0, 0].unsqueeze(0) for state in last)

    return Model(forward, list(module.parameters()))


HASTE: dict[str, str] = {}  # lmnt-com/haste has an LSTM, a GRU and an IndRNN, no Elman cell


def why_not_haste(case: Case, device: torch.device) -> str | None:
    return one_layer(case, device, "haste_pytorch", HASTE)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "fused", 'rnn, backend="triton": this library', why_not_fused, build_ours("triton")
        ),
        Provider(
            "torch-path", 'rnn, backend="torch": this library', cannot_tf32, build_ours("torch")
        ),
        Provider("torch.nn", "cuDNN on a GPU, PyTorch's C++ on a CPU", cannot_tf32, build_torch_nn),
        Provider("eager", "a loop in Python, autograd", cannot_tf32, build_eager),
        Provider("compiled", "that loop, torch.compile", why_not_compiled, build_compiled),
        Provider("flashrnn", "NX-AI/flashrnn", why_not_flashrnn, build_flashrnn),
        Provider("haste_pytorch", "lmnt-com/haste", why_not_haste, None),
    )
}
