"""The layer-normalised LSTM and GRU as tiles: the pairs of rnn/layer_norm.py, under the same names.

As kernels/cells.py says of all pairs, but that these read all units of a row, so one block holds
them. After the params comes one more tile (units, 1): what a unit counts in a mean of all, 1 / H,
and 0 where there is none. Of such units gains, biases and gates are 0, and so is what they hand on;
of rows that do not exist everything is 0, and 1 / sqrt(var + EPS) is finite.
"""

import triton
import triton.language as tl

from .cells import TileCell, sigmoid, tanh
from .steps import scale

EPS = tl.constexpr(1e-5)


@triton.jit
def mean(parts, share):
    """Of all units of all parts, (1, rows)."""
    total = parts[0]
    for k in tl.static_range(1, len(parts)):
        total += parts[k]
    return tl.sum(total * share, 0, keep_dims=True) * (1.0 / len(parts))


@triton.jit
def norm(parts, share):
    """The parts of one vector, normalised over all of them, and 1 / sqrt(var + EPS)."""
    middle = mean(parts, share)
    squares = ()
    for k in tl.static_range(len(parts)):
        squares += ((parts[k] - middle) * (parts[k] - middle),)
    rstd = tl.rsqrt(mean(squares, share) + EPS)
    normed = ()
    for k in tl.static_range(len(parts)):
        normed += ((parts[k] - middle) * rstd,)
    return normed, rstd


@triton.jit
def norm_vjp(d, normed, rstd, share):
    """rstd is (1, rows), or as wide as it was saved."""
    along = mean(scale(d, normed), share)
    middle = mean(d, share)
    d_parts = ()
    for k in tl.static_range(len(d)):
        d_parts += (rstd * (d[k] - middle - normed[k] * along),)
    return d_parts


@triton.jit
def lstm_norm_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    share = params[6]
    h, rstd = norm(h_gates, share)
    i = sigmoid(x_gates[0] + params[0] * h[0], APPROXIMATE)
    f = sigmoid(x_gates[1] + params[1] * h[1], APPROXIMATE)
    g = tanh(x_gates[2] + params[2] * h[2], APPROXIMATE)
    o = sigmoid(x_gates[3] + params[3] * h[3], APPROXIMATE)
    c = f * state[1] + i * g
    c_normed, _ = norm((c,), share)
    tanh_c = tanh(params[4] * c_normed[0] + params[5], APPROXIMATE)
    return (o * tanh_c, c), (i, f, g, o, h[0], h[1], h[2], h[3], tl.broadcast_to(rstd, c.shape))


@triton.jit
def lstm_norm_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    i = saved[0]
    f = saved[1]
    g = saved[2]
    o = saved[3]
    h = (saved[4], saved[5], saved[6], saved[7])
    gain_h = (params[0], params[1], params[2], params[3])
    share = params[6]
    c_normed, rstd_c = norm((state[1],), share)
    tanh_c = tanh(params[4] * c_normed[0] + params[5], APPROXIMATE)
    d_tanh = d_state[0] * o * (1.0 - tanh_c * tanh_c)
    d_c = d_state[1] + norm_vjp((d_tanh * params[4],), c_normed, rstd_c, share)[0]
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * state_prev[1] * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_state[0] * tanh_c * o * (1.0 - o)
    d = (d_i, d_f, d_g, d_o)
    d_h_gates = norm_vjp(scale(d, gain_h), h, saved[8], share)
    d_params = scale(d, h)
    d_params += (d_tanh * c_normed[0], d_tanh)
    return d, d_h_gates, (0.0, d_c * f), d_params


@triton.jit
def gru_norm_step(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    share = params[4]
    h, rstd = norm((h_gates[0], h_gates[1]), share)
    h_n, rstd_n = norm((h_gates[2],), share)
    r = sigmoid(x_gates[0] + params[0] * h[0], APPROXIMATE)
    z = sigmoid(x_gates[1] + params[1] * h[1], APPROXIMATE)
    n = tanh(x_gates[2] + r * (params[2] * h_n[0] + params[3]), APPROXIMATE)
    saved = (r, z, n, h[0], h[1], h_n[0])
    saved += (tl.broadcast_to(rstd, n.shape), tl.broadcast_to(rstd_n, n.shape))
    return ((1.0 - z) * n + z * state[0],), saved


@triton.jit
def gru_norm_step_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    r = saved[0]
    z = saved[1]
    n = saved[2]
    h = (saved[3], saved[4], saved[5])
    share = params[4]
    d_h = d_state[0]
    d_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_z = d_h * (state_prev[0] - n) * z * (1.0 - z)
    d_r = d_n * (params[2] * h[2] + params[3]) * r * (1.0 - r)
    d_m = d_n * r
    of_r_z = norm_vjp((d_r * params[0], d_z * params[1]), (h[0], h[1]), saved[6], share)
    of_n = norm_vjp((d_m * params[2],), (h[2],), saved[7], share)
    d_params = scale((d_r, d_z, d_m), h)
    d_params += (d_m,)
    return (d_r, d_z, d_n), of_r_z + of_n, (d_h * z,), d_params


TILES = {
    "lstm_norm": TileCell(lstm_norm_step, lstm_norm_step_vjp, reads=(1,), recalls=True),
    "gru_norm": TileCell(gru_norm_step, gru_norm_step_vjp, reads_h=True, recalls=True),
}
