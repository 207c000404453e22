"""The main job: train the model of language_model.py on a text, and report.

Held-out bits per character stand beside those of count models of order 0 to 3.
"""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from .. import ManyToMany, explain
from ..modules import NAMES
from .checkpoint import (
    Saver,
    check_fields,
    check_weights,
    format_of,
    load_checkpoint,
    read_settings,
    reading,
)
from .cli import CHECKPOINT, JobError, Parser, Stderr, duration, execute, find_device, whole
from .corpus import STDLIB, Corpus, count_models, read_text
from .files import make_folder, owned, write_figure
from .interrupts import interrupts_held
from .language_model import (
    CHUNK,
    EMBEDDING,
    ROWS,
    WARM_UP,
    Settings,
    Trainer,
    evaluate,
    learning_rate,
    make_model,
    sample,
)
from .processes import Processes, processes

TRIAL = 4  # steps
SAMPLE = 600  # characters
LOSS_CURVE = "loss.png"
FIELDS = {  # of a checkpoint, beside those of every job and `state`
    "digest": str,  # of the text
    "characters": str,  # of the corpus
    "optimizer": dict,
    "position": int,
    "seconds": float,
    "rng": Tensor,
}


def choose_threads(trainer: Trainer, rate: float, ended: Callable[[], bool]) -> None:
    """One thread or all, whichever is faster in a few steps: where another program has a core,
    threads that wait for each other cost seconds a step. Stops where the training has ended."""
    seconds: dict[int, float] = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        for step in range(1 + TRIAL):  # the first is a warm-up
            if step == 1:
                before = trainer.seconds
            if ended():
                return
            trainer.step(rate)
        seconds[threads] = trainer.seconds - before
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    print(f"{torch.get_num_threads()} of {max(seconds)} threads: faster in {TRIAL} steps")


