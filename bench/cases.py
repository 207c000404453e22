"""What is measured, as values: a case with a readable name, and the named sets of cases."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnn.modules import MODULES, NAMES


class Dtype(NamedTuple):
    torch: torch.dtype
    tf32: bool  # whether products of float32 may be rounded to tf32
    floor: float  # a relative error that is never called wrong


DTYPES = {
    "float64": Dtype(torch.float64, False, 1e-13),
    "float32": Dtype(torch.float32, False, 2e-6),
    "tf32": Dtype(torch.float32, True, 2e-3),
    "float16": Dtype(torch.float16, False, 2e-3),
    "bfloat16": Dtype(torch.bfloat16, False, 1e-2),
}


class Case(NamedTuple):
    """A stack of layers on an input (T, B, I). str(case) names it, Case.parse reads that name."""

    cell: str  # a name in rnn.modules.NAMES
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
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"a case is named as {EXAMPLE}, with a cell of {', '.join(NAMES)} and, where it is "
                f"not float32, a dtype of {', '.join(DTYPES)}; got {name!r}"
            )
        cell, T, B, I, H, layers, bidirectional, packed, dtype = match.groups()
        sizes = (int(T), int(B), int(I or H), int(H), int(layers or 1))
        return cls(cell, *sizes, bool(bidirectional), bool(packed), dtype or "float32")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def steps(self) -> int:
        """Time steps that follow one another: T in each layer. Two directions share a step."""
        return self.T * self.layers

    def lengths(self) -> Tensor | None:
        """(B,) int64 on the CPU, one of them T; None where all rows have T steps."""
        if not self.packed:
            return None
        generator = torch.Generator().manual_seed(self.T * self.B)
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        lengths[self.B // 2] = self.T
        return lengths


NUMBER = "([1-9][0-9]*)"
NAME = re.compile(
    rf"({'|'.join(NAMES)})-T{NUMBER}-B{NUMBER}(?:-I{NUMBER})?-H{NUMBER}(?:-L{NUMBER})?"
    rf"(-bidirectional)?(-packed)?(?:-({'|'.join(DTYPES)}))?"
)
EXAMPLE = Case("rnn_tanh", 128, 16, 64, 256, 2, True, dtype="bfloat16")

SHAPES = [(128, 16, 128), (256, 32, 256), (512, 8, 512), (64, 64, 1024), (1024, 1, 256)]
SHAPES += [(128, 64, 64)]  # T, B, H

PUBLISHED = [
    ("lstm", 1024, 16, 768),  # Pöppel et al., FlashRNN, arXiv 2412.07752; one head here
    ("rnn_tanh", 256, 4, 1152),  # Diamos et al., Persistent RNNs, ICML 2016; T is ours
    ("gru", 512, 16, 512),  # pytorch/rl, its Triton kernels
]


CELLS = tuple(cell for cell in MODULES if cell != "rnn_relu")  # relu is as fast as tanh


def sets(gpu: bool, cells: Sequence[str] = CELLS) -> dict[str, list[Case]]:
    """The cases by the name of their set, sized for a GPU or for a CPU with a few cores. All but
    `quick` make up a full run."""
    T, dtype = (256, "bfloat16") if gpu else (32, "float32")
    others = ("float32", "tf32", "float16") if gpu else ("bfloat16",)

    def case(cell: str, T: int, B: int, H: int, **fields: Any) -> Case:
        return Case(cell, T, B, H, H, **{"dtype": dtype} | fields)

    deep = {"layers": 2, "bidirectional": True, "packed": True}
    kinds: list[dict[str, Any]] = [{"bidirectional": True}, {"packed": True}, deep]
    sizes = (64, 128, 256, 384, 512, 768, 1024) if gpu else (64, 256, 512)
    named = {
        "shapes": [case(cell, *shape) for cell in cells for shape in SHAPES],
        "sizes": [case(cell, T, 16, H) for cell in cells for H in sizes],
        "kinds": [case(cell, 64, 16, 256, **kind) for cell in cells for kind in kinds],
        "dtypes": [case(cell, 64, 16, 256, dtype=other) for cell in cells for other in others],
        "small": [case(cell, T, 1, H) for cell in cells for T, H in ((1, 64), (64, 64))],
        "quick": [case(cell, 32, 16, H) for cell in cells for H in (64, 256)]
        + [case(cell, 32, 16, 128, **deep) for cell in cells],
    }
    published = [case(*shape) for shape in PUBLISHED if shape[0] in cells]
    return named | ({"published": published} if gpu else {})
