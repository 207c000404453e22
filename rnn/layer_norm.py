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

What belongs to x, gain_x * norm(W_ih x) + bias, is no part of the recurrence: `with_x_gates` makes
it before the loop, by PyTorch's own operations. What is left for the step reads all units of a row,
in norm(W_hh h) and norm(c): the kernels take it where one block holds all of W_hh.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import CELLS, Cell, Tensors
from .rows import active_steps

if TYPE_CHECKING:
    from .layer import Spec

EPS = 1e-5


@dataclass(frozen=True)
class NormedCell(Cell):
    """A cell whose x_gates are normalised, too."""

    groups: tuple[str, ...] = ()  # the letters of the gates that are normalised together
    in_module: tuple[tuple[str, Any], ...] = ()  # as own_params, with what belongs to x

    @property
    def learned(self) -> tuple[tuple[str, Any], ...]:
        return self.in_module

    def tiles(self) -> Any:
        """The cell as tiles. Needs triton."""
        from .kernels.layer_norm import TILES

        return TILES[self.name]

    def x_gates(self, product: Tensor, learned: dict[str, Tensor]) -> list[Tensor]:
        """gain_x * norm(product) + bias, of W_ih x (..., G * H), in the parts that are normalised
        together."""
        H = product.size(-1) // self.gates
        parts = product.split([len(group) * H for group in self.groups], -1)
        normed = []
        for group, part in zip(self.groups, parts):
            gain, bias = (
                torch.cat([learned[f"{kind}_{g}"] for g in group]) for kind in ("gain_x", "bias")
            )
            normed.append(F.layer_norm(part, part.shape[-1:], gain, bias, EPS))
        return normed


def with_x_gates(
    spec: "Spec", x: Tensor, lengths: Tensor | None, tensors: Tensors
) -> tuple["Spec", Tensor, Tensors]:
    """A layer of a NormedCell as one that takes x_gates (..., D * G * H) in place of x: what it is
    told, x_gates, and its states, masks and weights without those that x_gates are made of."""
    cell = CELLS[spec.cell]
    assert isinstance(cell, NormedCell)
    if lengths is not None:  # padding may hold anything, and zero times that need not be zero
        active = active_steps(lengths, x.size(1 if spec.batch_first else 0))[:, :, None]
        active = active.transpose(0, 1) if spec.batch_first else active
        x = torch.where(active, x, torch.zeros_like(x))
    before, weights = tensors[: spec.first_weight], tensors[spec.first_weight :]
    names, each = [name for name, _ in cell.learned], len(weights) // spec.directions
    x_gates: list[Tensor] = []
    for d in range(spec.directions):
        weight_ih, weight_hh, *rest = weights[d * each : (d + 1) * each]
        learned = dict(zip(names, rest[len(rest) - len(names) :], strict=True))
        product = F.linear(x, weight_ih, rest[0] + rest[1] if spec.bias else None)
        x_gates += cell.x_gates(product, learned)
        before = (*before, weight_hh, *(learned[name] for name in cell.params))
    # Under autocast layer_norm returns float32.
    return spec._replace(input_product=False), torch.cat(x_gates, -1).to(x.dtype), before


# Steps and their VJPs, as cells.py says. Of what W_hh h becomes, norm and 1 / sqrt(var) are saved;
# norm(c) is computed again.


