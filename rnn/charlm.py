"""The main job: a deep RNN that learns to write, one character at a time.

    h_t = tanh(W_ih x_t + W_hh h_{t-1} + b)   in every layer, x_t the output of the layer below
    y_t = W_hy h_t                            the logits of the next character

It is trained by truncated back-propagation through time (BPTT): the text is cut into ROWS streams
that are read side by side, CHUNK steps at a time; the state is carried from chunk to chunk, the
gradient is not. Held-out bits per character stand beside those of count models of order 0 to 3.
"""

import hashlib
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from threading import Event
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from . import RNN, explain

ROWS = 64  # B: streams of text read side by side
CHUNK = 32  # T: steps of truncated BPTT
EMBEDDING = 128
LEARNING_RATE = 3e-3
WARM_UP = 0.03  # of the time
CLIP = 0.3  # on the norm of the gradient of the mean loss, in nats per character
SAMPLE = 600  # characters
SHORTEST_TEXT = 1000  # characters
IGNORED = -100  # a target that is none: cross_entropy leaves it out
STDLIB = "the source of Python's standard library"
CHECKPOINT, LOSS_CURVE = "checkpoint.pt", "loss.png"
FORMAT = "fused-rnn charlm 1"


class JobError(Exception):
    """What was asked for cannot be done; the first line of the message says why."""

    def __str__(self) -> str:
        return super().__str__().splitlines()[0]


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


def read_text(path: str | None) -> str:
    """The text of a UTF-8 file; without a path, the source of Python's standard library."""
    # Of the library's folder only the files that lie in it: a sub-folder is site-packages, and
    # the text would change with every package installed.
    files = [Path(path)] if path else sorted(Path(os.__file__).parent.glob("*.py"))
    try:
        return "".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the text {path or ''}: {error}") from error


@dataclass(frozen=True)
class Corpus:
    """A text as symbols: i + 1 stands for characters[i], 0 for every other character."""

    characters: str  # those that occur more than once in the training text
    train: Tensor  # (N,) int64
    heldout: Tensor  # (M,) int64, the last 5 % of the text
    digest: str

    @classmethod
    def of(cls, text: str) -> "Corpus":
        if len(text) < SHORTEST_TEXT:
            raise JobError(f"the text has {len(text)} characters, {SHORTEST_TEXT} are needed")
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        trained = len(text) - len(text) // 20
        known = np.flatnonzero(np.bincount(points[:trained]) > 1)
        symbol = np.zeros(sys.maxunicode + 1, dtype=np.int64)
        symbol[known] = np.arange(1, len(known) + 1)
        train, heldout = torch.from_numpy(symbol[points]).tensor_split([trained])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls("".join(map(chr, known)), train, heldout, digest)

    @property
    def symbols(self) -> int:
        return len(self.characters) + 1


def streams(text: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cut a text into rows contiguous stretches: inputs and targets, both (steps, rows).

    Every character but the first is a target once; the places left over at the end are IGNORED.
    """
    steps = math.ceil((len(text) - 1) / rows)
    spare = steps * rows - (len(text) - 1)
    inputs = F.pad(text[:-1], (0, spare))
    targets = F.pad(text[1:], (0, spare), value=IGNORED)
    return inputs.view(rows, steps).t().contiguous(), targets.view(rows, steps).t().contiguous()


class CharLM(nn.Module):
    """Embedding, a stack of Elman layers, and the read-out y_t = W_hy h_t."""

    def __init__(self, symbols: int, hidden_size: int, num_layers: int, backend: str = "auto"):
        super().__init__()
        self.embedding = nn.Embedding(symbols, EMBEDDING)
        self.rnn = RNN(EMBEDDING, hidden_size, num_layers, nonlinearity="tanh", backend=backend)
        self.readout = nn.Linear(hidden_size, symbols, bias=False)

    def forward(self, symbols: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, B) symbols and state (L, B, H), zero if None -> logits (T, B, V) and new state."""
        output, state = self.rnn(self.embedding(symbols), state)
        return self.readout(output), state


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits (T, B, V) and targets (T, B), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: CharLM, corpus: Corpus) -> float:
    """Bits per character over the whole held-out text.

    The text is read as ROWS contiguous streams at once, each from a zero state that it then
    carries to its end. A stream's first input is the character before it, so that every held-out
    character is predicted, and counted, exactly once.
    """
    device = model.readout.weight.device
    inputs, targets = streams(torch.cat((corpus.train[-1:], corpus.heldout)).to(device), ROWS)
    state, total = None, 0.0
    for x, y in zip(inputs.split(256), targets.split(256)):
        logits, state = model(x, state)
        total += nats(logits, y).item()
    return total / math.log(2) / len(corpus.heldout)


