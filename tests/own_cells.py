"""Two cells that are no module of torch.nn, for tests of what serves any cell; modules of them, and
the plain loop that these are held against.

leaky     one state, a rate a per unit: h = h + a * (tanh(x + W_hh h) - h)
peephole  an LSTM whose gates see c, with a third state that counts what was written; the bias
          of its g stands inside the product with i, and g is not its last gate
"""

import pytest
import torch
import triton
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from triton import language as tl
from twins import tensors

import rnn
from rnn.cells import CELLS, Cell
from rnn.kernels.cells import CELLS as TILES
from rnn.kernels.cells import TileCell, sigmoid, tanh


def leaky_step(x_gates, h_gates, state, params):
    n = torch.tanh(x_gates[0] + h_gates[0])
    return (state[0] + params[0] * (n - state[0]),), (n,)


def leaky_step_vjp(d_state, state_prev, state, saved, params):
    (n,), (a,), (d_h,) = saved, params, d_state
    d = d_h * a * (1 - n * n)
    return (d,), (d,), (d_h * (1 - a),), (d_h * (n - state_prev[0]),)


def peephole_step(x_gates, h_gates, state, params):
    b_g, p_i, p_f, p_o = params
    i = torch.sigmoid(x_gates[0] + h_gates[0] + p_i * state[1])
    f = torch.sigmoid(x_gates[1] + h_gates[1] + p_f * state[1])
    m = h_gates[2] + b_g
    g = torch.tanh(x_gates[2] + i * m)
    c = f * state[1] + i * g
    k = f * state[2] + i
    o = torch.sigmoid(x_gates[3] + h_gates[3] + p_o * c)
    return (o * torch.tanh(c) / (1 + k * k), c, k), (i, f, g, o, m)


def peephole_step_vjp(d_state, state_prev, state, saved, params):
    i, f, g, o, m = saved
    _, p_i, p_f, p_o = params
    _, c, k = state
    tanh_c, q = torch.tanh(c), 1 / (1 + k * k)
    d_o = d_state[0] * tanh_c * q * o * (1 - o)
    d_k = d_state[2] - 2 * d_state[0] * o * tanh_c * k * q * q
    d_c = d_state[1] + d_state[0] * o * q * (1 - tanh_c * tanh_c) + d_o * p_o
    d_g = d_c * i * (1 - g * g)
    d_i = (d_c * g + d_k + d_g * m) * i * (1 - i)
    d_f = (d_c * state_prev[1] + d_k * state_prev[2]) * f * (1 - f)
    d_prev = None, d_c * f + d_i * p_i + d_f * p_f, d_k * f
    d_m = d_g * i
    d_params = d_m, d_i * state_prev[1], d_f * state_prev[1], d_o * c
    return (d_i, d_f, d_g, d_o), (d_i, d_f, d_m, d_o), d_prev, d_params


