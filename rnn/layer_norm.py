"""The layer-normalised LSTM and GRU of Ba, Kiros and Hinton (Layer normalization, 2016).

Before they meet, W_ih x and W_hh h are normalised over their rows, each product by itself:

    norm(a) = (a - mean(a)) / sqrt(var(a) + 1e-5),   var without Bessel's correction

    LSTM  i, f, g, o from  gain_x * norm(W_ih x) + gain_h * norm(W_hh h) + bias   (their eq. 20)
          c = sigmoid(f) c + sigmoid(i) tanh(g)
          h = sigmoid(o) tanh(gain_c * norm(c) + bias_c)                          (eq. 22)
    GRU   r, z from        gain_x * norm(W_i. x) + gain_h * norm(W_h. h) + bias   (appendix)
          n = tanh(gain_x * norm(W_in x) + bias_n + r * (gain_h * norm(W_hn h) + bias_hn))
          h = (1 - z) n + z h

norm runs over the 4 H rows of the LSTM's product at once; of the GRU's over the 2 H of r and z, and
over the H of n. Their two biases of one sum are one here. There is no b_ih and b_hh beside them.

These steps mix the units of a row. So they run on the PyTorch path: a block of the kernels owns a
slice of the units, and the loop takes steps that are pointwise.
"""

from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, Cell, Tensors

EPS = 1e-5


def norm(parts: Tensors) -> tuple[Tensors, Tensor]:
    """The parts of one vector, normalised over all of them, and 1 / sqrt(var + EPS)."""
    whole = torch.cat(parts, -1)
    var, mean = torch.var_mean(whole, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(var + EPS)
    return ((whole - mean) * scale).chunk(len(parts), -1), scale


def norm_vjp(d: Tensors, normed: Tensors, scale: Tensor) -> Tensors:
    d_whole, whole = torch.cat(d, -1), torch.cat(normed, -1)
    along = (d_whole * whole).mean(-1, keepdim=True)
    return (scale * (d_whole - d_whole.mean(-1, keepdim=True) - whole * along)).chunk(len(d), -1)


def times(parts: Tensors, others: Tensors) -> Tensors:
    return tuple(a * b for a, b in zip(parts, others))


def lstm_norm_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    gain_x, gain_h, bias, (gain_c, bias_c) = params[:4], params[4:8], params[8:12], params[12:]
    x, scale_x = norm(x_gates)
    h, scale_h = norm(h_gates)
    a = [gx * x_k + gh * h_k + b for gx, x_k, gh, h_k, b in zip(gain_x, x, gain_h, h, bias)]
    i, f, g, o = torch.sigmoid(a[0]), torch.sigmoid(a[1]), torch.tanh(a[2]), torch.sigmoid(a[3])
    c = f * state[1] + i * g
    (c_normed,), _ = norm((c,))
    tanh_c = torch.tanh(gain_c * c_normed + bias_c)
    return (o * tanh_c, c), (i, f, g, o, *x, *h, scale_x, scale_h)


def lstm_norm_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    (i, f, g, o), x, h, (scale_x, scale_h) = saved[:4], saved[4:8], saved[8:12], saved[12:]
    gain_c, bias_c = params[12:]
    (c_normed,), scale_c = norm((state[1],))
    tanh_c = torch.tanh(gain_c * c_normed + bias_c)
    d_tanh = d_state[0] * o * (1 - tanh_c * tanh_c)
    d_c = d_state[1] + norm_vjp((d_tanh * gain_c,), (c_normed,), scale_c)[0]
    d = (
        d_c * g * i * (1 - i),
        d_c * state_prev[1] * f * (1 - f),
        d_c * i * (1 - g * g),
        d_state[0] * tanh_c * o * (1 - o),
    )
    d_x_gates = norm_vjp(times(d, params[:4]), x, scale_x[..., :1])
    d_h_gates = norm_vjp(times(d, params[4:8]), h, scale_h[..., :1])
    d_params = (*times(d, x), *times(d, h), *d, d_tanh * c_normed, d_tanh)
    return d_x_gates, d_h_gates, (None, d_c * f), d_params


def gru_norm_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    gain_x, gain_h, (bias_r, bias_z, bias_n, bias_hn) = params[:3], params[3:6], params[6:]
    (x_r, x_z), scale_x = norm(x_gates[:2])
    (h_r, h_z), scale_h = norm(h_gates[:2])
    (x_n,), scale_xn = norm(x_gates[2:])
    (h_n,), scale_hn = norm(h_gates[2:])
    r = torch.sigmoid(gain_x[0] * x_r + gain_h[0] * h_r + bias_r)
    z = torch.sigmoid(gain_x[1] * x_z + gain_h[1] * h_z + bias_z)
    n = torch.tanh(gain_x[2] * x_n + bias_n + r * (gain_h[2] * h_n + bias_hn))
    scales = scale_x, scale_xn, scale_h, scale_hn
    return ((1 - z) * n + z * state[0],), (r, z, n, x_r, x_z, x_n, h_r, h_z, h_n, *scales)


def gru_norm_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    (r, z, n), x, h, scales = saved[:3], saved[3:6], saved[6:9], saved[9:]
    scale_x, scale_xn, scale_h, scale_hn = (s[..., :1] for s in scales)
    m = params[5] * h[2] + params[9]
    d_h = d_state[0]
    d_n = d_h * (1 - z) * (1 - n * n)
    d_z = d_h * (state_prev[0] - n) * z * (1 - z)
    d_r, d_m = d_n * m * r * (1 - r), d_n * r
    d_x, d_product = (d_r, d_z, d_n), (d_r, d_z, d_m)
    of_x, of_h = times(d_x, params[:3]), times(d_product, params[3:6])
    d_x_gates = (
        *norm_vjp(of_x[:2], x[:2], scale_x),
        *norm_vjp(of_x[2:], x[2:], scale_xn),
    )
    d_h_gates = (
        *norm_vjp(of_h[:2], h[:2], scale_h),
        *norm_vjp(of_h[2:], h[2:], scale_hn),
    )
    d_params = (*times(d_x, x), *times(d_product, h), *d_x, d_m)
    return d_x_gates, d_h_gates, (d_h * z,), d_params


def _cell(name: str, gates: str, saved: int, step: Any, step_vjp: Any, more: dict) -> Cell:
    own = {f"{kind}_{g}": 1.0 for kind in ("gain_x", "gain_h") for g in gates}
    own |= {f"bias_{g}": 0.0 for g in gates} | more  # in the order in which the steps take them
    G = len(gates)
    return Cell(
        name,
        G,
        CELLS[name.removesuffix("_norm")].states,
        saved,
        step,
        step_vjp,
        params=tuple(own),
        split=tuple(range(G)),
        own_params=tuple(own.items()),
        across="normalises over all units of a row",
    )


NORMED = {
    "LSTM": _cell(
        "lstm_norm", "ifgo", 14, lstm_norm_step, lstm_norm_step_vjp, {"gain_c": 1.0, "bias_c": 0.0}
    ),
    "GRU": _cell("gru_norm", "rzn", 13, gru_norm_step, gru_norm_step_vjp, {"bias_hn": 0.0}),
}


def register() -> None:
    """Put both into the table of cells. `import rnn` does not."""
    CELLS.update((cell.name, cell) for cell in NORMED.values())