@torch.no_grad()
def sample(model: CharLM, corpus: Corpus, length: int) -> str:
    """Let the model write length characters, from a zero state and the start of a line."""
    device = model.readout.weight.device
    symbol, state = torch.tensor(corpus.characters.find("\n") + 1), None
    written, alphabet = "", "\ufffd" + corpus.characters
    for _ in range(length):
        logits, state = model(symbol.view(1, 1).to(device), state)
        # Drawn on the CPU, so that the one generator a checkpoint keeps is the one in use.
        symbol = torch.multinomial(logits.flatten().float().softmax(0).cpu(), 1)
        written += alphabet[int(symbol)]
    return written


def count_models(corpus: Corpus, orders: int = 4) -> list[float]:
    """Held-out bits per character of the count models of order 0, 1, 2, ...

    Order n predicts c from the n characters before it, smoothed by Witten and Bell's method C:

        p_n(c | context) = (N(context c) + S(context) p_{n-1}(c)) / (N(context) + S(context))

    N counts in the training text, S is how many different characters follow the context there,
    and p_{-1} is uniform. Source: Witten and Bell, The zero-frequency problem, 1991.
    """
    text = torch.cat((corpus.train, corpus.heldout))
    trained, V = len(corpus.train), corpus.symbols
    p = torch.full((len(corpus.heldout),), 1 / V, dtype=torch.float64)
    context = torch.zeros_like(text)  # the n characters before each place, as one number
    bits = []
    for n in range(orders):
        grams, gram = torch.unique(context * V + text, return_inverse=True)
        N = gram[n:trained].bincount(minlength=len(grams))
        N_context = (grams // V).bincount(N)
        # 1 where the context is new: there p_{n-1} stands.
        S = (grams // V).bincount(N > 0).clamp(min=1)
        here = context[trained:]
        p = (N[gram[trained:]] + S[here] * p) / (N_context[here] + S[here])
        bits.append(-p.log2().mean().item())
        context = F.pad(gram[:-1], (1, 0))
    return bits


def learning_rate(spent: float) -> float:
    """The rate when this fraction of the time is spent: a short rise, then down to zero."""
    return LEARNING_RATE * min(spent / WARM_UP, 1) * (1 - spent)


class Trainer:
    """Truncated BPTT over one text, one chunk at a time: all that a checkpoint must hold.

    Adam steps float32 copies of 16-bit weights, which lack the digits for its small steps; other
    weights are stepped where they lie (`masters` shares their memory).
    """

    def __init__(self, model: CharLM, text: Tensor) -> None:
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

        logits, state = self.model(self.inputs[chunk], self.state)
        loss = nats(logits, targets)
        self.model.zero_grad()
        loss.backward()  # of the sum: the mean's gradients would underflow in float16
        self._update(rate, characters)

        self.state = state.detach()
        self.position += CHUNK
        self.losses.append(loss.item() / characters / math.log(2))
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _update(self, rate: float, characters: int) -> None:
        weights = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            master.grad = weights[name].grad.to(master.dtype) / characters  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
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


@contextmanager
def interrupts_held() -> Iterator[Event]:
    """Turn Ctrl-C into an event, so that it cuts neither a training step nor a save in two."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


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


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write to a file beside path, then rename: at every moment path is a whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, once the checksums that torch.load skips are found right."""
    try:
        with ZipFile(path) as archive:
            if archive.testzip():
                raise BadZipFile("its checksums are wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise JobError(f"there is no checkpoint {path} to resume from") from error
    except (OSError, EOFError, RuntimeError, ValueError, BadZipFile, UnpicklingError) as error:
        raise JobError(f"cannot read the checkpoint {path}: {error}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise JobError(f"{path} is no checkpoint of this job")
    return checkpoint


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
    cuda = torch.cuda.is_available()
    device = settings.device if settings.device != "auto" else "cuda" if cuda else "cpu"
    if device == "cuda" and not cuda:
        raise JobError("--device cuda: PyTorch finds no GPU here")
    if checkpoint and checkpoint["digest"] != corpus.digest:
        raise JobError("the text is not the one that the checkpoint was trained on")
    dtype, L, H = getattr(torch, settings.dtype), settings.num_layers, settings.hidden_size
    torch.manual_seed(settings.seed)
    try:
        model = CharLM(corpus.symbols, H, L, settings.backend).to(device, dtype)
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # better now than after the training
    except OSError as error:
        raise JobError(f"cannot write to {out}: {error}") from error

    with interrupts_held() as interrupted:
        train(trainer, lambda: trainer.seconds / settings.seconds, interrupted)
        about = {"format": FORMAT, "settings": asdict(settings), "digest": corpus.digest}
        about["characters"] = corpus.characters
        save_checkpoint(about | trainer.state_dict(), out / CHECKPOINT)
    if interrupted.is_set():
        raise KeyboardInterrupt
    report(trainer, corpus, out)
    print(f"checkpoint and loss curve: {out / CHECKPOINT}, {out / LOSS_CURVE}")
