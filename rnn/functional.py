"""The recurrence as a function, and its checks."""

from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, Cell, cell_of
from .dispatch import BACKENDS, Backend
from .layer import Spec
from .run import run, values_are_hidden
from .segments import Segments, check_resets

State = Tensor | tuple[Tensor, ...]


def check_lengths(lengths: Tensor, T: int, B: int) -> None:
    """Raise TypeError or ValueError unless lengths is (B,) of int32 or int64, each in [0, T].

    The range is checked where values can be looked at on a CPU: on another device the host would
    have to wait for them. Elsewhere a length above T counts as T and a negative one as 0.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"lengths must have shape {(B,)}, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and B > 0 and not values_are_hidden((lengths,)):
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > T:
            raise ValueError(f"lengths must lie in [0, {T}], got values from {low} to {high}")


def own_lengths(lengths: Tensor | None, T: int, device: torch.device) -> Tensor | None:
    """A copy on the device of the input, so that what is done to the caller's lengths between the
    passes, through NumPy say, changes no gradient."""
    if lengths is None:
        return None
    return lengths.detach().to(device, non_blocking=True).clamp(0, T)


def recurrence(
    x_gates: Tensor,
    h0: State,
    weight_hh: Tensor,
    params: tuple[Tensor, ...] = (),
    *,
    cell: str | Cell,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Any]:
    """state_t = step(x_gates_t, W_hh h_{t-1}, state_{t-1}) for all t, W_hh on chip where it fits.

    Args:
        x_gates: W_ih x + b_ih + b_hh of all steps, (T, B, G*H), T >= 1; any strides. G is the
            number of gates: 1 for "rnn_tanh" and "rnn_relu", 3 for "gru", 4 for "lstm", in the
            order of torch.nn (r, z, n; i, f, g, o).
        h0: (B, H), the state before the first step; for "lstm" the pair (h0, c0), for any cell of
            several states a tuple of them, h first.
        weight_hh: (G*H, H).
        params: what the cell has besides, each (H,): for "gru" (b_hn,), the bias inside
            r * (W_hn h + b_hn), which is then no part of x_gates; for any cell those that its
            `params` name.
        cell: "rnn_tanh" or "rnn_relu" (Elman, 1990), "gru" (Cho et al., 2014), "lstm"
            (Hochreiter and Schmidhuber, 1997), or any Cell of rnn.cells.CELLS.
        lengths: (B,), int32 or int64, any device. Row b is active while t < lengths[b]; an
            inactive step carries the state, outputs zero and passes no gradient. What x_gates
            holds there is not read.
        resets: (T, B) bool, any device. Where it is set, the state before that step is zero and
            no gradient crosses; in reverse, as for each segment between two of them by itself.
            Segments run side by side, as rows: as many steps as the longest of them has.
        reverse: walk from t = T - 1 down to 0.
        backend: "triton" or "torch", or "auto": triton where it can run.

    All tensors share one floating dtype and one device. To run both directions of a layer in one
    launch, stack them: x_gates (T, B, 2*G*H), states (2, B, H), weight_hh (2, G*H, H) and params
    (2, H); direction 1 then runs against direction 0.

    Returns:
        output (T, B, H) and h_n (B, H), or (h_n, c_n); stacked, (T, B, 2*H) and (2, B, H).
        Differentiable any number of times: once on either backend, from there on by PyTorch's
        operations.

    Raises:
        ValueError: unknown cell or backend, dtypes that differ or are not floating, lengths of
            the wrong shape or out of range, resets of the wrong shape.
        TypeError: lengths or resets of the wrong dtype; h0 that is no tensor where the cell has
            one state, or no tuple of S where it has S.
        RuntimeError: shapes or devices that do not fit together, T = 0, backend="triton" where it
            cannot run (the message says why), or resets whose values are not at hand (traced).

    Example:
        >>> x_gates, h0, W = torch.randn(7, 3, 20), torch.zeros(3, 5), torch.randn(20, 5)
        >>> output, (h_n, c_n) = rnn.recurrence(x_gates, (h0, h0), W, cell="lstm")
        >>> output.shape
        torch.Size([7, 3, 5])
    """
    kind = cell_of(cell)
    name = kind.name
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    state0 = states_of(kind, h0)
    if weight_hh.dim() not in (2, 3):
        raise RuntimeError(f"weight_hh must be 2-D or 3-D, got {weight_hh.dim()}-D")
    stacked = weight_hh.dim() == 3
    D, H, G = weight_hh.size(0) if stacked else 1, weight_hh.size(-1), kind.gates
    if D not in (1, 2) or H == 0 or weight_hh.size(-2) != G * H:
        raise RuntimeError(
            f"weight_hh of {name} must be ({G} * H, H), or (directions, {G} * H, H) for one or "
            f"two directions, got {tuple(weight_hh.shape)}"
        )
    if x_gates.dim() != 3 or x_gates.size(0) == 0 or x_gates.size(2) != D * G * H:
        raise RuntimeError(
            f"x_gates must be (T, B, {D * G * H}) with T >= 1, got {tuple(x_gates.shape)}"
        )
    T, B, _ = x_gates.shape
    lead = (D,) if stacked else ()
    if len(params) != len(kind.params):
        raise RuntimeError(f"{name} has the params {kind.params}, got {len(params)} tensors")
    named = {"x_gates": x_gates, "weight_hh": weight_hh, **dict(zip(kind.params, params))}
    for label, state in zip(state_names(kind), state0):
        named[label] = state
        if tuple(state.shape) != (*lead, B, H):
            raise RuntimeError(f"{label} must be {(*lead, B, H)}, got {tuple(state.shape)}")
    for label, param in zip(kind.params, params):
        if tuple(param.shape) != (*lead, H):
            raise RuntimeError(f"{label} must be {(*lead, H)}, got {tuple(param.shape)}")
    if not x_gates.is_floating_point():
        raise ValueError(f"x_gates must be of a floating dtype, got {x_gates.dtype}")
    if len({t.dtype for t in named.values()}) > 1:
        raise ValueError(
            f"all tensors must share one dtype, got { {n: t.dtype for n, t in named.items()} }"
        )
    if len({t.device for t in named.values()}) > 1:
        raise RuntimeError(
            "all tensors must be on one device, got "
            f"{ {n: str(t.device) for n, t in named.items()} }"
        )
    if lengths is not None:
        check_lengths(lengths, T, B)
    spec = Spec(name, D, reverse, input_product=False, stacked=stacked)
    each = zip(weight_hh, *params) if stacked else [(weight_hh, *params)]
    tensors = (*state0, *(w for direction in each for w in direction))
    lengths = own_lengths(lengths, T, x_gates.device)
    segments = None
    if resets is not None:
        check_resets(resets, (T, B))
        segments = Segments.of(resets.to(x_gates.device), lengths)
    if segments is None or segments.total == 0:
        output, state_n = run(spec, backend, x_gates, lengths, tensors)
    else:
        S, backwards = kind.states, [reverse, not reverse][:D]
        before = state0 if stacked else tuple(s.unsqueeze(0) for s in state0)
        entered = (segments.enter(s, backwards) for s in before)
        spec = spec._replace(sizes=tuple(segments.sizes), stacked=True)
        rows = segments.gather(x_gates)
        output, ends = run(spec, backend, rows, None, (*entered, *tensors[S:]))
        output = segments.scatter(output)
        state_n = tuple(segments.leave(s, b, backwards) for s, b in zip(ends, before))
        state_n = state_n if stacked else tuple(s.squeeze(0) for s in state_n)
    return output, state_n[0] if kind.states == 1 else state_n


def state_names(cell: Cell) -> tuple[str, ...]:
    """What errors call the states before the first step."""
    if cell.states == 1:
        return ("h0",)
    if cell is CELLS["lstm"]:
        return "h0", "c0"
    return tuple(f"h0[{k}]" for k in range(cell.states))


def states_of(cell: Cell, h0: State) -> tuple[Tensor, ...]:
    """The states of a cell as a tuple; raises TypeError where h0 does not hold them."""
    states = cell.states
    if states == 1 and isinstance(h0, Tensor):
        return (h0,)
    if states > 1 and isinstance(h0, tuple | list) and len(h0) == states:
        if all(isinstance(s, Tensor) for s in h0):
            return tuple(h0)
    want = "a Tensor" if states == 1 else f"the tuple ({', '.join(state_names(cell))})"
    raise TypeError(f"h0 of {cell.name} must be {want}, got {type(h0).__name__}")
