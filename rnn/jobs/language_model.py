"""The model of the main job: a deep RNN that reads and writes one character at a time.

    h_t = tanh(W_ih x_t + W_hh h_{t-1} + b)   in every layer, x_t the output of the layer below
    y_t = W_hy h_t                            the logits of the next character

It is trained by truncated back-propagation through time (BPTT): the text is cut into ROWS streams
that are read side by side, CHUNK steps at a time; the state is carried from chunk to chunk, the
gradient is not.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ManyToMany
from ..generation import State, map_state
from ..loss import IGNORED
from .checkpoint import fits
from .cli import SAVE_EVERY, JobError
from .corpus import Corpus, streams
from .processes import Processes
from .training import clip_gradient

ROWS = 64  # B: streams of text read side by side
CHUNK = 32  # T: steps of truncated BPTT
EMBEDDING = 128
LEARNING_RATE = 3e-3
WARM_UP = 0.03  # of the time
CLIP = 0.3  # on the norm of the gradient of the mean loss, in nats per character


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. A checkpoint keeps it."""

    ADDED: ClassVar = ("cell", "save_every")  # older checkpoints lack them

    cell: str = "rnn_tanh"
    hidden_size: int = 256
    num_layers: int = 2
    dtype: str = "float32"
    backend: str = "auto"
    device: str = "auto"
    seconds: float = 65.0
    seed: int = 0
    text: str | None = None
    save_every: float = SAVE_EVERY


def make_model(symbols: int, settings: Settings) -> ManyToMany:
    """Embedding, a stack of recurrent layers, and the read-out y_t = W_hy h_t."""
    return ManyToMany(
        symbols,
        settings.hidden_size,
        symbols,
        cell=settings.cell,
        embedding=EMBEDDING,
        num_layers=settings.num_layers,
        backend=settings.backend,
    )


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits (T, B, V) and targets (T, B), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="sum")


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
        logits, state = model.stream(x.long(), state)
        total += nats(logits, y).item()
    return total / math.log(2) / len(corpus.heldout)


def symbols_of(text: str, characters: str) -> Tensor:
    """A text as symbols (T,) of a corpus with these characters: 0 for any other character."""
    return torch.tensor([characters.find(c) + 1 for c in text], dtype=torch.int64)


@torch.no_grad()
def sample(
    model: ManyToMany,
    characters: str,
    length: int,
    start: str = "\n",
    temperature: float = 1.0,
) -> str:
    """Let the model go on from a start, which it reads from a zero state, for length characters.

    Each is drawn from softmax(logits / temperature); at temperature 0 it is the most probable one.
    Raises JobError where the logits are not finite.
    """
    device = model.readout.weight.device
    symbols, state = symbols_of(start, characters), None
    written, alphabet = "", "\ufffd" + characters
    for _ in range(length):
        logits, state = model.stream(symbols.view(-1, 1).to(device), state)
        # Drawn on the CPU, so that the one generator a checkpoint keeps is the one in use.
        last = logits[-1, 0].double().cpu()
        if not last.isfinite().all():
            raise JobError("cannot write: the model's logits are not finite")
        if temperature > 0:
            # Relative to the largest: so a small temperature loses all of the others, and not it.
            symbols = torch.multinomial(((last - last.max()) / temperature).softmax(0), 1)
        else:
            symbols = last.argmax().view(1)
        written += alphabet[int(symbols)]
    return written


def learning_rate(spent: float) -> float:
    """The rate when this fraction of the time is spent: a short rise, then down to zero."""
    return LEARNING_RATE * min(spent / WARM_UP, 1) * (1 - spent)


