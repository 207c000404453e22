"""A text as symbols, cut into streams; and what the models of counts make of it."""

import hashlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import IGNORED
from .cli import JobError

SHORTEST_TEXT = 1000  # characters
STDLIB = "the source of Python's standard library"


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
