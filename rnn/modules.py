"""Modules that drop in for those of torch.nn, and the one of any cell."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import layer_norm
from .cells import CELLS, Cell, cell_of
from .checked import compute_dtype, mode_of
from .dispatch import Backend, choose
from .kernels.limits import NoPlan
from .nested import Nested
from .recurrent import RecurrentBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What each module takes beside the arguments of torch.nn's. RNN says what they mean."""

    backend: Backend
    checkpoint_every: int | None
    recurrent_dropout: float
    zoneout: float | tuple[float, ...]
    recurrent_grad_clip: float | None


class RNN(RecurrentBase[Tensor]):
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
        recurrent_dropout: p in [0, 1]; in training W_hh takes m * h_{t-1}, where each unit of m is
            0 with probability p, else 1 / (1 - p). A call draws one mask for each layer, direction
            and sequence, for all of its steps (Gal and Ghahramani, A theoretically grounded
            application of dropout in recurrent neural networks, 2016). Where a cell reads h_{t-1}
            past W_hh, as in z * h_{t-1} of the GRU, it is not dropped.
        zoneout: p in [0, 1], of an LSTM also the pair for h and c; in training each unit of a
            state keeps its old value with probability p, anew at each step, and in evaluation
            state_t = p * state_{t-1} + (1 - p) * new (Krueger et al., Zoneout, 2017).
        recurrent_grad_clip: None, or c > 0; what step t hands to the gradient of h_{t-1} is clamped
            to [-c, c], element by element, before the gradient of output_{t-1} is added and step
            t - 1 uses the sum. The gradient of c_{t-1} is not touched. Compare Graves, Generating
            sequences with recurrent neural networks, 2013, who clamps at the gates, as Lasagne's
            grad_clipping does.

    Masks are drawn by torch's generator of the device, before the loop: one seed gives the same
    ones on each backend. The attributes of these names may be changed at any time, too.

    Beside the drop-in: backward works in eval mode on every device, `lengths` replaces packing,
    and a second derivative can be taken.
    Source: Elman, Finding structure in time, 1990.

    Example:
        >>> model = rnn.RNN(5, 7, nonlinearity="relu", bidirectional=True)
        >>> output, h_n = model(torch.randn(6, 3, 5), lengths=torch.tensor([6, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([6, 3, 14]), torch.Size([2, 3, 7]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: "Unpack[Options]",
    ) -> None:
        _refuse_projection(options)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, *sizes, device=device, dtype=dtype, **options)
        self.nonlinearity = nonlinearity


class GRU(RecurrentBase[Tensor]):
    """A stack of gated recurrent units, in place of torch.nn.GRU:

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    Args:
        input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
            bidirectional=False, device=None, dtype=None: as of torch.nn.GRU.
        backend, checkpoint_every, recurrent_dropout, zoneout, recurrent_grad_clip: as of rnn.RNN.
        layer_norm: True for the layer-normalised GRU of Ba et al. (Layer normalization, 2016), as
            rnn.layer_norm writes it down. In place of bias_ih and bias_hh it has the vectors gain_*
            and bias_*, (H,) each. The kernels run it where one block holds W_hh; rnn.explain says.

    Source: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014, in the
    form of torch.nn.GRU.

    Example:
        >>> output, h_n = rnn.GRU(5, 7, num_layers=2)(torch.randn(6, 3, 5))
        >>> output.shape, h_n.shape
        (torch.Size([6, 3, 7]), torch.Size([2, 3, 7]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        _refuse_projection(options)
        mode, bias = _normed("GRU", bias) if layer_norm else ("GRU", bias)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(mode, *sizes, device=device, dtype=dtype, **options)


class LSTM(RecurrentBase[tuple[Tensor, Tensor]]):
    """A stack of long short-term memory layers, in place of torch.nn.LSTM:

        i, f, o = sigmoid(W_i. x_t + b_i. + W_h. h_{t-1} + b_h.)   each with weights of its own
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    Args:
        input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
            bidirectional=False, proj_size=0, device=None, dtype=None: as of torch.nn.LSTM. With
            proj_size, PyTorch's own operator runs, which has no checkpoint_every.
        backend, checkpoint_every, recurrent_dropout, zoneout, recurrent_grad_clip: as of rnn.RNN.
        layer_norm: True for the layer-normalised LSTM of Ba et al. (Layer normalization, 2016), as
            rnn.layer_norm writes it down. In place of bias_ih and bias_hh it has the vectors gain_*
            and bias_*, (H,) each. The kernels run it where one block holds W_hh; rnn.explain says.

    Its state is the pair (h, c), in and out.
    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997; Gers et al., 2000.

    Example:
        >>> output, (h_n, c_n) = rnn.LSTM(5, 7, batch_first=True)(torch.randn(3, 6, 5))
        >>> output.shape, c_n.shape
        (torch.Size([3, 6, 7]), torch.Size([1, 3, 7]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        mode, bias = _normed("LSTM", bias, proj_size) if layer_norm else ("LSTM", bias)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(mode, *sizes, proj_size, device=device, dtype=dtype, **options)


class Recurrent(RecurrentBase[Any]):
    """A stack of layers of any cell, state_t = step(x_t, W_hh h_{t-1}, state_{t-1}), of which RNN,
    GRU and LSTM are cases.

    Args:
        cell: a Cell of rnn.cells.CELLS, with G gates and S states, or its name.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as of torch.nn.RNN.
        backend, checkpoint_every, recurrent_dropout, zoneout, recurrent_grad_clip: as of rnn.RNN.

    The weights bear torch's names: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H), bias_ih_l0 and
    bias_hh_l0 (G*H,), drawn from [-1/sqrt(H), 1/sqrt(H)]; the reverse direction's end in _reverse.
    In each layer and direction the cell's own params follow, named as in `leak_l0`, (H,), with the
    initial values that the cell gives. The state is a Tensor (L*D, B, H) where S is 1, else a tuple
    of S of them, h first.

    What an operator of torch.nn does, other cells than torch.nn's lack: torch.jit.script and
    rnn.convert refuse them, and torch.jit.trace unrolls the steps, so that what was traced holds
    for that number of steps alone. A module that is unpickled needs its cell in CELLS before.

    Raises:
        TypeError: cell is neither a Cell nor a name. ValueError: CELLS has no cell of that name, or
        another one.

    Example:
        >>> model = rnn.Recurrent("gru", 5, 7, bidirectional=True)
        >>> output, h_n = model(torch.randn(6, 3, 5))
        >>> output.shape, h_n.shape
        (torch.Size([6, 3, 14]), torch.Size([2, 3, 7]))
    """

    def __init__(
        self,
        cell: str | Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: "Unpack[Options]",
    ) -> None:
        if not isinstance(cell, str | Cell):
            raise TypeError(f"cell must be a Cell or its name, got {type(cell).__name__}")
        if "proj_size" in options:
            raise TypeError("rnn.Recurrent takes no proj_size")
        mode = mode_of(cell_of(cell))
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(mode, *sizes, device=device, dtype=dtype, **options)

    def extra_repr(self) -> str:
        return f"{self.cell}, {super().extra_repr()}"


def _normed(mode: str, bias: bool, proj_size: int = 0) -> tuple[str, bool]:
    """The mode of the layer-normalised form, which has no b_ih and b_hh."""
    if not bias or proj_size:
        raise ValueError("layer_norm=True needs bias=True and proj_size=0")
    layer_norm.register()
    return layer_norm.NORMED[mode].name, False


def _refuse_projection(options: Any) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


MODULES: dict[str, Callable[..., RecurrentBase]] = {  # of each cell, by its name
    "rnn_tanh": partial(RNN, nonlinearity="tanh"),
    "rnn_relu": partial(RNN, nonlinearity="relu"),
    "gru": GRU,
    "lstm": LSTM,
}
GALLERY = ("mgu", "leaky_integrator", "peephole_lstm", "coupled_lstm", "slstm", "spiking")
NAMES = (*MODULES, *GALLERY)  # of the cells that commands take


def cell_named(name: str) -> Cell:
    """A built-in cell, or one of rnn.gallery, which this imports: deriving them takes seconds.

    Raises ValueError for another name.
    """
    if name not in NAMES:
        raise ValueError(f"cell must be one of {sorted(NAMES)} or a Cell, got {name!r}")
    if name in MODULES:
        return CELLS[name]
    from . import gallery

    return getattr(gallery, name)


def module_of(cell: str | Cell) -> Callable[..., RecurrentBase]:
    """The module of a cell: of MODULES by its name, else rnn.Recurrent of the Cell."""
    if not isinstance(cell, Cell) and cell in MODULES:
        return MODULES[cell]
    return partial(Recurrent, cell if isinstance(cell, Cell) else cell_named(cell))


def explain(
    module: RecurrentBase,
    input: Tensor | PackedSequence,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> str:
    """Say for each layer which backend runs for this call, with the plan or the reason.

    Of the kernels: the engine, the tiles, the bytes of W_hh's blocks on the chip beside what the
    chip has, the clocks of a step by the plan's model (not measured), and what the other engine
    would take or why it cannot run. Nothing is computed.

    Args:
        module: an rnn.RNN, GRU, LSTM or Recurrent; of a pattern, its .rnn.
        input, lengths, resets: what the call would be given.

    Raises:
        TypeError: another module; and what the call would raise, RuntimeError where
        backend="triton" cannot run among it.

    Example:
        >>> model = rnn.GRU(5, 7, num_layers=2, backend="torch")
        >>> print(rnn.explain(model, torch.randn(6, 3, 5)))
        layer 0: torch: backend="torch" was asked for
        layer 1: torch: backend="torch" was asked for
    """
    if not isinstance(module, RecurrentBase):
        raise TypeError(
            "explain takes an rnn.RNN, GRU, LSTM or Recurrent (of a pattern, its .rnn), got "
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
    spec, dtype = module._spec(p, None), compute_dtype(p.x)
    how = module.directions, dtype, p.x.device, p.packed is not None, spec.regularised
    plan = choose(module.backend, spec.stored_cell, module.hidden_size, p.batch, *how)
    name = "torch" if isinstance(plan, NoPlan) else "triton"
    return "\n".join(f"layer {layer}: {name}: {plan}" for layer in range(module.num_layers))
