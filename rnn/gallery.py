"""Cells from the literature, for `rnn.Recurrent`, and as examples of `rnn.cell`.

`import rnn` does not import this file: it derives all of them, which takes seconds.
"""

import torch
import torch.nn.functional as F

from .derive import cell, straight_through

# Minimal gated unit (Zhou et al., 2016), gates f, n:
#     f = sigmoid(x_f + W_hf h),  n = tanh(x_n + f * (W_hn h)),  h = (1 - f) h + f n
# The paper multiplies f into h before the product; here it stands after it, as r does in
# PyTorch's GRU, so that one product serves both gates.


@cell(gates=2)
def mgu(x, h_gates, state, params):
    f = torch.sigmoid(x[0] + h_gates[0])
    n = torch.tanh(x[1] + f * h_gates[1])
    return ((1 - f) * state[0] + f * n,)


# Rate network (Sompolinsky et al., 1988), tau dv/dt = -v + W r + x with r = tanh(v), a step of
# Euler's method; each unit learns its own a = dt / tau in (0, 1). States r, v:
#     v = v + a (x + W_hh r - v),  r = tanh(v)


@cell(gates=1, states=2, params={"rate": 0.0})
def leaky_integrator(x, h_gates, state, params):
    a = torch.sigmoid(params["rate"])
    v = state[1] + a * (x[0] + h_gates[0] - state[1])
    return torch.tanh(v), v


# LSTM with peepholes (Gers and Schmidhuber, 2000), gates i, f, g, o: they see the cell state too.
#     i = sigmoid(x_i + W_hi h + p_i c),  f = sigmoid(x_f + W_hf h + p_f c)
#     c = f c + i tanh(x_g + W_hg h),     o = sigmoid(x_o + W_ho h + p_o c)  of the new c
#     h = o tanh(c)


@cell(gates=4, states=2, params={"peephole_i": 0.0, "peephole_f": 0.0, "peephole_o": 0.0})
def peephole_lstm(x, h_gates, state, params):
    _, c = state
    i = torch.sigmoid(x[0] + h_gates[0] + params["peephole_i"] * c)
    f = torch.sigmoid(x[1] + h_gates[1] + params["peephole_f"] * c)
    c = f * c + i * torch.tanh(x[2] + h_gates[2])
    o = torch.sigmoid(x[3] + h_gates[3] + params["peephole_o"] * c)
    return o * torch.tanh(c), c


# LSTM whose input gate is 1 - f (Greff et al., LSTM: a search space odyssey, 2015), gates f, g, o:
#     c = f c + (1 - f) tanh(x_g + W_hg h),  h = o tanh(c)


@cell(gates=3, states=2)
def coupled_lstm(x, h_gates, state, params):
    f = torch.sigmoid(x[0] + h_gates[0])
    g = torch.tanh(x[1] + h_gates[1])
    o = torch.sigmoid(x[2] + h_gates[2])
    c = f * state[1] + (1 - f) * g
    return o * torch.tanh(c), c


# sLSTM (Beck et al., xLSTM, 2024), gates z, i, f, o, states h, c, n, m: the input gate is an
# exponential, and m keeps it in range; h does not depend on m.
#     m = max(log sigmoid(f) + m, i)
#     c = exp(log sigmoid(f) + m_prev - m) c + exp(i - m) tanh(z),  n likewise with 1 for tanh(z)
#     h = sigmoid(o) c / n


@cell(gates=4, states=4)
def slstm(x, h_gates, state, params):
    z, i, f, o = (a + b for a, b in zip(x, h_gates))
    _, c, n, m = state
    kept = F.logsigmoid(f) + m
    m = torch.maximum(kept, i)
    forget, enter = torch.exp(kept - m), torch.exp(i - m)
    c = forget * c + enter * torch.tanh(z)
    n = forget * n + enter
    return torch.sigmoid(o) * c / n, c, n, m


# Leaky integrate-and-fire unit with a surrogate gradient (Neftci et al., 2019), states spike, v:
#     v = b v + x + W_hh spike - spike,  spike = 1 where v > 1, else 0
# Each unit learns its own b in (0, 1). The slope of a spike is taken for that of a fast sigmoid,
# 1 / (1 + 2 |v - 1|)^2 (Zenke and Ganguli, SuperSpike, 2018).


@cell(gates=1, states=2, params={"leak": 0.0})
def spiking(x, h_gates, state, params):
    spike, v = state
    v = torch.sigmoid(params["leak"]) * v + x[0] + h_gates[0] - spike
    above = v - 1
    spike = straight_through((above > 0).to(v.dtype), above / (1 + 2 * above.abs()))
    return spike, v


GALLERY = (mgu, leaky_integrator, peephole_lstm, coupled_lstm, slstm, spiking)