class Trainer:
    """Truncated BPTT over one text, one chunk at a time: all that a checkpoint must hold.

    Adam steps float32 copies of 16-bit weights, which lack the digits for its small steps; other
    weights are stepped where they lie (`masters` shares their memory). Several processes have the
    same weights, and each the state of its own streams.
    """

    def __init__(self, model: ManyToMany, text: Tensor, processes: Processes | None = None) -> None:
        self.model, self.processes = model, processes or Processes()
        self.stream = self.processes.wrap(model, "stream")
        self.inputs, self.targets = streams(text.to(model.readout.weight.device), ROWS)
        self.masters = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in model.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.masters.values())
        self.position = 0  # in every stream
        self.state: State | None = None  # (L, B, H) each, of the streams of this process
        self.losses: list[float] = []  # of each step, in bits per character
        self.seconds = 0.0  # spent in steps, the mean of the processes

    def step(self, rate: float) -> None:
        """Read the next chunk and learn from it."""
        started = time.perf_counter()
        if self.position >= len(self.inputs):
            self.position, self.state = 0, None
        chunk = slice(self.position, self.position + CHUNK)
        characters = int(self.targets[chunk].ne(IGNORED).sum())
        mine = chunk, self.processes.columns

        logits, state = self.stream(self.inputs[mine].long(), self.state)
        loss = nats(logits, self.targets[mine])
        self.model.zero_grad()
        loss.backward()  # of the sum: the mean's gradients would underflow in float16
        self._update(rate, characters)

        self.state = map_state(Tensor.detach, state)
        self.position += CHUNK
        elapsed = time.perf_counter() - started
        total, elapsed = self.processes.total(loss.item(), elapsed / self.processes.count)
        self.losses.append(total / characters / math.log(2))
        self.seconds += elapsed

    @torch.no_grad()
    def _update(self, rate: float, characters: int) -> None:
        weights = dict(self.model.named_parameters())
        characters_of_each = characters / self.processes.count  # the gradient is the mean of theirs
        for name, master in self.masters.items():
            grad = weights[name].grad.to(master.dtype)  # type: ignore[union-attr]
            master.grad = grad / characters_of_each
        clip_gradient(self.masters.values(), CLIP, len(self.losses) + 1)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for name, master in self.masters.items():
            weights[name].copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """All of it, the state of all streams among it: the same for any number of processes."""
        gather = self.processes.gather
        return {
            "model": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "state": None if self.state is None else map_state(gather, self.state),
            "losses": self.losses,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint, of which the weights are known to fit. ValueError where the
        rest does not."""
        if saved["position"] < 0 or not 0 <= saved["seconds"] < math.inf:
            raise ValueError("its 'position' and 'seconds' cannot be")
        state = saved["state"]
        if state is not None:
            _, expected = self.model.stream(self.inputs[:1].long())
            found, wanted = (x if isinstance(x, tuple) else (x,) for x in (state, expected))
            if len(found) != len(wanted) or not all(fits(a, b) for a, b in zip(found, wanted)):
                raise ValueError("its 'state' does not fit the model")
            mine = self.processes.columns
            state = map_state(lambda x: x[:, mine].to(self.inputs.device), state)
        try:
            torch.Generator().set_state(saved["rng"])
        except (RuntimeError, TypeError) as error:
            raise ValueError("its 'rng' is no state of a generator") from error
        self._load_optimizer(saved["optimizer"])
        for name, weight in self.model.named_parameters():
            self.masters[name].copy_(saved["model"][name])
            weight.copy_(self.masters[name])
        self.position, self.losses = saved["position"], saved["losses"]
        self.seconds, self.state = saved["seconds"], state
        torch.set_rng_state(saved["rng"])

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Only what Adam remembers of each weight: the rest of its state are constants of ours."""
        memory = saved.get("state")
        if not isinstance(memory, dict) or set(memory) != set(range(len(self.masters))):
            raise ValueError("its 'optimizer' has no state for each weight")
        for number, master in enumerate(self.masters.values()):
            each = memory[number]
            wanted = {"step": torch.tensor(0.0), "exp_avg": master, "exp_avg_sq": master}
            if not isinstance(each, dict) or set(each) != set(wanted):
                raise ValueError("its 'optimizer' is not the state of Adam")
            if not all(fits(each[name], tensor) for name, tensor in wanted.items()):
                raise ValueError("its 'optimizer' does not fit the model")
            if each["step"] < 0 or (each["exp_avg_sq"] < 0).any():
                raise ValueError("its 'optimizer' holds what cannot be")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": memory})
