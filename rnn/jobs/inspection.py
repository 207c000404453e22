"""A look inside a trained network: `python -m rnn inspect CHECKPOINT`.

For every recurrent module of the model, layer by layer:
    activations.png  the hidden units along one held-out sequence, or along --text
    gradients.png    how far back in time a gradient reaches: whether it vanishes or explodes
    spectrum.png     the eigenvalues of W_hh in the complex plane, beside the unit circle

Source of the second: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
networks, 2013. The gradient is that of v . h_T, v a random direction, with respect to
W_ih x_t of all gates; its norm is drawn against the distance T - t. A cell with several gates has
a square block of W_hh for each of them, and so several spectra.
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

from ..cells import CELLS
from ..generation import State
from ..modules import Recurrent
from . import COMMANDS, charlm
from .checkpoint import load_checkpoint
from .cli import JobError, Parser, execute
from .files import make_folder, write_figure
from .language_model import symbols_of
from .training import Example, Model, recurrent_modules, restore

DIRECTIONS_DRAWN = 32  # random v, of which the gradient's norm is the root mean square
REACH = 1000  # steps that the gradient is followed back
UNITS_SHOWN = 40
STEPS_SHOWN = 500
LARGEST = 200.0  # inches of a side of a picture: beyond that some versions of matplotlib fail
GATES = {"gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o")}  # names; of others: 0, 1, ...
PYTHON_LINE = "def norm(x):\n    return math.sqrt(sum(v * v for v in x))\n"


class Layer(NamedTuple):
    """One direction of one layer of a recurrent module, on the sequence that is looked at."""

    name: str  # "rnn, layer 1"
    output: Tensor  # (T, H), in the order in which it was computed: last in time is last here
    gradient: Tensor  # (min(T, REACH),) norm of the gradient of v . h_T by the last W_ih x_t
    weight_hh: Tensor  # (G * H, H), float64
    labels: Sequence[str]  # (T,), in the order of output
    cell: str

    def eigenvalues(self) -> dict[str, Tensor]:
        """Of the square block of W_hh of each gate, by its name, (H,) complex."""
        blocks = self.weight_hh.split(self.weight_hh.size(1))
        numbers = map(str, range(len(blocks))) if len(blocks) > 1 else ("",)
        names = GATES.get(self.cell, tuple(numbers))
        return {name: torch.linalg.eigvals(block) for name, block in zip(names, blocks)}

    def radii(self) -> dict[str, float]:
        """The spectral radius of each gate's block."""
        return {name: float(values.abs().max()) for name, values in self.eigenvalues().items()}

    def radius(self) -> float:
        return max(self.radii().values())


def gates_module(module: Any, layer: int, suffix: str) -> Any:
    """One direction of one layer as a module of its own, whose input is W_ih x_t of all gates:
    its own W_ih is the identity. Its weights take no gradient."""
    weight_hh = getattr(module, f"weight_hh_l{layer}{suffix}").detach()
    GH, H = weight_hh.shape
    cell = CELLS[module.cell]
    alone: Any = Recurrent(cell, GH, H, bias=module.bias, dtype=weight_hh.dtype)
    with torch.no_grad():
        alone.weight_ih_l0.copy_(torch.eye(GH))
        alone.weight_hh_l0.copy_(weight_hh)
        biases = ("bias_ih", "bias_hh") if module.bias else ()
        for name in (*biases, *(own for own, _ in cell.learned)):
            getattr(alone, f"{name}_l0").copy_(getattr(module, f"{name}_l{layer}{suffix}"))
    return alone.requires_grad_(False)


def hidden(state: State) -> Tensor:
    """h of a state, which may hold more."""
    return state if isinstance(state, Tensor) else state[0]


