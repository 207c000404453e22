"""Nested tensors of layout torch.jagged, (B, j, I): padded, with their lengths, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import active_steps


class Nested(NamedTuple):
    """Where the steps of a nested tensor lie among its values, (N, I), and when they are padded."""

    values: Tensor
    offsets: Tensor  # (B + 1,)
    holes: Tensor | None  # lengths (B,), where the values hold more than the sequences
    lengths: Tensor  # (B,)
    T: int
    rows: Tensor  # of the values: each step's, sequence after sequence
    padded_rows: Tensor  # the same of (B * T, I)

    @classmethod
    def of(cls, input: Any, batch_first: bool) -> "Nested":
        if input.layout != torch.jagged or input.dim() != 3 or input._ragged_idx != 1:
            found = tuple(input.shape) if input.layout == torch.jagged else input.layout
            raise ValueError(
                f"a nested tensor must be (B, j, I) of layout torch.jagged, got {found}; other "
                "sequences can be padded, with lengths=, or a PackedSequence"
            )
        if not batch_first:
            raise ValueError(
                "a nested tensor is (B, j, I), which needs a module with batch_first=True; it has "
                "batch_first=False"
            )
        offsets, holes = input.offsets(), input.lengths()
        lengths = offsets.diff() if holes is None else holes
        T = max(1, int(lengths.max()))  # a module runs at least one step
        active = active_steps(lengths, T).t()
        rows = offsets[:-1, None] + torch.arange(T, device=offsets.device)
        padded_rows = active.flatten().nonzero().squeeze(1)
        return cls(input.values(), offsets, holes, lengths, T, rows[active], padded_rows)

    def pad(self) -> Tensor:
        """The values as (B, T, I)."""
        B, I = len(self.lengths), self.values.size(1)
        padded = self.values.new_zeros(B * self.T, I)
        return padded.index_copy(0, self.padded_rows, self.values[self.rows]).view(B, self.T, I)

    def unpad(self, output: Tensor) -> Tensor:
        """(B, T, F) as a nested tensor (B, j, F) of the same offsets."""
        steps = output.flatten(0, 1)[self.padded_rows]
        values = output.new_zeros(len(self.values), output.size(2)).index_copy(0, self.rows, steps)
        return torch.nested.nested_tensor_from_jagged(values, self.offsets, self.holes)