@triton.jit
def leaky_tiles(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    n = tanh(x_gates[0] + h_gates[0], APPROXIMATE)
    return (state[0] + params[0] * (n - state[0]),), (n,)


@triton.jit
def leaky_tiles_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    n = saved[0]
    d = d_state[0] * params[0] * (1.0 - n * n)
    d_prev = d_state[0] * (1.0 - params[0])
    return (d,), (d,), (d_prev,), (d_state[0] * (n - state_prev[0]),)


@triton.jit
def peephole_tiles(x_gates, h_gates, state, params, APPROXIMATE: tl.constexpr):
    i = sigmoid(x_gates[0] + h_gates[0] + params[1] * state[1], APPROXIMATE)
    f = sigmoid(x_gates[1] + h_gates[1] + params[2] * state[1], APPROXIMATE)
    m = h_gates[2] + params[0]
    g = tanh(x_gates[2] + i * m, APPROXIMATE)
    c = f * state[1] + i * g
    k = f * state[2] + i
    o = sigmoid(x_gates[3] + h_gates[3] + params[3] * c, APPROXIMATE)
    return (o * tanh(c, APPROXIMATE) / (1.0 + k * k), c, k), (i, f, g, o, m)


@triton.jit
def peephole_tiles_vjp(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    i = saved[0]
    f = saved[1]
    g = saved[2]
    o = saved[3]
    m = saved[4]
    c = state[1]
    k = state[2]
    tanh_c = tanh(c, APPROXIMATE)
    q = 1.0 / (1.0 + k * k)
    d_o = d_state[0] * tanh_c * q * o * (1.0 - o)
    d_k = d_state[2] - 2.0 * d_state[0] * o * tanh_c * k * q * q
    d_c = d_state[1] + d_state[0] * o * q * (1.0 - tanh_c * tanh_c) + d_o * params[3]
    d_g = d_c * i * (1.0 - g * g)
    d_i = (d_c * g + d_k + d_g * m) * i * (1.0 - i)
    d_f = (d_c * state_prev[1] + d_k * state_prev[2]) * f * (1.0 - f)
    d_prev = (0.0, d_c * f + d_i * params[1] + d_f * params[2], d_k * f)
    d_m = d_g * i
    d_params = (d_m, d_i * state_prev[1], d_f * state_prev[1], d_o * c)
    return (d_i, d_f, d_g, d_o), (d_i, d_f, d_m, d_o), d_prev, d_params


def small_(x):
    torch.nn.init.normal_(x, std=0.1)


LEAKY = Cell(
    "leaky", 1, 1, 1, leaky_step, leaky_step_vjp, params=("rate",), own_params=(("rate", 0.25),)
)
PEEPHOLE = Cell(
    "peephole",
    4,
    3,
    5,
    peephole_step,
    peephole_step_vjp,
    params=("b_hg", "peep_i", "peep_f", "peep_o"),
    inner_bias=(2,),
    split=(2,),
    own_params=(("peep_i", small_), ("peep_f", 0.0), ("peep_o", small_)),
)
TILE_CELLS = {
    "leaky": TileCell(leaky_tiles, leaky_tiles_vjp, reads_h=True, recalls=True),
    "peephole": TileCell(peephole_tiles, peephole_tiles_vjp, reads=(1, 2), recalls=True),
}
OWN = {cell.name: cell for cell in (LEAKY, PEEPHOLE)}


@pytest.fixture(scope="module", autouse=True)
def in_the_tables():
    """The cells are known while the tests of a module run that imports this, and to no other."""
    with pytest.MonkeyPatch.context() as patch:
        for name, cell in OWN.items():
            patch.setitem(CELLS, name, cell)
            patch.setitem(TILES, name, TILE_CELLS[name])
        yield


I, H = 5, 17
CELLS_HERE = [LEAKY, CELLS["lstm"], PEEPHOLE]  # of one, two and three states
DEEP = {"num_layers": 2, "bidirectional": True}
DOUBLE = {"dtype": torch.float64, "backend": "torch"}
LENGTHS = torch.tensor([2, 6, 0])
each_cell = pytest.mark.parametrize("cell", CELLS_HERE, ids=lambda c: c.name)
each_own = pytest.mark.parametrize("cell", OWN.values(), ids=OWN)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def module(cell, hidden_size=H, seed=0, **options):
    """With weights that are all drawn, the cell's own among them."""
    torch.manual_seed(seed)
    made = rnn.Recurrent(cell, I, hidden_size, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.split("_l")[0] in dict(cell.own_params):
                p.uniform_(0.1, 0.9)
    return made


def given(of, T=6, B=3):
    """An input (T, B, I) in the module's layout and states, as leaves."""
    generator = torch.Generator().manual_seed(T + B)
    dtype = of.weight_hh_l0.dtype

    def leaf(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    layers = of.num_layers * of.directions
    hx = tuple(leaf(layers, B, of.hidden_size) for _ in range(CELLS[of.cell].states))
    x = leaf(*((B, T) if of.batch_first else (T, B)), I)
    return x, hx if len(hx) > 1 else hx[0]


def loop(of, x, hx=None, lengths=None, resets=None):
    """What the module computes, step by step; x is (T, B, I)."""
    cell, (T, B) = CELLS[of.cell], x.shape[:2]
    weights, last = dict(of.named_parameters()), []
    inner = len(cell.inner_bias)
    for layer in range(of.num_layers):
        outputs = []
        for backwards in [False, True][: of.directions]:
            end = f"_l{layer}" + "_reverse" * backwards
            W_ih, W_hh = weights["weight_ih" + end], weights["weight_hh" + end]
            b_ih = weights["bias_ih" + end] if of.bias else 0.0
            b_hh = weights["bias_hh" + end] if of.bias else 0.0
            params = [x.new_zeros(of.hidden_size)] * inner  # b_hh is in h_gates, all of it
            params += [weights[name + end] for name, _ in cell.own_params]
            zeros = x.new_zeros(B, of.hidden_size)
            state = (zeros,) * cell.states
            if hx is not None:
                state = tuple(s[len(last)] for s in tensors(hx))
            output = [zeros] * T
            for t in reversed(range(T)) if backwards else range(T):
                if resets is not None and t + backwards < T:  # where a segment begins, or has begun
                    begins = resets[t + backwards]
                    if lengths is not None:
                        begins = begins & (t + backwards < lengths)
                    state = tuple(torch.where(begins[:, None], zeros, s) for s in state)
                x_gates = (x[t] @ W_ih.t() + b_ih).chunk(cell.gates, 1)
                h_gates = (state[0] @ W_hh.t() + b_hh).chunk(cell.gates, 1)
                new, _ = cell.step(x_gates, h_gates, state, tuple(params))
                active = torch.ones(B, 1, dtype=torch.bool)
                if lengths is not None:
                    active = (t < lengths)[:, None]
                state = tuple(torch.where(active, a, b) for a, b in zip(new, state))
                output[t] = torch.where(active, state[0], zeros)
            outputs.append(torch.stack(output))
            last.append(state)
        x = torch.cat(outputs, 2)
    state_n = tuple(torch.stack(s) for s in zip(*last))
    return x, state_n if len(state_n) > 1 else state_n[0]


def packed(of, x, hx=None, **kwargs):
    """The call on packed rows, of lengths 6, 2 and 1; the loop on those lengths."""
    lengths = torch.tensor([2, 6, 1])
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state = of(rows, hx)
    assert isinstance(output, PackedSequence)
    return pad_packed_sequence(output)[0], state


RESETS = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) < 0.4
CALLS = {
    "padded": {},
    "lengths": {"lengths": LENGTHS},
    "packed": {"lengths": torch.tensor([2, 6, 1])},
    "resets": {"resets": RESETS},
    "resets and lengths": {"resets": RESETS, "lengths": LENGTHS},
}
