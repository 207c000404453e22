"""The recurrence as a function: checks, choice of backend, and its place in autograd."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference
from .kernels.plan import Limits, NoPlan, Plan, device_limits, plan

try:
    from .kernels import launch as kernels
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")

# What the interpreter of Triton (TRITON_INTERPRET=1) is taken for: it has no limits of its own.
INTERPRETER = Limits("Triton's interpreter", 227 * 1024, 132, False, False, "wgmma")


def tf32_allowed() -> bool:
    """torch's own switch for recurrent networks: by its newer name, where there is one."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is not None:
        return rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def choose(
    backend: str,
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan | NoPlan:
    """The plan of the fused kernels, or why PyTorch runs the recurrence instead.

    Raises RuntimeError, with the reason, where backend="triton" asks for what cannot run.
    """
    if backend == "torch":
        return NoPlan('backend="torch" was asked for')
    limits = _limits(backend, dtype, device)
    found: Plan | NoPlan
    if isinstance(limits, NoPlan):
        found = limits
    elif batch == 0:
        found = NoPlan("the batch is empty")
    else:
        gates = reference.CELLS[cell].gates
        found = plan(gates, hidden_size, batch, directions, dtype, tf32_allowed(), limits)
    if backend == "triton" and isinstance(found, NoPlan):
        raise RuntimeError(f'backend="triton" cannot run here: {found.why}')
    return found


def _limits(backend: str, dtype: torch.dtype, device: torch.device) -> Limits | NoPlan:
    if kernels is None:
        return NoPlan("triton is not installed")
    if device.type == "cuda":
        return device_limits(device)
    if backend == "triton" and device.type == "cpu" and kernels.INTERPRETED:
        if dtype == torch.bfloat16:
            return NoPlan("Triton's interpreter multiplies bfloat16 wrongly")
        return INTERPRETER
    return NoPlan(f"the tensors are on {device}, not on a GPU")


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Dtypes were settled before; a product that autocast changed would not fit its buffer."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Recurrence(torch.autograd.Function):
    """One layer's recurrence over all steps and directions, on either backend.

    Saves `output`, h0 and weight_hh for the reverse pass and nothing for each step besides. The
    gradient of W_hh is one matrix product over all steps, after the loop (Werbos, 1990).
    """

    @staticmethod
    def forward(
        x_gates: Tensor,  # (T, B, D * G * H)
        h0: Tensor,  # (D, B, H)
        weight_hh: Tensor,  # (D, G * H, H)
        lengths: Tensor | None,  # (B,)
        cell: str,
        reverse: bool,
        found: Plan | NoPlan,
    ) -> tuple[Tensor, Tensor]:
        with _without_autocast(x_gates.device):
            if isinstance(found, Plan):
                return kernels.forward(found, cell, x_gates, h0, weight_hh, lengths, reverse)
            return reference.forward(cell, x_gates, h0, weight_hh, lengths, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        _, h0, weight_hh, lengths, ctx.cell, ctx.reverse, ctx.found = inputs
        ctx.save_for_backward(outputs[0], h0, weight_hh, lengths)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_h_n: Tensor | None) -> tuple:
        output, h0, weight_hh, lengths = ctx.saved_tensors
        need_d_x_gates, need_d_h0, need_d_weight_hh, *_ = ctx.needs_input_grad
        if d_output is None and d_h_n is None:
            return (None,) * 7
        differentiable = torch.is_grad_enabled()  # create_graph=True: a second order is wanted
        with _without_autocast(output.device):
            if isinstance(ctx.found, Plan) and not differentiable:
                d_x_gates, d_h0 = kernels.reverse(
                    ctx.found,
                    ctx.cell,
                    d_output,
                    d_h_n,
                    output,
                    weight_hh,
                    lengths,
                    ctx.reverse,
                    need_d_x_gates or need_d_weight_hh,
                    need_d_h0,
                )
            else:
                d_x_gates, d_h0 = reference.reverse(
                    ctx.cell,
                    d_output,
                    d_h_n,
                    output,
                    weight_hh,
                    lengths,
                    ctx.reverse,
                    need_d_h0,
                    differentiable,
                )
            d_weight_hh = None
            if need_d_weight_hh:
                assert d_x_gates is not None
                d_weight_hh = recurrent_weight_gradient(d_x_gates, output, h0, lengths, ctx.reverse)
        return d_x_gates if need_d_x_gates else None, d_h0, d_weight_hh, None, None, None, None


def recurrent_weight_gradient(
    d_h_gates: Tensor,  # (T, B, D * G * H)
    output: Tensor,  # (T, B, D * H)
    h0: Tensor,  # (D, B, H)
    lengths: Tensor | None,  # (B,)
    reverse: bool,
) -> Tensor:
    """dW_hh (D, G * H, H): the sum over steps and rows of d_h_gates[t] times the state before t."""
    T, B, _ = output.shape
    D = h0.size(0)
    gradients = []
    all_d_gates, all_h = (reference.by_direction(x, D) for x in (d_h_gates, output))
    for d, (d_gates, h) in enumerate(zip(all_d_gates, all_h)):
        # h0 is the state before the first step: the last of a row where time runs backwards.
        if reverse == bool(d):
            first, after, before = d_gates[0], slice(1, None), slice(None, -1)
        elif lengths is None:
            first, after, before = d_gates[-1], slice(None, -1), slice(1, None)
        else:
            last = (lengths.to(torch.int64) - 1).clamp(0, T - 1)  # zero length: its gradient is 0
            first = d_gates.gather(0, last[None, :, None].expand(1, B, d_gates.size(2)))[0]
            after, before = slice(None, -1), slice(1, None)
        gradient = first.t() @ h0[d]
        if T > 1:
            gradient = gradient + d_gates[after].flatten(0, 1).t() @ h[before].flatten(0, 1)
        gradients.append(gradient)
    return gradients[0].unsqueeze(0) if D == 1 else torch.stack(gradients)


def run(
    x_gates: Tensor,  # (T, B, D * G * H)
    h0: Tensor,  # (D, B, H)
    weight_hh: Tensor,  # (D, G * H, H)
    lengths: Tensor | None,  # (B,)
    cell: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The recurrence on tensors that were checked before: output (T, B, D * H), h_n (D, B, H)."""
    D, B, H = h0.shape
    found = choose(backend, cell, H, B, D, x_gates.dtype, x_gates.device)
    arguments = (x_gates, h0, weight_hh, lengths, cell, reverse, found)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Recurrence.apply(*arguments)
    # apply as C++ has it: Python's binds the signature anew at each call, some 50 us, in which
    # a CPU takes several steps of a small layer.
    return super(torch.autograd.Function, Recurrence).apply(*arguments)


def check_lengths(lengths: Tensor, T: int, B: int) -> None:
    """Raise TypeError or ValueError unless lengths is (B,) of int32 or int64, each in [0, T].

    The range is checked on the CPU alone: on another device the host would have to wait for it.
    There a length above T counts as T and a negative one as 0.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"lengths must have shape {(B,)}, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and B > 0:
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > T:
            raise ValueError(f"lengths must lie in [0, {T}], got values from {low} to {high}")


def recurrence(
    x_gates: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    *,
    cell: str,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = f(x_gates_t + W_hh h_{t-1}) for all t, with W_hh kept on chip where it fits.

    Args:
        x_gates: W_ih x + b_ih + b_hh of all steps, (T, B, G*H), T >= 1; any strides. G is the
            number of gates of the cell: 1 for "rnn_tanh" and "rnn_relu".
        h0: (B, H), the state before the first step.
        weight_hh: (G*H, H).
        cell: "rnn_tanh" or "rnn_relu" (Elman, 1990).
        lengths: (B,), int32 or int64, any device. Row b is active while t < lengths[b]; an
            inactive step carries the state, outputs zero and passes no gradient.
        reverse: walk from t = T - 1 down to 0.
        backend: "triton" or "torch", or "auto": triton where it can run.

    All three tensors share one floating dtype and one device. To run both directions of a layer
    in one launch, stack them: x_gates (T, B, 2*G*H), h0 (2, B, H) and weight_hh (2, G*H, H);
    direction 1 then runs against direction 0.

    Returns:
        output (T, B, H) and h_n (B, H); stacked, (T, B, 2*H) and (2, B, H). Differentiable once
        on either backend; a second derivative is taken by PyTorch's operations.

    Raises:
        ValueError: unknown cell or backend, dtypes that differ or are not floating, lengths of
            the wrong shape or out of range.
        TypeError: lengths of the wrong dtype.
        RuntimeError: shapes or devices that do not fit together, T = 0, or backend="triton" where
            it cannot run (the message says why).
    """
    if cell not in reference.CELLS:
        raise ValueError(f"cell must be one of {sorted(reference.CELLS)}, got {cell!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if weight_hh.dim() not in (2, 3):
        raise RuntimeError(f"weight_hh must be 2-D or 3-D, got {weight_hh.dim()}-D")
    stacked = weight_hh.dim() == 3
    if not stacked:
        h0, weight_hh = h0.unsqueeze(0), weight_hh.unsqueeze(0)
    gates = reference.CELLS[cell].gates
    D, H = weight_hh.size(0), weight_hh.size(2)
    if D not in (1, 2) or H == 0 or weight_hh.size(1) != gates * H:
        raise RuntimeError(
            f"weight_hh of {cell} must be ({gates} * H, H), or (directions, {gates} * H, H) for "
            f"one or two directions, got {tuple(weight_hh.shape[not stacked :])}"
        )
    if x_gates.dim() != 3 or x_gates.size(0) == 0 or x_gates.size(2) != D * gates * H:
        raise RuntimeError(
            f"x_gates must be (T, B, {D * gates * H}) with T >= 1, got {tuple(x_gates.shape)}"
        )
    T, B, _ = x_gates.shape
    if tuple(h0.shape) != (D, B, H):
        want = (D, B, H)[not stacked :]
        raise RuntimeError(f"h0 must be {want}, got {tuple(h0.shape[not stacked :])}")
    if not x_gates.is_floating_point():
        raise ValueError(f"x_gates must be of a floating dtype, got {x_gates.dtype}")
    if not x_gates.dtype == h0.dtype == weight_hh.dtype:
        raise ValueError(
            "x_gates, h0 and weight_hh must share one dtype, got "
            f"{x_gates.dtype}, {h0.dtype} and {weight_hh.dtype}"
        )
    if not x_gates.device == h0.device == weight_hh.device:
        raise RuntimeError(
            "x_gates, h0 and weight_hh must be on one device, got "
            f"{x_gates.device}, {h0.device} and {weight_hh.device}"
        )
    if lengths is not None:
        check_lengths(lengths, T, B)
        lengths = lengths.to(x_gates.device, non_blocking=True)
    output, h_n = run(x_gates, h0, weight_hh, lengths, cell, reverse, backend)
    return output, h_n if stacked else h_n.squeeze(0)
