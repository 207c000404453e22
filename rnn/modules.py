"""Modules that drop in for those of torch.nn."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cells import CELLS, Cell
from .checked import compute_dtype
from .dispatch import Backend, choose
from .kernels.limits import NoPlan
from .nested import Nested
from .recurrent import Recurrent


class RNN(Recurrent[Tensor]):
    """A stack of Elman layers, h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), in place of
    torch.nn.RNN: the same constructor, parameters, state_dict, forward, results and errors.

    Args:
        input_size, hidden_size, num_layers=1, nonlinearity="tanh" or "relu", bias=True,
            batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None: as of
            torch.nn.RNN.
        backend: "auto" (the fused kernels where they can run, else PyTorch), "triton" (raise
            RuntimeError where they cannot) or "torch". rnn.explain says what runs, and why.
        checkpoint_every: None, or K to bound the memory of training on long sequences: of the
            steps, the backward pass finds every K-th state alone, in each layer and direction,
            and computes K steps anew at a time, by torch.utils.checkpoint. The gradient is not
            truncated. The least memory is at K near sqrt(T); it costs a second forward pass.
            The attribute may be changed at any time.

    Beside the drop-in: backward works in eval mode on every device, `lengths` replaces packing,
    and a second derivative can be taken.
    Source: Elman, Finding structure in time, 1990.

    Example:
        >>> model = rnn.RNN(5, 7, nonlinearity="relu", bidirectional=True)
        >>> output, h_n = model(torch.randn(6, 3, 5), lengths=torch.tensor([6, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([6, 3, 14]), torch.Size([2, 3, 7]))
    """

    def __init__(self, *args: Any, backend: Backend = "auto", **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, backend=backend, **kwargs)
        self.nonlinearity = nonlinearity


class GRU(Recurrent[Tensor]):
    """A stack of gated recurrent units, in place of torch.nn.GRU:

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    Args:
        input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
            bidirectional=False, device=None, dtype=None: as of torch.nn.GRU.
        backend, checkpoint_every: as of rnn.RNN.

    Source: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014, in the
    form of torch.nn.GRU.

    Example:
        >>> output, h_n = rnn.GRU(5, 7, num_layers=2)(torch.randn(6, 3, 5))
        >>> output.shape, h_n.shape
        (torch.Size([6, 3, 7]), torch.Size([2, 3, 7]))
    """

    def __init__(self, *args: Any, backend: Backend = "auto", **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, backend=backend, **kwargs)


class LSTM(Recurrent[tuple[Tensor, Tensor]]):
    """A stack of long short-term memory layers, in place of torch.nn.LSTM:

        i, f, o = sigmoid(W_i. x_t + b_i. + W_h. h_{t-1} + b_h.)   each with weights of its own
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Args:
        input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
            bidirectional=False, proj_size=0, device=None, dtype=None: as of torch.nn.LSTM. With
            proj_size, PyTorch's own operator runs, which has no checkpoint_every.
        backend, checkpoint_every: as of rnn.RNN.

    Its state is the pair (h, c), in and out.
    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997; Gers et al., 2000.

    Example:
        >>> output, (h_n, c_n) = rnn.LSTM(5, 7, batch_first=True)(torch.randn(3, 6, 5))
        >>> output.shape, c_n.shape
        (torch.Size([3, 6, 7]), torch.Size([1, 3, 7]))
    """

    def __init__(self, *args: Any, backend: Backend = "auto", **kwargs: Any) -> None:
        super().__init__("LSTM", *args, backend=backend, **kwargs)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


MODULES: dict[str, Callable[..., Recurrent]] = {  # of each cell, by its name
    "rnn_tanh": partial(RNN, nonlinearity="tanh"),
    "rnn_relu": partial(RNN, nonlinearity="relu"),
    "gru": GRU,
    "lstm": LSTM,
}


def explain(
    module: Recurrent,
    input: Tensor | PackedSequence,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> str:
    """Say for each layer which backend runs for this call, with the plan or the reason.

    Nothing is computed. Raises what the call would raise, RuntimeError where backend="triton"
    cannot run among it; TypeError for another module than rnn.RNN, rnn.GRU and rnn.LSTM.
    """
    if not isinstance(module, Recurrent):
        raise TypeError(
            "explain takes an rnn.RNN, rnn.GRU or rnn.LSTM (of a pattern, its .rnn), got "
            f"{type(module).__name__}"
        )
    if isinstance(input, Tensor) and input.is_nested:
        nested = Nested.of(input, module.batch_first)
        input, lengths = nested.pad(), nested.lengths
    p = module._prepare(input, None, lengths)
    if resets is not None:
        _, p = module._cut(p, resets)
    p = module._as_batch(p)
    why = module.why_pytorchs_operator(p)
    if why:
        return f"all layers: PyTorch's own operator: {why}"
    cell: Cell = CELLS[module.cell]
    D, dtype = module.directions, compute_dtype(p.x)
    how = D, dtype, p.x.device, p.packed is not None
    plan = choose(module.backend, cell, module.hidden_size, p.batch, *how)
    name = "torch" if isinstance(plan, NoPlan) else "triton"
    return "\n".join(f"layer {layer}: {name}: {plan}" for layer in range(module.num_layers))