def gradient_norms(alone: Any, gates: Tensor) -> Tensor:
    """(min(T, REACH),): the norm of the gradient of v . h_T by gates (T, 1, G * H), the root mean
    square over DIRECTIONS_DRAWN random v."""
    state = None
    if len(gates) > REACH:
        with torch.no_grad():
            _, state = alone(gates[:-REACH].expand(-1, DIRECTIONS_DRAWN, -1))
    # All directions v at once: each is a row of the batch, which reads the same gates.
    leaf = gates[-REACH:].expand(-1, DIRECTIONS_DRAWN, -1).clone().requires_grad_()
    h_n = hidden(alone(leaf, state)[1])[0]
    v = torch.randn(h_n.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((v.to(h_n.dtype) * h_n).sum(), leaf)
    return gradient.square().sum(2).mean(1).sqrt()


def look(name: str, module: Any, x: Tensor, labels: Sequence[str]) -> list[Layer]:
    """The layers of a module that reads x (T, 1, I), from a zero state."""
    layers = []
    suffixes = {"": "", "_reverse": ", backwards"} if module.bidirectional else {"": ""}
    for number in range(module.num_layers):
        outputs = []
        for suffix, direction in suffixes.items():
            weight_ih = getattr(module, f"weight_ih_l{number}{suffix}").detach()
            in_time = [0] if suffix else []  # what to flip: the second direction runs backwards
            gates = F.linear(x, weight_ih).flip(in_time)
            alone = gates_module(module, number, suffix)
            with torch.no_grad():
                output, _ = alone(gates)
            outputs.append(output.flip(in_time))
            direction = direction or (", forwards" if module.bidirectional else "")
            layers.append(
                Layer(
                    f"{name}, layer {number}{direction}",
                    output[:, 0],
                    gradient_norms(alone, gates),
                    alone.weight_hh_l0.double(),
                    labels[::-1] if suffix else labels,
                    module.cell,
                )
            )
        x = torch.cat(outputs, 2)
    return layers


@torch.no_grad()
def inputs_of(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """What each recurrent module of the model is given, (T, 1, I), when the model reads the
    example."""
    given: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: given.update({name: args[0]})

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in recurrent_modules(model).items()
    ]
    model(*example.args)
    for hook in hooks:
        hook.remove()
    return given


def set_size(figure: Figure, width: float, height: float) -> None:
    """In inches, up to LARGEST."""
    figure.set_size_inches(min(width, LARGEST), min(height, LARGEST))


def draw_activations(layers: list[Layer], figure: Figure) -> None:
    """Units from top to bottom, those that change most; steps from left to right."""
    steps = max(len(layer.labels) for layer in layers)
    title = f"Hidden units along a sequence: the {UNITS_SHOWN} that vary most"
    if steps > STEPS_SHOWN:
        title += f", in the last {STEPS_SHOWN} of {steps:,} steps"
    figure.suptitle(title)
    set_size(figure, max(6.0, 0.13 * min(steps, STEPS_SHOWN)), 3 * len(layers))
    for ax, layer in zip(figure.subplots(len(layers), squeeze=False).flat, layers):
        output, labels = layer.output[-STEPS_SHOWN:], layer.labels[-STEPS_SHOWN:]
        most = output.std(0, correction=0).argsort(descending=True)[:UNITS_SHOWN]
        units = output[:, most]
        # Units that move together stand together: in the order of their first shared direction.
        first = torch.linalg.svd(units - units.mean(0), full_matrices=False).Vh[0]
        h, top = units[:, first.argsort()].t(), float(units.abs().max())
        image = ax.imshow(h.numpy(), aspect="auto", cmap="coolwarm", vmin=-top, vmax=top)
        # In matplotlib's markup a dollar sign begins mathematics.
        ticks = [repr(s)[1:-1].replace("$", r"\$") for s in labels]
        ax.set_xticks(range(len(labels)), ticks, size=7)
        if max(map(len, labels)) > 3:
            ax.tick_params("x", rotation=90)
        ax.set(yticks=[], ylabel="units")
        ax.set_title(layer.name, size=9)
        figure.colorbar(image, ax=ax, fraction=0.03)


def draw_gradients(layers: list[Layer], figure: Figure) -> None:
    """The norm against the distance, on a scale where an exponential is a straight line."""
    figure.suptitle(r"Gradient of $v \cdot h_T$ by $W_{ih} x_t$")
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
    set_size(figure, 4 * columns, 4.2 * rows)
    circle = np.linspace(0, 2 * np.pi, 200)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax, layer in zip(axes, layers):
        for gate, values in (gates := layer.eigenvalues()).items():
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
    checkpoint = load_checkpoint(path, *(name for name in COMMANDS if COMMANDS[name].trains))
    job = checkpoint["format"].split()[1]
    if job == "charlm":
        model, characters = charlm.restore(checkpoint, path)
        if text == "":
            raise JobError("--text is empty")
        text = text or PYTHON_LINE
        return model, Example((symbols_of(text, characters).unsqueeze(1),), {"rnn": text})
    if text is not None:
        raise JobError(f"--text is for charlm, and this is a checkpoint of {job}")
    jobs = import_module(f"rnn.jobs.{COMMANDS[job].module}").JOBS
    return restore(next(j for j in jobs if j.name == job), checkpoint, path)


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
        write_figure(out / file, figure, dpi=80)
    for layer in layers:
        first, last = float(layer.gradient[0]), float(layer.gradient[-1])
        radii = ", ".join(f"{name} {r:.2f}".strip() for name, r in layer.radii().items())
        print(
            f"{layer.name}: spectral radius {radii}; gradient {last:.2g} at distance "
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