def norm(parts: Tensors) -> tuple[Tensors, Tensor]:
    """The parts of one vector, normalised over all of them, and 1 / sqrt(var + EPS)."""
    whole = torch.cat(parts, -1)
    var, mean = torch.var_mean(whole, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(var + EPS)
    return ((whole - mean) * scale).chunk(len(parts), -1), scale


def norm_vjp(d: Tensors, normed: Tensors, scale: Tensor) -> Tensors:
    d_whole, whole = torch.cat(d, -1), torch.cat(normed, -1)
    along = (d_whole * whole).mean(-1, keepdim=True)
    scale = scale[..., :1]  # saved, it is as wide as a state
    return (scale * (d_whole - d_whole.mean(-1, keepdim=True) - whole * along)).chunk(len(d), -1)


def times(parts: Tensors, others: Tensors) -> Tensors:
    return tuple(a * b for a, b in zip(parts, others))


def lstm_norm_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    gain_h, (gain_c, bias_c) = params[:4], params[4:]
    h, scale = norm(h_gates)
    a = [x + gain * h_k for x, gain, h_k in zip(x_gates, gain_h, h)]
    i, f, g, o = torch.sigmoid(a[0]), torch.sigmoid(a[1]), torch.tanh(a[2]), torch.sigmoid(a[3])
    c = f * state[1] + i * g
    (c_normed,), _ = norm((c,))
    tanh_c = torch.tanh(gain_c * c_normed + bias_c)
    return (o * tanh_c, c), (i, f, g, o, *h, scale)


def lstm_norm_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    (i, f, g, o), h, scale = saved[:4], saved[4:8], saved[8]
    gain_h, (gain_c, bias_c) = params[:4], params[4:]
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
    d_h_gates = norm_vjp(times(d, gain_h), h, scale)
    return d, d_h_gates, (None, d_c * f), (*times(d, h), d_tanh * c_normed, d_tanh)


def gru_norm_step(
    x_gates: Tensors, h_gates: Tensors, state: Tensors, params: Tensors
) -> tuple[Tensors, Tensors]:
    gain_r, gain_z, gain_n, bias_hn = params
    (h_r, h_z), scale = norm(h_gates[:2])
    (h_n,), scale_n = norm(h_gates[2:])
    r = torch.sigmoid(x_gates[0] + gain_r * h_r)
    z = torch.sigmoid(x_gates[1] + gain_z * h_z)
    n = torch.tanh(x_gates[2] + r * (gain_n * h_n + bias_hn))
    return ((1 - z) * n + z * state[0],), (r, z, n, h_r, h_z, h_n, scale, scale_n)


def gru_norm_step_vjp(
    d_state: Tensors, state_prev: Tensors, state: Tensors, saved: Tensors, params: Tensors
) -> Any:
    (r, z, n), h, (scale, scale_n) = saved[:3], saved[3:6], saved[6:]
    gain_n, bias_hn = params[2:]
    d_h = d_state[0]
    d_n = d_h * (1 - z) * (1 - n * n)
    d_z = d_h * (state_prev[0] - n) * z * (1 - z)
    d_r, d_m = d_n * (gain_n * h[2] + bias_hn) * r * (1 - r), d_n * r
    d = d_r, d_z, d_m
    of_h = times(d, params[:3])
    d_h_gates = (*norm_vjp(of_h[:2], h[:2], scale), *norm_vjp(of_h[2:], h[2:], scale_n))
    return (d_r, d_z, d_n), d_h_gates, (d_h * z,), (*times(d, h), d_m)


def _cell(
    name: str, groups: tuple[str, ...], saved: int, step: Any, step_vjp: Any, more: dict
) -> Cell:
    gates = "".join(groups)
    gain_h = {f"gain_h_{g}": 1.0 for g in gates}
    own = gain_h | more  # in the order in which the steps take them
    in_module = {f"gain_x_{g}": 1.0 for g in gates} | gain_h | {f"bias_{g}": 0.0 for g in gates}
    return NormedCell(
        name,
        len(gates),
        CELLS[name.removesuffix("_norm")].states,
        saved,
        step,
        step_vjp,
        params=tuple(own),
        split=tuple(range(len(gates))),
        own_params=tuple(own.items()),
        across=True,
        groups=groups,
        in_module=tuple((in_module | more).items()),
    )


NORMED = {
    "LSTM": _cell(
        "lstm_norm",
        ("ifgo",),
        9,
        lstm_norm_step,
        lstm_norm_step_vjp,
        {"gain_c": 1.0, "bias_c": 0.0},
    ),
    "GRU": _cell("gru_norm", ("rz", "n"), 8, gru_norm_step, gru_norm_step_vjp, {"bias_hn": 0.0}),
}


def register() -> None:
    """Put both into the table of cells. `import rnn` does not."""
    CELLS.update((cell.name, cell) for cell in NORMED.values())
