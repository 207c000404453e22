"""The main job: a deep RNN that learns to write, one character at a time.

    h_t = tanh(W_ih x_t + W_hh h_{t-1} + b)   in every layer, x_t the output of the layer below
    y_t = W_hy h_t                            the logits of the next character

It is trained by truncated back-propagation through time (BPTT): the text is cut into ROWS streams
that are read side by side, CHUNK steps at a time; the state is carried from chunk to chunk, the
gradient is not. Held-out bits per character stand beside those of count models of order 0 to 3.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from .. import ManyToMany, explain
from ..patterns import IGNORED
from .cli import (
    CHECKPOINT,
    JobError,
    Parser,
    duration,
    execute,
    find_device,
    format_of,
    interrupts_held,
    load_checkpoint,
    make_folder,
    save_checkpoint,
    whole,
)
from .corpus import STDLIB, Corpus, count_models, read_text, streams
from .training import Example

ROWS = 64  # B: streams of text read side by side
CHUNK = 32  # T: steps of truncated BPTT
EMBEDDING = 128
LEARNING_RATE = 3e-3
WARM_UP = 0.03  # of the time
CLIP = 0.3  # on the norm of the gradient of the mean loss, in nats per character
TRIAL = 4  # steps
SAMPLE = 600  # characters
LOSS_CURVE = "loss.png"
PYTHON_LINE = "def norm(x):\n    return math.sqrt(sum(v * v for v in x))\n"


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. A checkpoint keeps it."""

    hidden_size: int = 256
    num_layers: int = 2
    dtype: str = "float32"
    backend: str = "auto"
    device: str = "auto"
    seconds: float = 65.0
    seed: int = 0
    text: str | None = None


def make_model(symbols: int, settings: Settings) -> ManyToMany:
    """Embedding, a stack of Elman layers, and the read-out y_t = W_hy h_t."""
    return ManyToMany(
        symbols,
        settings.hidden_size,
        symbols,
        embedding=EMBEDDING,
        num_layers=settings.num_layers,
        backend=settings.backend,
    )


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits (T, B, V) and targets (T, B), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: ManyToMany, corpus: Corpus) -> float:
    """Bits per character over the whole held-out text.

    The text is read as ROWS contiguous streams at once, each from a zero state that it then
    carries to its end. A stream's first input is the character before it, so that every held-out
    character is predicted, and counted, exactly once.
    """
    device = model.readout.weight.device
    inputs, targets = streams(torch.cat((corpus.train[-1:], corpus.heldout)).to(device), ROWS)
    state, total = None, 0.0
    for x, y in zip(inputs.split(256), targets.split(256)):
        logits, state = model.stream(x, state)
        total += nats(logits, y).item()
    return total / math.log(2) / len(corpus.heldout)


@torch.no_grad()
def sample(model: ManyToMany, corpus: Corpus, length: int) -> str:
    """Let the model write length characters, from a zero state and the start of a line."""
    device = model.readout.weight.device
    symbol, state = torch.tensor(corpus.characters.find("\n") + 1), None
    written, alphabet = "", "\ufffd" + corpus.characters
    for _ in range(length):
        logits, state = model.stream(symbol.view(1, 1).to(device), state)
        # Drawn on the CPU, so that the one generator a checkpoint keeps is the one in use.
        symbol = torch.multinomial(logits.flatten().float().softmax(0).cpu(), 1)
        written += alphabet[int(symbol)]
    return written


def learning_rate(spent: float) -> float:
    """The rate when this fraction of the time is spent: a short rise, then down to zero."""
    return LEARNING_RATE * min(spent / WARM_UP, 1) * (1 - spent)