def train(
    trainer: Trainer,
    spent: Callable[[], float],
    ended: Callable[[], bool],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train until ended(); the learning rate follows spent(), which rises to 1."""
    form = "{percentage:3.0f}%|{bar}| {desc}"
    with tqdm(total=1.0, bar_format=form, mininterval=0.5, file=Stderr()) as bar:
        while not ended():
            trainer.step(learning_rate(min(spent(), 1)))
            recent = trainer.losses[-50:]
            read = len(trainer.losses) * CHUNK * ROWS
            bar.set_description_str(
                f"{sum(recent) / len(recent):.3f} bits per character, "
                f"{read / trainer.seconds:,.0f} characters/s",
                refresh=False,
            )
            bar.update(min(spent(), 1) - bar.n)
            after_step()


def plot_losses(losses: list[float], heldout: float, counted: list[float], path: Path) -> None:
    """Draw the training loss, and the bits per character of held-out text beside it."""
    window = min(50, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    axes.plot(losses, color="lightgray", label="training, each step")
    axes.plot(range(window - 1, len(losses)), mean, label=f"training, mean of {window} steps")
    axes.axhline(heldout, color="black", label="held out, RNN")
    axes.axhline(counted[-1], color="black", linestyle=":", label="held out, count model, order 3")
    axes.set(xlabel="step", ylabel="bits per character")
    axes.legend()
    write_figure(path, figure, dpi=100)


def make_trainer(
    settings: Settings,
    corpus: Corpus,
    checkpoint: dict[str, Any] | None,
    path: Path,
    team: Processes,
) -> Trainer:
    """Build the model where it will run, print what it is and what runs it, restore its state."""
    device = find_device(settings.device)
    dtype, L, H = getattr(torch, settings.dtype), settings.num_layers, settings.hidden_size
    torch.manual_seed(settings.seed)
    try:
        model = make_model(corpus.symbols, settings).to(device, dtype)
        trainer = Trainer(model, corpus.train, team)
        rows = ROWS // team.count
        plan = explain(model.rnn, torch.empty(CHUNK, rows, EMBEDDING, device=device, dtype=dtype))
    except RuntimeError as error:  # no memory, or --backend triton where it cannot run
        raise JobError(f"cannot run this model: {error}") from error
    if checkpoint:
        if checkpoint["digest"] != corpus.digest:
            raise JobError("the text is not the one that the checkpoint was trained on")
        with reading(path):
            if checkpoint["characters"] != corpus.characters:
                raise ValueError("its 'characters' are not those of the text")
            trainer.load_state_dict(checkpoint)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"model: {L} layers of {H}, {settings.dtype}, {weights:,} weights, on {device}")
    if team.count > 1:
        print(f"{team.count} processes, {rows} of {ROWS} streams each")
    print(f"cell: {settings.cell}\n{plan}")
    return trainer


def report(trainer: Trainer, corpus: Corpus, out: Path) -> None:
    """Print held-out bits per character and a sample, and draw the loss curve."""
    heldout, counted = evaluate(trainer.model, corpus), count_models(corpus)
    print(f"\nheld-out text, {len(corpus.heldout):,} characters: bits per character")
    for order, bits in enumerate(counted):
        print(f"  count model, order {order}   {bits:.3f}")
    print(f"  RNN                    {heldout:.3f}")
    written = sample(trainer.model, corpus.characters, SAMPLE)
    print(f"\na sample of {SAMPLE} characters:\n{written}\n")
    plot_losses(trainer.losses, heldout, counted, out / LOSS_CURVE)


def read_corpus(path: str | None) -> Corpus:
    corpus = Corpus.of(text := read_text(path))
    print(f"text: {path or STDLIB}, {len(text):,} characters, {corpus.symbols} symbols")
    return corpus


def learn(
    settings: Settings,
    corpus: Corpus,
    out: Path,
    team: Processes,
    *,
    checkpoint: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Train in a folder that is owned, save checkpoints, report. An interrupt of the training is
    raised once a checkpoint is saved; that of one process ends all."""
    path = out / CHECKPOINT
    trainer = make_trainer(settings, corpus, checkpoint, path, team)
    if checkpoint:
        print(f"resumed after {len(trainer.losses)} steps, {trainer.seconds:.1f} s")
    saver = Saver(path, settings.save_every, overwrite=overwrite or checkpoint is not None)

    def spent() -> float:
        return trainer.seconds / settings.seconds

    def save(how: Callable[[Callable[[], dict[str, Any]]], None]) -> None:
        about = {"format": format_of("charlm"), "settings": asdict(settings)}
        about |= {"digest": corpus.digest, "characters": corpus.characters}
        checkpoint = about | trainer.state_dict()
        team.by_first(lambda: how(lambda: checkpoint))

    def save_if_due() -> None:
        if team.any(team.first and saver.due()):
            save(saver.after_step)

    if spent() < 1:
        with interrupts_held() as interrupted:

            def ended() -> bool:
                # As all agree, and no more: a signal that has come since is for the next time.
                if (stop := team.any(interrupted.is_set())) and not interrupted.is_set():
                    signal.raise_signal(signal.SIGTERM)  # as another process got one
                return stop or spent() >= 1

            cpu = trainer.inputs.device.type == "cpu"
            if cpu and team.count == 1 and torch.get_num_threads() > 1:
                choose_threads(trainer, learning_rate(max(spent(), WARM_UP / 10)), ended)
            train(trainer, spent, ended, save_if_due)
            if trainer.losses:
                save(saver.at_end)
    else:
        print(f"nothing to train: its {settings.seconds:g} s are spent; --seconds gives it more")
    if team.first:
        report(trainer, corpus, out)
    print(f"checkpoint and loss curve: {path}, {out / LOSS_CURVE}")


def run(
    settings: Settings, out: Path, overwrite: bool = False, team: Processes | None = None
) -> None:
    """Start afresh: read the text, train, report."""
    team = team or Processes()
    with ExitStack() as while_owned:

        def prepare() -> Corpus:
            corpus = read_corpus(settings.text)
            make_folder(out)
            while_owned.enter_context(owned(out))
            return corpus

        learn(settings, team.by_first(prepare), out, team, overwrite=overwrite)


def resume(given: dict[str, Any], out: Path, team: Processes) -> None:
    """Go on from the checkpoint in a folder, with the given settings and its others."""
    path = out / CHECKPOINT
    with ExitStack() as while_owned:

        def prepare() -> tuple[Settings, Corpus, dict[str, Any]]:
            if not path.is_file():
                raise JobError(f"there is no checkpoint {path}")
            # Before the checkpoint is read: nobody may replace it meanwhile.
            while_owned.enter_context(owned(out))
            checkpoint = load_checkpoint(path, "charlm")
            settings = settle(given, check(checkpoint, path))
            return settings, read_corpus(settings.text), checkpoint

        settings, corpus, checkpoint = team.by_first(prepare)
        learn(settings, corpus, out, team, checkpoint=checkpoint)


def check(checkpoint: dict[str, Any], path: Path) -> Settings:
    """The settings of a checkpoint of this job. JobError unless it is whole."""
    with reading(path):
        check_fields(checkpoint, FIELDS)
        if "state" not in checkpoint:
            raise ValueError("it has no 'state'")
        settings = read_settings(checkpoint["settings"], Settings, make_parser())
        characters = checkpoint["characters"]
        if len(set(characters)) != len(characters):
            raise ValueError("its 'characters' are not all different")
        dtype = torch.promote_types(getattr(torch, settings.dtype), torch.float32)
        symbols = len(characters) + 1
        check_weights(checkpoint["model"], settings, lambda: make_model(symbols, settings), dtype)
    return settings


def restore(checkpoint: dict[str, Any], path: Path) -> tuple[ManyToMany, str]:
    """The trained model of a checkpoint, on the CPU in float32, and its characters."""
    settings = replace(check(checkpoint, path), backend="auto")
    model = make_model(len(checkpoint["characters"]) + 1, settings)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["characters"]


SHAPE = ("cell", "hidden_size", "num_layers", "dtype", "seed")  # what no resumed run can change
OUT = Path("runs/charlm")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m rnn",
        description="Train a deep RNN character language model, and compare it with count models.",
        epilog="The other commands: python -m rnn --list",
    )

    def add(name: str, help: str, **how: Any) -> None:
        parser.add(name, help, getattr(Settings, name), **how)

    add("cell", "of the recurrence", choices=sorted(NAMES))
    add("hidden_size", "units in a layer", type=whole(1), metavar="H")
    add("num_layers", "layers", type=whole(1), metavar="L")
    add("dtype", "of weights and states; the loss is never 16-bit", choices=DTYPES)
    parser.add_where()
    add("seconds", "of training, all resumed runs together", type=duration, metavar="S")
    add("seed", "of the weights and the sample", type=whole(0), metavar="N")
    parser.add("text", "UTF-8 text to learn", STDLIB, type=os.path.abspath, metavar="FILE")
    parser.add_out(OUT, f"folder for {CHECKPOINT} and {LOSS_CURVE}")
    resume = "go on from the checkpoint in --out; a flag left out keeps the value it had there"
    parser.add("resume", resume, "start afresh", action="store_true")
    parser.add_saving()
    return parser


def settle(given: dict[str, Any], saved: Settings) -> Settings:
    """The settings of a resumed run: those given, else those of its checkpoint."""
    for name in SHAPE:
        if given.get(name, kept := getattr(saved, name)) != kept:
            flag = "--" + name.replace("_", "-")
            raise JobError(f"the checkpoint is of another shape: {flag} {kept}, not {given[name]}")
    return replace(saved, **given)


def start(given: dict[str, Any], out: Path) -> None:
    """Run what a parsed command line asks for."""
    overwrite, resumed = given.pop("overwrite", False), given.pop("resume", False)
    if resumed and overwrite:
        raise JobError("--resume goes on from the checkpoint that --overwrite replaces: give one")
    with processes(ROWS) as team:
        if resumed:
            resume(given, out, team)
        else:
            run(Settings(**given), out, overwrite, team)


def main(name: str, argv: Sequence[str]) -> int:
    return execute(make_parser(), argv, start)
