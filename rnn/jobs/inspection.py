"""A look inside a trained network: `python -m rnn inspect CHECKPOINT`.

For every recurrent module of the model, layer by layer:
    activations.png  the hidden units along one held-out sequence, or along --text
    gradients.png    how far back in time a gradient reaches: whether it vanishes or explodes
    spectrum.png     the eigenvalues of W_hh in the complex plane, beside the unit circle

Source of the second: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
networks, 2013. The gradient is that of v . h_T, v a random direction, with respect to the gates
a_t = W_ih x_t + b + W_hh h_{t-1}; its norm is drawn against the distance T - t.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import RNN, recurrence
from . import COMMANDS, charlm
from .cli import JobError, Parser, execute, load_checkpoint, make_folder
from .training import Example, Model, restore

DIRECTIONS_DRAWN = 32  # random v, of which the gradient's norm is the root mean square
UNITS_SHOWN = 40


class Layer(NamedTuple):
    """One direction of one layer of a recurrent module, on the sequence that is looked at."""

    name: str  # "rnn, layer 1"
    output: Tensor  # (T, H), in the order in which it was computed: last in time is last here
    gradient: Tensor  # (T,) norm of the gradient of v . h_T by a_t
    weight_hh: Tensor  # (G * H, H), float64
    labels: Sequence[str]  # (T,), in the same order

    def eigenvalues(self) -> list[Tensor]:
        """Of the recurrent matrix of each gate, (H,) complex."""
        return [torch.linalg.eigvals(w) for w in self.weight_hh.split(self.weight_hh.size(1))]

    def radius(self) -> float:
        return max(float(values.abs().max()) for values in self.eigenvalues())


def look(name: str, module: RNN, x: Tensor, labels: Sequence[str]) -> list[Layer]:
    """The layers of a module that read x (T, 1, I), from a zero state."""
    D, H, found = module.directions, module.hidden_size, []
    names = ("",) if D == 1 else (", forwards", ", backwards")
    for number in range(module.num_layers):
        weight_ih, weight_hh, bias = module.layer_weights(number, x.dtype)
        outputs = []
        for d, gates in enumerate(F.linear(x, weight_ih, bias).detach().chunk(D, 2)):
            in_time = [0] if d else []  # what to flip: direction 1 runs backwards
            # All directions v at once: each is a row of the batch, which reads the same gates.
            leaf = gates.expand(-1, DIRECTIONS_DRAWN, -1).clone().requires_grad_()
            output, h_n = recurrence(
                leaf,
                leaf.new_zeros(DIRECTIONS_DRAWN, H),
                weight_hh[d].detach(),
                cell=module.cell,
                reverse=bool(d),
            )
            v = torch.randn(h_n.shape, generator=torch.Generator().manual_seed(0))
            (gradient,) = torch.autograd.grad((v.to(x.dtype) * h_n).sum(), leaf)
            norm = gradient.square().sum(2).mean(1).sqrt()
            outputs.append(output[:, :1].detach())
            found.append(
                Layer(
                    f"{name}, layer {number}{names[d]}",
                    outputs[-1][:, 0].flip(in_time),
                    norm.flip(in_time),
                    weight_hh[d].detach().double(),
                    labels[::-1] if d else labels,
                )
            )
        x = torch.cat(outputs, 2)
    return found


@torch.no_grad()
def inputs_of(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """What each recurrent module of the model is given, (T, 1, I), when the model reads the
    example."""
    given: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: given.update({name: args[0]})

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, RNN)
    ]
    model(*example.args)
    for hook in hooks:
        hook.remove()
    return given


def draw_activations(layers: list[Layer], figure: Figure) -> None:
    """Units from top to bottom, those that change most; steps from left to right."""
    figure.suptitle(f"Hidden units along a sequence: the {UNITS_SHOWN} that vary most")
    figure.set_size_inches(max(6.0, 0.13 * max(len(a.labels) for a in layers)), 3 * len(layers))
    for ax, layer in zip(figure.subplots(len(layers), squeeze=False).flat, layers):
        most = layer.output.std(0, correction=0).argsort(descending=True)[:UNITS_SHOWN]
        units = layer.output[:, most]
        # Units that move together stand together: in the order of their first shared direction.
        first = torch.linalg.svd(units - units.mean(0), full_matrices=False).Vh[0]
        h, top = units[:, first.argsort()].t(), float(units.abs().max())
        image = ax.imshow(h.numpy(), aspect="auto", cmap="coolwarm", vmin=-top, vmax=top)
        ax.set_xticks(range(len(layer.labels)), [repr(s)[1:-1] for s in layer.labels], size=7)
        if max(map(len, layer.labels)) > 3:
            ax.tick_params("x", rotation=90)
        ax.set(yticks=[], ylabel="units")
        ax.set_title(layer.name, size=9)
        figure.colorbar(image, ax=ax, fraction=0.03)


def draw_gradients(layers: list[Layer], figure: Figure) -> None:
    """The norm against the distance, on a scale where an exponential is a straight line."""
    figure.suptitle(r"Gradient of $v \cdot h_T$ by the gates of step $t$")
    ax = figure.subplots()
    for layer in layers:
        norm = layer.gradient.flip(0)
        shown = norm > 0  # a relu network may lose a gradient altogether
        distance = torch.arange(len(norm))
        line = ax.semilogy(
            distance[shown].numpy(), norm[shown].numpy(), marker=".", label=layer.name
        )
        if len(norm) > 1 and shown[-1] and shown[0]:
            rate = float((norm[-1] / norm[0]) ** (1 / (len(norm) - 1)))
            line[0].set_label(f"{layer.name}: x {rate:.2f} a step")
    ax.set(xlabel="distance in time, steps", ylabel="norm")
    ax.legend(fontsize=8)


def draw_spectrum(layers: list[Layer], figure: Figure) -> None:
    """The eigenvalues of the recurrent matrix: of each gate, where the cell has several."""
    figure.suptitle("Eigenvalues of W_hh and the unit circle")
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    figure.set_size_inches(4 * columns, 4.2 * rows)
    circle = np.linspace(0, 2 * np.pi, 200)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, layer in zip(axes, layers):
        for gate, values in enumerate(gates := layer.eigenvalues()):
            ax.scatter(values.real.numpy(), values.imag.numpy(), s=8, label=f"gate {gate}")
        ax.plot(np.cos(circle), np.sin(circle), color="gray", linewidth=0.8)
        ax.set_aspect("equal")
        norm = float(torch.linalg.matrix_norm(layer.weight_hh, 2))
        ax.set_title(f"{layer.name}\nradius {layer.radius():.2f}, norm {norm:.2f}", size=9)
        if len(gates) > 1:
            ax.legend(fontsize=7)
    for ax in axes[len(layers) :]:
        ax.remove()


DRAWINGS = {
    "activations.png": draw_activations,
    "gradients.png": draw_gradients,
    "spectrum.png": draw_spectrum,
}


def load(path: Path, text: str | None) -> tuple[Model, Example]:
    """The model of a checkpoint and what it reads."""
    checkpoint = load_checkpoint(path, *(name for name in COMMANDS if name != "inspect"))
    job = checkpoint["format"].split()[1]
    if job == "charlm":
        return charlm.restore(checkpoint, text)
    if text is not None:
        raise JobError(f"--text is for charlm, and this is a checkpoint of {job}")
    jobs = import_module(f"rnn.jobs.{COMMANDS[job].module}").JOBS
    return restore(next(j for j in jobs if j.name == job), checkpoint)


def start(given: dict[str, Any], out: Path) -> None:
    model, example = load(given["checkpoint"], given.get("text"))
    make_folder(out)
    layers = [
        layer
        for name, x in inputs_of(model, example).items()
        for layer in look(name, model.get_submodule(name), x, example.labels[name])
    ]
    for file, draw in DRAWINGS.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(layers, figure)
        figure.savefig(out / file, dpi=80)
    for layer in layers:
        first, last = float(layer.gradient[0]), float(layer.gradient[-1])
        print(
            f"{layer.name}: spectral radius {layer.radius():.2f}; gradient {last:.2g} at distance "
            f"0, {first:.2g} at {len(layer.gradient) - 1}"
        )
    print(f"pictures: {', '.join(str(out / file) for file in DRAWINGS)}")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m rnn inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="of any job of python -m rnn")
    parser.add("text", "of charlm, what to read", "a line of Python", metavar="TEXT")
    parser.add("out", "folder for the pictures", "beside the checkpoint", type=Path, metavar="DIR")
    return parser


def main(name: str, argv: Sequence[str]) -> int:
    return execute(make_parser(), argv, start)
