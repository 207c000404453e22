"""A pattern trained on real data: what the five jobs share."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from .. import explain
from ..modules import NAMES
from .checkpoint import Saver, check_weights, format_of, read_settings, reading
from .cli import (
    CHECKPOINT,
    SAVE_EVERY,
    JobError,
    Parser,
    Stderr,
    execute,
    find_device,
    whole,
)
from .files import make_folder, owned, write_figure, write_file
from .interrupts import interrupts_held

PICTURE, SCORES = "learned.png", "scores.json"
WARM_UP = 50  # steps
CLIP = 1.0  # on the norm of the gradient


Model = Any  # the pattern that a job's model() makes


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. A checkpoint keeps it."""

    ADDED: ClassVar = ("save_every",)  # older checkpoints lack it

    steps: int
    cell: str = "rnn_tanh"
    hidden_size: int = 128
    num_layers: int = 1
    seed: int = 0
    backend: str = "auto"
    device: str = "auto"
    save_every: float = SAVE_EVERY

    def layers(self) -> dict[str, Any]:
        """The arguments of a pattern that say what its recurrent module is."""
        return {
            "hidden_size": self.hidden_size,
            "cell": self.cell,
            "num_layers": self.num_layers,
            "backend": self.backend,
        }


class Example(NamedTuple):
    """A held-out sequence to look at: the arguments of a model's forward, one row of a batch, and
    for each recurrent module in it, by its name there, what to write below its steps."""

    args: tuple[Tensor, ...]
    labels: dict[str, Sequence[str]]


class Job:
    """One pattern on one set of data. The data lies on `device`; random numbers are torch's own,
    drawn on the CPU."""

    name: ClassVar[str]
    title: ClassVar[str]  # of the picture
    scored: ClassVar[str]  # what the score is a share of
    defaults: ClassVar[Settings]
    rate: ClassVar[float] = 3e-3  # the highest learning rate
    batch: ClassVar[int] = 128

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def model(self, settings: Settings) -> Model:
        raise NotImplementedError

    def loss(self, model: Model) -> Tensor:
        """Of a random batch of the training data."""
        raise NotImplementedError

    def score(self, model: Model) -> float:
        """The share of the held-out data that the model gets right, in [0, 1]."""
        raise NotImplementedError

    def baselines(self) -> dict[str, float]:
        """Scores on the same data of what needs no recurrent network; the first is the one that
        the model must beat."""
        raise NotImplementedError

    def draw(self, model: Model, figure: Figure) -> None:
        """What the model has learned, on held-out data."""
        raise NotImplementedError

    def example(self, model: Model) -> Example:
        raise NotImplementedError


def clip_gradient(weights: Iterable[Tensor], limit: float, step: int) -> None:
    """Clip the norm of the gradient, or JobError if it is not finite: the weights are then still
    those of the step before."""
    if not nn.utils.clip_grad_norm_(weights, limit).isfinite():
        raise JobError(f"the training diverged: at step {step} the gradient is not finite")


def fit(
    job: Job,
    model: Model,
    steps: int,
    interrupted: Event | None = None,
    after_step: Callable[[list[float]], None] = lambda losses: None,
) -> list[float]:
    """Train with Adam for so many batches, or until interrupted; the loss of each in nats.

    The learning rate rises for WARM_UP steps and falls to zero from there on. after_step is given
    the losses so far.
    """
    optimizer = torch.optim.Adam(model.parameters())
    losses: list[float] = []
    model.train()
    for step in (bar := tqdm(range(steps), desc=job.name, mininterval=0.5, file=Stderr())):
        if interrupted is not None and interrupted.is_set():
            break
        optimizer.param_groups[0]["lr"] = job.rate * min((step + 1) / WARM_UP, 1 - step / steps)
        loss = job.loss(model)
        optimizer.zero_grad()
        loss.backward()
        clip_gradient(model.parameters(), CLIP, step + 1)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            recent = losses[-50:]
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f} nats", refresh=False)
        after_step(losses)
    model.eval()
    return losses


