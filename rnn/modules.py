"""Modules that drop in for those of torch.nn."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .functional import BACKENDS, check_lengths, choose, run
from .kernels.plan import NoPlan


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype that all layers compute in: the input's, unless autocast asks for another."""
    if torch.is_autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


class RNN(torch.nn.RNN):
    """A stack of Elman layers, h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), in place of
    torch.nn.RNN: the same constructor, parameters, state_dict, forward, results and errors.

    Args:
        as of torch.nn.RNN: input_size, hidden_size, num_layers=1, nonlinearity="tanh" or "relu",
            bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None,
            dtype=None; and
        backend: "auto" (the fused kernels where they can run, else PyTorch), "triton" (raise
            RuntimeError where they cannot) or "torch". rnn.explain says what runs, and why.

    Beside the drop-in: backward works in eval mode on every device, `lengths` replaces packing,
    and a second derivative can be taken. Forward-mode derivatives and vmap are not supported.
    Source: Elman, Finding structure in time, 1990.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        super().__init__(*args, **kwargs)
        self.backend = backend

    @property
    def cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each weight where it lies."""

    def extra_repr(self) -> str:
        return super().extra_repr() + f", backend={self.backend}"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers.

        Args:
            input: (T, B, I), (B, T, I) if batch_first, (T, I) without a batch, or packed.
            hx: (L*D, B, H), or (L*D, H) without a batch; zeros if None.
            lengths: (B,), int32 or int64, any device, in any order, zeros included: row b ends
                after lengths[b] steps. Its output is zero from there on, its h_n the state after
                its last step (hx if it has none), and the reverse direction starts at its end.

        Returns:
            output (T, B, D*H), laid out as input is, and h_n, shaped as hx is.

        Raises:
            what torch.nn.RNN raises for the same misuse: ValueError for a wrong dtype or a
            wrong number of dimensions, RuntimeError for a wrong shape or device or an empty
            sequence; for lengths, see rnn.recurrence.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("a PackedSequence has its own lengths; got lengths as well")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"input must be 2-D or 3-D, got {input.dim()}-D")
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"for {input.dim()}-D input hx must be {input.dim()}-D too, got {hx.dim()}-D"
            )
        if input.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths needs batched, 3-D input, got 2-D")
            hx = None if hx is None else hx.unsqueeze(1)
            output, h_n = self._forward_batch(input.unsqueeze(1), hx, None, batch_first=False)
            return output.squeeze(1), h_n.squeeze(1)
        return self._forward_batch(input, hx, lengths, self.batch_first)

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self.check_input(data, batch_sizes)
        # Without its indices the rows stay as the PackedSequence holds them: longest first.
        input, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        hx = None if hx is None else self.permute_hidden(hx, sorted_indices)
        output, h_n = self._forward_batch(input, hx, lengths, batch_first=False)
        return (
            PackedSequence(
                pack_padded_sequence(output, lengths).data,
                batch_sizes,
                sorted_indices,
                unsorted_indices,
            ),
            self.permute_hidden(h_n, unsorted_indices),
        )

    def _forward_batch(
        self, input: Tensor, hx: Tensor | None, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        self._check(input, hx, batch_first)
        steps, rows = (1, 0) if batch_first else (0, 1)
        if lengths is not None:
            check_lengths(lengths, input.size(steps), input.size(rows))
            lengths = lengths.to(input.device, non_blocking=True)
        dtype, D = compute_dtype(input), self.directions
        if hx is None:
            hx = input.new_zeros(self.num_layers * D, input.size(rows), self.hidden_size)
        x, h0 = input.to(dtype), hx.to(dtype)
        states = []
        for layer in range(self.num_layers):
            weight_ih, weight_hh, bias = self.layer_weights(layer, dtype)
            x_gates = F.linear(x, weight_ih, bias)
            output, h_n = run(
                x_gates.transpose(0, 1) if batch_first else x_gates,
                h0[layer * D : (layer + 1) * D],
                weight_hh,
                lengths,
                self.cell,
                reverse=False,
                backend=self.backend,
            )
            x = output.transpose(0, 1) if batch_first else output
            states.append(h_n)
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, states[0] if len(states) == 1 else torch.cat(states)

    def layer_weights(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """(D*G*H, I), (D, G*H, H) and (D*G*H,): the directions of a layer, one after the other."""

        def both(name: str) -> list[Tensor]:
            suffixes = ("", "_reverse") if self.bidirectional else ("",)
            weights = [getattr(self, f"{name}_l{layer}{s}") for s in suffixes]
            return [w if w.dtype == dtype else w.to(dtype) for w in weights]

        def joined(tensors: list[Tensor]) -> Tensor:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        weight_hh = both("weight_hh")
        stacked = weight_hh[0].unsqueeze(0) if len(weight_hh) == 1 else torch.stack(weight_hh)
        bias = joined(both("bias_ih")) + joined(both("bias_hh")) if self.bias else None
        return joined(both("weight_ih")), stacked, bias

    def _check(self, input: Tensor, hx: Tensor | None, batch_first: bool) -> None:
        """torch.nn.RNN's own checks, and in Python those that it leaves to its C++ part."""
        self.check_input(input, None)
        steps, rows = (1, 0) if batch_first else (0, 1)
        if input.size(steps) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        weight = self.weight_ih_l0
        if input.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weight.device}"
            )
        if hx is None:
            return
        layers = self.num_layers * self.directions
        self.check_hidden_size(hx, (layers, input.size(rows), self.hidden_size))
        if hx.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {hx.device}"
            )
        if hx.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise RuntimeError(f"hx must be {input.dtype} as input is, got {hx.dtype}")


MODULES: dict[str, Callable[..., RNN]] = {  # of each cell, by the name that recurrence() takes
    "rnn_tanh": partial(RNN, nonlinearity="tanh"),
    "rnn_relu": partial(RNN, nonlinearity="relu"),
}


def explain(module: RNN, input: Tensor | PackedSequence) -> str:
    """Say for each layer which backend runs for this input, with the plan or the reason.

    Nothing is computed. Raises RuntimeError where backend="triton" cannot run.
    """
    if isinstance(input, PackedSequence):
        tensor, batch = input.data, int(input.batch_sizes[0])
    else:
        tensor = input
        batch = 1 if input.dim() == 2 else input.size(0 if module.batch_first else 1)
    found = choose(
        module.backend,
        module.cell,
        module.hidden_size,
        batch,
        module.directions,
        compute_dtype(tensor),
        tensor.device,
    )
    name = "torch" if isinstance(found, NoPlan) else "triton"
    return "\n".join(f"layer {layer}: {name}: {found}" for layer in range(module.num_layers))
