"""What is measured, as values: a case, its readable name, and the named sets of cases."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rnn
from rnn import reference

State = tuple[Tensor, ...]  # h (B, H) first, then what else the cell carries


class Cell(NamedTuple):
    """A cell for those who are not ours: the class in torch.nn, and one step of it in eager mode.

    step(x_gates, h_gates, state) -> state, where x_gates = W_ih x + b_ih and h_gates = W_hh h +
    b_hh, both (B, G * H).
    """

    torch_nn: Callable[..., torch.nn.RNNBase]
    ours: Callable[..., torch.nn.RNNBase]
    arguments: dict[str, Any]  # of both constructors
    step: Callable[[Tensor, Tensor, State], State]
    smooth: bool = True  # else rounding decides between a gradient and none at the kink


STEPS = {
    "rnn_tanh": Cell(
        torch.nn.RNN,
        rnn.RNN,
        {"nonlinearity": "tanh"},
        lambda x_gates, h_gates, state: (torch.tanh(x_gates + h_gates),),
    ),
    "rnn_relu": Cell(
        torch.nn.RNN,
        rnn.RNN,
        {"nonlinearity": "relu"},
        lambda x_gates, h_gates, state: (torch.relu(x_gates + h_gates),),
        smooth=False,
    ),
}
CELLS = {name: STEPS[name] for name in reference.CELLS}  # a KeyError: a cell that has no line here


class Dtype(NamedTuple):
    """`floor`: the relative error that nobody is blamed for (bench/check.py)."""

    torch: torch.dtype
    tf32: bool  # whether products of float32 may be rounded to tf32
    floor: float


DTYPES = {
    "float64": Dtype(torch.float64, False, 1e-13),
    "float32": Dtype(torch.float32, False, 2e-6),
    "tf32": Dtype(torch.float32, True, 2e-3),
    "float16": Dtype(torch.float16, False, 2e-3),
    "bfloat16": Dtype(torch.bfloat16, False, 1e-2),
}


class Case(NamedTuple):
    """A stack of layers on an input (T, B, I). str(case) names it, Case.parse reads that name."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False  # rows of different length, from 1 to T, seeded
    dtype: str = "float32"  # a key of DTYPES

    def __str__(self) -> str:
        parts = [self.cell, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] * (self.layers != 1)
        parts += [name for name in ("bidirectional", "packed") if getattr(self, name)]
        parts += [self.dtype] * (self.dtype != "float32")
        return "-".join(parts)

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case of that name; I may be left out where it is H. Raises ValueError."""
        values: dict[str, Any] = {}
        letters = {"T": "T", "B": "B", "I": "I", "H": "H", "L": "layers"}
        for part in name.split("-"):
            if part in CELLS:
                values["cell"] = part
            elif part in DTYPES:
                values["dtype"] = part
            elif part in ("bidirectional", "packed"):
                values[part] = True
            elif part[:1] in letters and part[1:].isdecimal() and int(part[1:]) > 0:
                values[letters[part[0]]] = int(part[1:])
            else:
                raise ValueError(
                    f"{part!r} of {name!r} is no cell ({', '.join(CELLS)}), no dtype "
                    f"({', '.join(DTYPES)}), and none of T, B, I, H or L with a number, "
                    "bidirectional, packed"
                )
        values.setdefault("I", values.get("H"))
        missing = [field for field in ("cell", "T", "B", "H") if field not in values]
        if missing:
            raise ValueError(f"{name!r} lacks {', '.join(missing)}: for example {EXAMPLE}")
        return cls(**values)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def gates(self) -> int:
        return reference.CELLS[self.cell].gates

    @property
    def steps(self) -> int:
        """Time steps that follow one another: T in each layer. Two directions share a step."""
        return self.T * self.layers

    def lengths(self) -> Tensor | None:
        """(B,) int64 on the CPU, at least one of them T."""
        if not self.packed:
            return None
        generator = torch.Generator().manual_seed(self.T * self.B)
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        lengths[self.B // 2] = self.T
        return lengths

    def flops(self) -> float:
        """Floating-point operations of the products of a forward pass; a backward pass has twice
        as many. What is behind the end of a row is not counted."""
        lengths = self.lengths()
        rows = self.T * self.B if lengths is None else int(lengths.sum())
        D, H = self.directions, self.H
        widths = [self.I] + [D * H] * (self.layers - 1)
        return 2.0 * rows * D * self.gates * H * sum(I + H for I in widths)

    def saved_bytes_per_step(self) -> int:
        """Of one layer: `output` of a step, all that this library saves for each step."""
        return self.B * self.directions * self.H * DTYPES[self.dtype].torch.itemsize


COMPILED_STEPS = 32  # torch.compile unrolls the loop over time: what it takes grows with T

EXAMPLE = Case("rnn_tanh", 128, 16, 64, 256, 2, True, dtype="bfloat16")

# What others published their figures on, as shapes; the cells are those that exist here.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Pöppel et al., FlashRNN, arXiv 2412.07752: batch 16, 1024 steps, heads x head size = 768. A
    # network of torch.nn is one head.
    "FlashRNN": {"T": 1024, "B": 16, "H": 768, "dtype": "bfloat16"},
    # Diamos et al., Persistent RNNs, ICML 2016: layers of 1152, batch 4. T is ours.
    "persistent RNN": {"T": 256, "B": 4, "H": 1152, "dtype": "float32"},
    # pytorch/rl, its Triton kernels of a GRU: batch 16, 512 steps, hidden size 512.
    "torchrl": {"T": 512, "B": 16, "H": 512, "dtype": "float32"},
}
SHAPES = [
    (128, 16, 128),
    (256, 32, 256),
    (512, 8, 512),
    (64, 64, 1024),
    (1024, 1, 256),
    (128, 64, 64),
]


class Set(NamedTuple):
    """Cases of one table. `axis`: the field that is swept, or "grid" for B against H."""

    title: str
    cases: list[Case]
    axis: str = ""


def sets(gpu: bool) -> dict[str, Set]:
    """The named sets, sized for a GPU or for a CPU with a few cores."""
    T, B, H = (256, 16, 512) if gpu else (64, 16, 256)
    dtype = "bfloat16" if gpu else "float32"
    first, *others = CELLS

    def case(**fields: Any) -> Case:
        given: dict[str, Any] = {"cell": first, "T": T, "B": B, "H": H, "dtype": dtype} | fields
        return Case(**({"I": given["H"]} | given))

    def sweep(field: str, values: Iterable, **fields: Any) -> list[Case]:
        return [case(**(fields | {field: value})) for value in values]

    doublings = [2**n for n in range(15)]
    across: dict[str, list] = {
        "H": doublings[6:13],
        "B": doublings[: 11 : 1 if gpu else 2],
        "T": doublings[4 : 15 : 1 if gpu else 2],
        "layers": doublings[:4],
        "dtype": ["float32", "tf32", "bfloat16", "float16"]
        if gpu
        else ["float32", "tf32", "bfloat16", "float16", "float64"],
    }
    grid_h = doublings[7:12] if gpu else doublings[6:10]
    grid_b = doublings[:11:2] if gpu else doublings[:9:2]
    published = [shape if gpu else shape | {"dtype": "float32"} for shape in PUBLISHED.values()]
    small = [(1, 1, 64), (16, 1, 16), (16, 1, 64), (64, 1, 64)]
    return {
        "H": Set("Hidden size", sweep("H", across["H"], T=T if gpu else COMPILED_STEPS), "H"),
        "B": Set("Batch", sweep("B", across["B"]), "B"),
        "T": Set("Time steps", sweep("T", across["T"], B=4, H=128), "T"),
        "layers": Set("Layers", sweep("layers", across["layers"]), "layers"),
        "dtype": Set("Dtypes", sweep("dtype", across["dtype"]), "dtype"),
        "cells": Set(
            "The other cells",
            [
                case(cell=cell, **shape)
                for cell in others
                for shape in ({}, {"B": 1, "H": 64}, {"B": 64, "H": 512})
            ],
        ),
        "sequences": Set(
            "Two directions; rows of different length",
            [
                case(**shape, **kind)
                for shape in ({}, {"T": 4 * T, "B": 4 * B, "H": H // 2})
                for kind in (
                    {"bidirectional": True},
                    {"packed": True},
                    {"bidirectional": True, "packed": True, "layers": 2},
                )
            ],
        ),
        "six-shapes": Set(
            "Six shapes, three kinds of network",
            [
                Case(first, T, B, H, H, **kind)
                for kind in ({}, {"layers": 2}, {"bidirectional": True})
                for T, B, H in SHAPES
            ],
        ),
        "grid": Set(
            "Batch against hidden size",
            [case(B=B, H=H) for H in grid_h for B in grid_b],
            "grid",
        ),
        "published": Set(
            "Shapes that others published on: " + ", ".join(PUBLISHED),
            [case(**shape) for shape in published],
        ),
        "small": Set(
            "Little work, where overhead shows",
            [case(T=T, B=B, H=H) for T, B, H in small],
        ),
    }


def quick() -> dict[str, Set]:
    """The sets of --quick: within two minutes on two cores."""
    cell = next(iter(CELLS))
    return {
        "H": Set("Hidden size", [Case(cell, 32, 16, H, H) for H in (64, 256, 1024)], "H"),
        "T": Set("Time steps", [Case(cell, T, 4, 64, 64) for T in (16, 128, 1024)], "T"),
        "grid": Set(
            "Batch against hidden size",
            [Case(cell, 32, B, H, H) for H in (64, 256) for B in (1, 16, 64)],
            "grid",
        ),
        "kinds": Set(
            "Other cells, kinds and dtypes",
            [
                *(Case(other, 32, 16, 128, 128) for other in list(CELLS)[1:]),
                Case(cell, 32, 16, 64, 128, layers=2, bidirectional=True, packed=True),
                Case(cell, 32, 16, 128, 128, dtype="bfloat16"),
            ],
        ),
    }
