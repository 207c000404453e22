"""A text written by a trained language model: `python -m rnn sample CHECKPOINT`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import charlm
from .checkpoint import load_checkpoint
from .cli import JobError, Parser, execute, whole
from .language_model import sample

START, TEMPERATURE, LENGTH = "\n", 1.0, 600


def temperature(argument: str) -> float:
    if not 0 <= float(argument) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {argument}")
    return float(argument)


def start(given: dict[str, Any], out: Path) -> None:
    """Print a start and what the model writes after it."""
    path, beginning = given["checkpoint"], given.get("start", START)
    model, characters = charlm.restore(load_checkpoint(path, "charlm"), path)
    if not beginning:
        raise JobError("--start is empty: give at least one character")
    if unknown := [c for c in beginning if c not in characters]:
        if "start" in given:
            raise JobError(f"--start: the text of this model does not hold {unknown[0]!r} twice")
        beginning = characters[:1] or "\ufffd"  # a text without lines: begin with any character
    torch.manual_seed(given.get("seed", 0))
    length = given.get("length", LENGTH)
    written = sample(model, characters, length, beginning, given.get("temperature", TEMPERATURE))
    print((beginning if "start" in given else "") + written)


def make_parser() -> Parser:
    parser = Parser(prog="python -m rnn sample", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of charlm, the language model")
    parser.add("start", "the text that the model goes on from", "a new line", metavar="TEXT")
    warmth = "0 takes the most probable character, above 1 draws wilder ones"
    parser.add("temperature", warmth, TEMPERATURE, type=temperature, metavar="X")
    parser.add("length", "characters to write", LENGTH, type=whole(1), metavar="N")
    parser.add("seed", "of the draws", 0, type=whole(0), metavar="N")
    return parser


def main(name: str, argv: Sequence[str]) -> int:
    return execute(make_parser(), argv, start)
