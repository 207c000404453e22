"""A text as symbols, cut into streams; and the bits that count models need for it.

Nothing here holds more than a few bytes for each character at once: whatever is wider is made in
pieces.
"""

import codecs
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss import IGNORED
from .cli import JobError

SHORTEST_TEXT = 1000  # characters
STDLIB = "the source of Python's standard library"


PIECE = 2**20  # characters that are worked on at once
MARKS = {  # byte order marks; that of UTF-16 begins that of UTF-32, which is tried first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def looks_like_utf16(data: bytes) -> bool:
    """Whether bytes without a mark are rather UTF-16 or UTF-32: as UTF-8 they would be valid, and
    full of the character NUL.

    In UTF-16 each second byte is the upper one of a character. It is NUL for Latin letters and for
    spaces, and small for the other alphabets. In UTF-8 such bytes are control characters, which are
    rare, and as likely at even places as at odd ones.
    """
    sample = np.frombuffer(data[: 2 * PIECE], np.uint8)
    if not len(sample) or sample.all():
        return False
    if (sample == 0).mean() > 0.4:
        return True
    halves = [np.bincount(sample[parity::2], minlength=256) for parity in (0, 1)]
    lower, upper = sorted(halves, key=lambda counts: counts[0])
    return upper[0] > 3 * lower[0] and upper[:32].sum() > 0.9 * upper.sum()


def decode(data: bytes) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. Line ends become "\\n".

    Raises UnicodeError where it is neither.
    """
    encoding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and looks_like_utf16(data):
        raise UnicodeError("it looks like UTF-16 without a byte order mark: convert it to UTF-8")
    text = data.decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: str | None) -> str:
    """The text of a file; without a path, the source of Python's standard library."""
    # Only the files directly in the library's folder: a sub-folder is site-packages, and the text
    # would change with every package installed.
    files = [Path(path)] if path else sorted(Path(os.__file__).parent.glob("*.py"))
    try:
        return "".join(decode(file.read_bytes()) for file in files)
    except (OSError, UnicodeError) as error:
        raise JobError(f"cannot read the text {path or ''}: {error}") from error


def pieces(length: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, length, PIECE))


def points(text: str) -> np.ndarray:
    """The code point of each character, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@dataclass(frozen=True)
class Corpus:
    """A text as symbols: i + 1 stands for characters[i], 0 for every other character."""

    characters: str  # those that occur more than once in the training text
    train: Tensor  # (N,) int16, or int32 where there are too many symbols
    heldout: Tensor  # (M,) of the same dtype, the last 5 % of the text
    digest: str

    @classmethod
    def of(cls, text: str) -> "Corpus":
        if len(text) < SHORTEST_TEXT:
            raise JobError(f"the text has {len(text)} characters, {SHORTEST_TEXT} are needed")
        trained = len(text) - len(text) // 20
        counts = np.zeros(sys.maxunicode + 1, dtype=np.int64)
        digest = hashlib.sha256()
        for piece in pieces(len(text)):
            digest.update(text[piece].encode())
            here = points(text[piece.start : min(piece.stop, trained)])
            counts += np.bincount(here, minlength=len(counts))
        known = np.flatnonzero(counts > 1)
        dtype = np.int16 if len(known) < 2**15 else np.int32
        symbol = np.zeros(len(counts), dtype=dtype)
        symbol[known] = np.arange(1, len(known) + 1)
        symbols = np.empty(len(text), dtype=dtype)
        for piece in pieces(len(text)):
            symbols[piece] = symbol[points(text[piece])]
        train, heldout = torch.from_numpy(symbols).tensor_split([trained])
        return cls("".join(map(chr, known)), train, heldout, digest.hexdigest())

    @property
    def symbols(self) -> int:
        return len(self.characters) + 1


def streams(text: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cut a text into rows contiguous stretches: inputs and targets, both (steps, rows), in the
    dtype of the text.

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
    text = torch.cat((corpus.train, corpus.heldout)).numpy()
    trained, V = len(corpus.train), corpus.symbols
    p = np.full(len(text) - trained, 1 / V)
    # The n characters before each place, as one number; -1 if the training text lacks them.
    context = np.zeros(len(text), dtype=np.int32 if len(text) < 2**31 else np.int64)
    bits = []
    for n in range(orders):
        grams, starts = distinct_grams(context[n:trained], text[n:trained], V)
        for piece in pieces(len(p)):
            here = slice(trained + piece.start, trained + piece.stop)
            gram = gram_number(context[here], text[here], V)
            first, last = np.searchsorted(grams, [gram, gram + 1])
            N = starts[last] - starts[first]
            below = context[here].astype(np.int64) * V
            first, last = np.searchsorted(grams, [below, below + V])
            N_context, S = starts[last] - starts[first], last - first
            new = S == 0  # a new context: p_{n-1} stands
            p[piece] = np.where(new, p[piece], (N + S * p[piece]) / np.where(new, 1, N_context + S))
        bits.append(float(-np.log2(p).mean()))
        if n + 1 < orders:
            extend(context, text, grams, V)
    return bits


def gram_number(context: np.ndarray, text: np.ndarray, V: int) -> np.ndarray:
    """A context and the character after it, as one number."""
    return context.astype(np.int64) * V + text


def distinct_grams(context: np.ndarray, text: np.ndarray, V: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct grams of a text, sorted; and for each the number of grams of the text that are
    smaller than it, with that of all at the end."""
    grams = np.empty(len(text), dtype=np.int64)
    for piece in pieces(len(text)):
        grams[piece] = gram_number(context[piece], text[piece], V)
    grams.sort()
    first = np.empty(len(grams), dtype=bool)
    first[:1] = True
    np.not_equal(grams[1:], grams[:-1], out=first[1:])
    starts = np.full(np.count_nonzero(first) + 1, len(grams), dtype=context.dtype)
    starts[:-1] = np.flatnonzero(first)
    return grams[first], starts


def extend(context: np.ndarray, text: np.ndarray, grams: np.ndarray, V: int) -> None:
    """Make each context one character longer, in place: the rank of the gram before the place."""
    last = 0  # of the piece before
    for piece in pieces(len(text)):
        gram = gram_number(context[piece], text[piece], V)
        rank = np.minimum(np.searchsorted(grams, gram), len(grams) - 1)
        rank[grams[rank] != gram] = -1
        context[piece][1:] = rank[:-1]
        context[piece.start], last = last, rank[-1]