def recurrent_modules(model: nn.Module) -> dict[str, Any]:
    """The recurrent modules of a model, of whatever cell, by their names in it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}


def build(job: Job, settings: Settings) -> Model:
    """The model of a run. Prints what it is and what runs it."""
    torch.manual_seed(settings.seed)
    try:
        model = job.model(settings).to(job.device)
        modules: dict[str, Any] = recurrent_modules(model)
        plans = {
            name: explain(m, torch.empty(1, job.batch, m.input_size, device=job.device))
            for name, m in modules.items()
        }
    except RuntimeError as error:  # no memory, or --backend triton where it cannot run
        raise JobError(f"cannot run this model: {error}") from error
    weights = sum(weight.numel() for weight in model.parameters())
    s = settings
    print(f"{job.name}: {s.num_layers} x {s.hidden_size} {s.cell}, {weights:,} weights")
    for name, plan in plans.items():
        print(f"{name}: " + plan.replace("\n", f"\n{name}: "))
    return model


def run(job: Job, settings: Settings, out: Path, overwrite: bool = False) -> None:
    """Train, save checkpoints, report. An interrupt of the training is raised once a checkpoint is
    saved."""
    model = build(job, settings)
    make_folder(out)
    with owned(out):
        saver = Saver(out / CHECKPOINT, settings.save_every, overwrite)

        def state(losses: list[float]) -> dict[str, Any]:
            about = {"format": format_of(job.name), "settings": asdict(settings)}
            return about | {"model": model.state_dict(), "losses": losses}

        with interrupts_held() as interrupted:
            losses = fit(
                job,
                model,
                settings.steps,
                interrupted,
                lambda losses: saver.after_step(lambda: state(losses)),
            )
            if losses:
                saver.at_end(lambda: state(losses))
        report(job, model, settings, out)


def report(job: Job, model: Model, settings: Settings, out: Path) -> None:
    """Print the scores, and leave them and a picture in the folder."""
    scores = {**job.baselines(), "RNN": job.score(model)}
    print(f"\nheld out, share of {job.scored}:")
    for name, score in scores.items():
        print(f"  {name:24} {score:.3f}")
    about = {"job": job.name, "scored": job.scored, "settings": asdict(settings)}
    about |= {"torch": torch.__version__, "scores": scores}
    write_file(out / SCORES, (json.dumps(about, indent=1) + "\n").encode())
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(job.title)
    job.draw(model, figure)
    write_figure(out / PICTURE, figure, dpi=80)
    print(f"checkpoint, scores and picture: {out}/{CHECKPOINT}, {SCORES}, {PICTURE}")


def restore(job_type: type[Job], checkpoint: dict[str, Any], path: Path) -> tuple[Model, Example]:
    """The trained model of a checkpoint, on the CPU, and a sequence to look at it with. JobError
    unless the checkpoint is whole."""
    job, saved = job_type(), checkpoint["model"]
    with reading(path):
        settings = read_settings(checkpoint["settings"], Settings, make_parser(job_type))
        settings = replace(settings, backend="auto")
        check_weights(saved, settings, lambda: job.model(settings), torch.float32)
    model = job.model(settings)
    model.load_state_dict(saved)
    return model.eval(), job.example(model)


def start(job_type: type[Job], given: dict[str, Any], out: Path) -> None:
    overwrite = given.pop("overwrite", False)
    settings = replace(job_type.defaults, **given)
    # The matrices are small: a second thread would wait for the first longer than it works.
    torch.set_num_threads(1)
    run(job_type(find_device(settings.device)), settings, out, overwrite)


def make_parser(job: type[Job]) -> Parser:
    parser = Parser(prog=f"python -m rnn {job.name}", description=job.__doc__)
    defaults = job.defaults
    parser.add("steps", "batches to train on", defaults.steps, type=whole(1), metavar="N")
    parser.add("cell", "of the recurrence", defaults.cell, choices=sorted(NAMES))
    parser.add("hidden_size", "units in a layer", defaults.hidden_size, type=whole(1), metavar="H")
    parser.add("num_layers", "layers", defaults.num_layers, type=whole(1), metavar="L")
    parser.add("seed", "of weights and batches", defaults.seed, type=whole(0), metavar="N")
    parser.add_where()
    parser.add_saving()
    parser.add_out(Path("runs") / job.name, f"folder for {CHECKPOINT}, {SCORES} and {PICTURE}")
    return parser


def main_of(*jobs: type[Job]) -> Any:
    """main(name, argv) of a module that holds these jobs."""

    def main(name: str, argv: Sequence[str]) -> int:
        job = next(job for job in jobs if job.name == name)
        return execute(make_parser(job), argv, lambda given, out: start(job, given, out))

    return main


def grid(figure: Figure, rows: int, columns: int) -> list[Any]:
    """rows x columns axes without ticks, row by row."""
    axes = list(figure.subplots(rows, columns).flat)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    return axes
