"""A text: how it is read, cut into streams and counted."""

import codecs
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, TEXT

from rnn.jobs import corpus as corpus_module
from rnn.jobs.cli import JobError
from rnn.jobs.corpus import Corpus, count_models, read_text, streams
from rnn.loss import IGNORED

# What it reads


def test_the_last_5_percent_are_held_out_and_their_new_characters_are_one_symbol():
    corpus = Corpus.of("ab" * 950 + "é" + "ab" * 49 + "a")
    assert (len(corpus.train), len(corpus.heldout)) == (1900, 100)
    assert corpus.characters == "ab" and corpus.symbols == 3
    assert corpus.train[:4].tolist() == [1, 2, 1, 2]
    assert corpus.heldout[:3].tolist() == [0, 1, 2]


def test_a_character_seen_once_in_training_is_the_other_symbol_too():
    corpus = Corpus.of("ab" * 500 + "é" + "ab" * 500)
    assert corpus.characters == "ab" and corpus.train[1000] == 0


@pytest.mark.parametrize("length", [2, 3, 32, 33, 34, 100])
def test_streams_are_contiguous_and_each_character_is_a_target_once(length):
    text = torch.arange(length)
    inputs, targets = streams(text, rows=3)
    assert targets.t().flatten()[: length - 1].tolist() == list(range(1, length))
    assert (targets.t().flatten()[length - 1 :] == IGNORED).all()
    assert torch.equal(inputs[targets != IGNORED] + 1, targets[targets != IGNORED])


def test_the_default_text_is_the_standard_library():
    assert Path(os.__file__).read_text(encoding="utf-8") in read_text(None)


# Encodings

RUSSIAN = "Все счастливые семьи похожи друг на друга,\nкаждая несчастливая по-своему — да!\n" * 30  # noqa: RUF001
CHINESE = "道可道，非常道。名可名，非常名。\n" * 80  # noqa: RUF001
LATIN = "the cat sat on the mat\nand the dog sat on the log\n" * 40
each_text = pytest.mark.parametrize(
    "text", [LATIN, RUSSIAN, CHINESE], ids=["latin", "russian", "chinese"]
)


def written(path, data):
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    "mark, encoding",
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
    ids=["utf-8", "utf-8-mark", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@each_text
def test_a_mark_is_heeded_and_line_ends_are_one(tmp_path, text, line_end, mark, encoding):
    data = mark + text.replace("\n", line_end).encode(encoding)
    assert read_text(written(tmp_path / "text", data)) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@each_text
def test_wide_characters_without_a_mark_are_refused(tmp_path, text, encoding):
    with pytest.raises(JobError, match=r"looks like UTF-16|can't decode"):
        read_text(written(tmp_path / "text", text.encode(encoding)))


@pytest.mark.parametrize(
    "text",
    [
        LATIN.replace(" ", "\0"),
        LATIN.replace("\n", "\0"),
        "abc\0" * 500,
        RUSSIAN.replace(" ", "\0"),
    ],
    ids=["for-spaces", "for-lines", "records", "russian"],
)
def test_a_text_may_hold_nul(tmp_path, text):
    assert read_text(written(tmp_path / "text", text.encode())) == text


def test_a_damaged_text_is_one_line(tmp_path):
    for data in (codecs.BOM_UTF16_LE + b"abc", b"caf\xe9 " * 300, codecs.BOM_UTF8 + b"\xff"):
        with pytest.raises(JobError, match="cannot read the text") as error:
            read_text(written(tmp_path / "text", data))
        assert "\n" not in str(error.value)


# Memory

MEASURED = """
import random, resource
from rnn.jobs.corpus import Corpus, count_models, streams
random.seed(0)
words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9)))
         for _ in range(5000)]
text = " ".join(random.choices(words, k=900000))[: 5 * 10**6]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = peak()
corpus = Corpus.of(text)
inputs = streams(corpus.train, 64)
print((peak() - start) / len(text))
count_models(corpus)
print((peak() - start) / len(text))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_a_character_takes_a_few_bytes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    to_train, to_report = map(float, done.stdout.split())
    assert to_train < 20 and to_report < 40


def test_many_symbols_take_wider_numbers():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20000))) * 2
    text += "".join(map(chr, range(0xAC00, 0xAC00 + 11000))) * 2
    text += "".join(map(chr, range(0x20000, 0x20000 + 3000))) * 2 + "a" * 4000
    corpus = Corpus.of(text)
    assert corpus.symbols > 2**15
    assert [corpus.characters[i - 1] for i in corpus.train[::997].tolist()] == list(
        text[: len(corpus.train)][::997]
    )


def test_a_corpus_in_pieces_is_the_same(monkeypatch):
    whole = Corpus.of(TEXT)
    bits = count_models(whole)
    monkeypatch.setattr(corpus_module, "PIECE", 777)
    pieces = Corpus.of(TEXT)
    assert pieces.digest == whole.digest and pieces.characters == whole.characters
    assert torch.equal(pieces.train, whole.train) and torch.equal(pieces.heldout, whole.heldout)
    assert count_models(pieces) == pytest.approx(bits, rel=1e-12)


# The count models


def witten_bell(train, heldout, symbols, order):
    """The count model of one order, with dictionaries: bits per character."""
    count = defaultdict(Counter)
    for n in range(order + 1):
        for i in range(n, len(train)):
            count[train[i - n : i]][train[i]] += 1

    def p(context, c):
        below = 1 / symbols if not context else p(context[1:], c)
        seen = count[context]
        if not seen:
            return below
        return (seen[c] + len(seen) * below) / (seen.total() + len(seen))

    text = train + heldout
    places = range(len(train), len(text))
    return -sum(math.log2(p(text[i - order : i], text[i])) for i in places) / len(heldout)


def test_count_models_agree_with_dictionaries():
    corpus = Corpus.of(TEXT)
    train, heldout = map(tuple, (corpus.train.tolist(), corpus.heldout.tolist()))
    expected = [witten_bell(train, heldout, corpus.symbols, order) for order in range(4)]
    assert count_models(corpus) == pytest.approx(expected)