class Trainer:
    """Truncated BPTT over one text, one chunk at a time: all that a checkpoint must hold.

    Adam steps float32 copies of 16-bit weights, which lack the digits for its small steps; other
    weights are stepped where they lie (`masters` shares their memory).
    """

    def __init__(self, model: ManyToMany, text: Tensor) -> None:
        self.model = model
        self.inputs, self.targets = streams(text.to(model.readout.weight.device), ROWS)
        self.masters = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in model.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.masters.values())
        self.position = 0  # in every stream
        self.state: Tensor | None = None  # (L, B, H)
        self.losses: list[float] = []  # of each step, in bits per character
        self.seconds = 0.0  # spent in steps

    def step(self, rate: float) -> None:
        """Read the next chunk and learn from it."""
        started = time.perf_counter()
        if self.position >= len(self.inputs):
            self.position, self.state = 0, None
        chunk = slice(self.position, self.position + CHUNK)
        targets = self.targets[chunk]
        characters = int(targets.ne(IGNORED).sum())

        logits, state = self.model.stream(self.inputs[chunk], self.state)
        loss = nats(logits, targets)
        self.model.zero_grad()
        loss.backward()  # of the sum: the mean's gradients would underflow in float16
        self._update(rate, characters)

        assert isinstance(state, Tensor)
        self.state = state.detach()
        self.position += CHUNK
        self.losses.append(loss.item() / characters / math.log(2))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _update(self, rate: float, characters: int) -> None:
        weights = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            master.grad = weights[name].grad.to(master.dtype) / characters  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for name, master in self.masters.items():
            weights[name].copy_(master)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "state": self.state,
            "losses": self.losses,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])  # checks names and shapes
        for name, master in self.masters.items():
            master.copy_(saved["model"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.position, self.losses = saved["position"], saved["losses"]
        self.seconds = saved["seconds"]
        state = saved["state"]
        self.state = None if state is None else state.to(self.inputs.device)
        torch.set_rng_state(saved["rng"])


def choose_threads(trainer: Trainer, rate: float) -> None:
    """One thread or all, whichever is faster in a few steps: where something else has a core,
    threads that wait for each other cost seconds a step."""
    seconds: dict[int, float] = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        trainer.step(rate)  # a warm-up
        before = trainer.seconds
        for _ in range(TRIAL):
            trainer.step(rate)
        seconds[threads] = trainer.seconds - before
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    print(f"{torch.get_num_threads()} of {max(seconds)} threads: faster in {TRIAL} steps")


def train(trainer: Trainer, spent: Callable[[], float], interrupted: Event) -> None:
    """Train until spent() reaches 1, or an interrupt; the learning rate follows spent()."""
    with tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}", mininterval=0.5) as bar:
        while (fraction := spent()) < 1 and not interrupted.is_set():
            trainer.step(learning_rate(fraction))
            recent = trainer.losses[-50:]
            read = len(trainer.losses) * CHUNK * ROWS
            bar.set_description_str(
                f"{sum(recent) / len(recent):.3f} bits per character, "
                f"{read / trainer.seconds:,.0f} characters/s",
                refresh=False,
            )
            bar.update(min(spent(), 1) - bar.n)


def plot_losses(losses: list[float], heldout: float, counted: list[float], path: Path) -> None:
    """Draw the training loss, and beside it what held-out text costs the RNN and its rival."""
    window = min(50, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    axes.plot(losses, color="lightgray", label="training, each step")
    axes.plot(range(window - 1, len(losses)), mean, label=f"training, mean of {window} steps")
    axes.axhline(heldout, color="black", label="held out, RNN")
    axes.axhline(counted[-1], color="black", linestyle=":", label="held out, count model, order 3")
    axes.set(xlabel="step", ylabel="bits per character")
    axes.legend()
    figure.savefig(path)


def make_trainer(settings: Settings, corpus: Corpus, checkpoint: dict[str, Any] | None) -> Trainer:
    """Build the model where it will run, say what it is and what runs it, restore its state."""
    device = find_device(settings.device)
    if checkpoint and checkpoint["digest"] != corpus.digest:
        raise JobError("the text is not the one that the checkpoint was trained on")
    dtype, L, H = getattr(torch, settings.dtype), settings.num_layers, settings.hidden_size
    torch.manual_seed(settings.seed)
    try:
        model = make_model(corpus.symbols, settings).to(device, dtype)
        trainer = Trainer(model, corpus.train)
        plan = explain(model.rnn, torch.empty(CHUNK, ROWS, EMBEDDING, device=device, dtype=dtype))
        if checkpoint:
            trainer.load_state_dict(checkpoint)
    except RuntimeError as error:  # no memory, or --backend triton where it cannot run
        raise JobError(f"cannot run this model: {error}") from error
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"model: {L} layers of {H}, {settings.dtype}, {weights:,} weights, on {device}\n{plan}")
    return trainer


def report(trainer: Trainer, corpus: Corpus, out: Path) -> None:
    """Print held-out bits per character and a sample, and draw the loss curve."""
    heldout, counted = evaluate(trainer.model, corpus), count_models(corpus)
    print(f"\nheld-out text, {len(corpus.heldout):,} characters: bits per character")
    for order, bits in enumerate(counted):
        print(f"  count model, order {order}   {bits:.3f}")
    print(f"  RNN                    {heldout:.3f}")
    print(f"\na sample of {SAMPLE} characters:\n{sample(trainer.model, corpus, SAMPLE)}\n")
    plot_losses(trainer.losses, heldout, counted, out / LOSS_CURVE)


def run(settings: Settings, out: Path, checkpoint: dict[str, Any] | None = None) -> None:
    """Train, save a checkpoint, report. An interrupt in training is raised once that is saved."""
    text = read_text(settings.text)
    corpus = Corpus.of(text)
    print(f"text: {settings.text or STDLIB}, {len(text):,} characters, {corpus.symbols} symbols")
    trainer = make_trainer(settings, corpus, checkpoint)
    if checkpoint:
        print(f"resumed after {len(trainer.losses)} steps, {trainer.seconds:.1f} s")
    make_folder(out)

    def spent() -> float:
        return trainer.seconds / settings.seconds

    with interrupts_held() as interrupted:
        if trainer.inputs.device.type == "cpu" and torch.get_num_threads() > 1:
            choose_threads(trainer, learning_rate(WARM_UP / 10))
        train(trainer, spent, interrupted)
        about = {
            "format": format_of("charlm"),
            "settings": asdict(settings),
            "digest": corpus.digest,
        }
        about["characters"] = corpus.characters
        save_checkpoint(about | trainer.state_dict(), out / CHECKPOINT)
    if interrupted.is_set():
        raise KeyboardInterrupt
    report(trainer, corpus, out)
    print(f"checkpoint and loss curve: {out / CHECKPOINT}, {out / LOSS_CURVE}")


def restore(checkpoint: dict[str, Any], text: str | None) -> tuple[ManyToMany, Example]:
    """The trained model of a checkpoint, on the CPU in float32, and a text for it to read."""
    characters, text = checkpoint["characters"], PYTHON_LINE if text is None else text
    if not text:
        raise JobError("--text is empty")
    model = make_model(
        len(characters) + 1, Settings(**{**checkpoint["settings"], "backend": "auto"})
    )
    model.load_state_dict(checkpoint["model"])
    symbols = torch.tensor([characters.find(c) + 1 for c in text]).unsqueeze(1)
    return model.eval(), Example((symbols,), {"rnn": text})


SHAPE = ("hidden_size", "num_layers", "dtype", "seed")  # what no resumed run can change
OUT = Path("runs/charlm")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m rnn",
        description="Train a deep RNN character language model, and hold it against count models.",
        epilog="What else there is: python -m rnn --list",
    )

    def add(name: str, help: str, **how: Any) -> None:
        parser.add(name, help, getattr(Settings, name), **how)

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
    return parser


def settle(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """The settings of a run: those given, else those of its checkpoint, else the defaults."""
    for name in SHAPE:
        if name in saved and given.get(name, saved[name]) != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise JobError(
                f"the checkpoint is of another shape: {flag} {saved[name]}, not {given[name]}"
            )
    return Settings(**{**saved, **given})


def start(given: dict[str, Any], out: Path) -> None:
    """Run what a parsed command line asks for."""
    checkpoint = load_checkpoint(out / CHECKPOINT, "charlm") if given.pop("resume", False) else None
    run(settle(given, checkpoint["settings"] if checkpoint else {}), out, checkpoint)


def main(name: str, argv: Sequence[str]) -> int:
    return execute(make_parser(), argv, start)
