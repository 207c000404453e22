"""`rnn.cell`: a Cell from one Python function, with its derivative, for every engine.

The function is traced (tracing.py) into a graph of pointwise operations (graph.py). What must be
saved between its two passes is chosen there, and both functions of a Cell are printed from it, in
PyTorch and in Triton (printer.py).
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import generated
from .cells import CELLS, Cell, Tensors
from .graph import cut
from .printer import TORCH, TRITON, Function, module_text
from .tracing import Initial, Recipe, Step, Traced, trace


@dataclass(frozen=True, kw_only=True)
class DerivedCell(Cell):
    """A Cell that `rnn.cell` made."""

    function: Step  # the user's
    torch_source: str
    triton_source: str
    # step_vjp in two: what does not depend on d_state, for any number of steps at once; the rest.
    slopes: Callable[[Tensors, Tensors, Tensors, Tensors], Tensors]
    times_slopes: Callable[[Tensors, Tensors], Any]
    reads_h: bool  # these three as kernels/cells.py has them
    reads: tuple[int, ...]
    recalls: bool

    def tiles(self) -> Any:
        """The cell as tiles, for the table in kernels/cells.py. Needs triton."""
        from .kernels.cells import TileCell

        module = generated.load(self.name, self.triton_source)
        return TileCell(module.step, module.step_vjp, self.reads_h, self.reads, self.recalls)

    def __reduce__(self) -> Any:
        return registered, (self.name, self.function.__module__)


def registered(name: str, module: str) -> Cell:
    """The cell of this name; it is made where its module is imported."""
    if name not in CELLS:
        importlib.import_module(module)
    if name not in CELLS:
        raise LookupError(f"{module} makes no cell {name}: its function has changed since")
    return CELLS[name]


def cell(
    *, gates: int, states: int = 1, params: Mapping[str, Initial] | None = None
) -> Callable[[Step], Cell]:
    """Make a cell of a function that computes one step: a decorator.

        state = step(x, h_gates, state, params)
            x        the G gates of W_ih x_t + b_ih, a tuple of tensors (B, H)
            h_gates  the G gates of W_hh h_{t-1} + b_hh, likewise
            state    the S states before the step; state[0] is h, the one that W_hh multiplies
            params   a dict of the cell's own vectors per hidden unit, by the names given here
            returns  a tuple of the S new states

    The function is called here, on small tensors, and never again. It may use pointwise operations
    of PyTorch on tensors and plain numbers: arithmetic, exp, expm1, log, log1p, tanh, sigmoid,
    sqrt, rsqrt, reciprocal, integer powers, sin, cos, erf, abs, sign, relu and its kin, softplus,
    logsigmoid, maximum, minimum, clamp, where, comparisons and logic. detach() stops a gradient
    (see `straight_through`).

    Args:
        gates: G, how many (H, H) parts W_hh has. Each must be used.
        states: S.
        params: the name of each vector per unit, and its initial value or a function that fills
            it in place.

    Returns:
        a decorator; what it returns is a Cell: for `rnn.Recurrent`, and by its name for
        `rnn.recurrence`. The same function again is the same cell.

    Raises:
        ValueError: the function does what no kernel can: an operation that is not pointwise or
            unknown here (the message names it and the line), random numbers, a write in place, a
            branch on values, a result of another shape or dtype, a gate that is not used, a
            derivative that is not that of its operations.
        TypeError: it is no Python function, or does not return a tuple of S tensors.

    Example: the minimal gated unit (Zhou et al., 2016)
        >>> @rnn.cell(gates=2)
        ... def mgu(x, h_gates, state, params):
        ...     f = torch.sigmoid(x[0] + h_gates[0])
        ...     n = torch.tanh(x[1] + f * h_gates[1])
        ...     return ((1 - f) * state[0] + f * n,)
    """
    if gates < 1 or states < 1:
        raise ValueError(f"a cell has one gate and one state at least, got {gates} and {states}")
    own = dict(params or {})
    for name in own:
        if not name.isidentifier():
            raise ValueError(f"the name of a param must be an identifier, got {name!r}")

    def decorate(function: Step) -> Cell:
        if not inspect.isfunction(inspect.unwrap(function)):
            raise TypeError(f"a cell is made of a Python function, got {function!r}")
        return _register(derive(Recipe(function, gates, states, own)))

    return decorate


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `surrogate` (Bengio et al., 2013).

        value + (surrogate - surrogate), where only the middle one is differentiated

    Both tensors have one shape and dtype; the surrogate must be finite where the value is.

    Example: a spike with the slope of a fast sigmoid (Zenke and Ganguli, SuperSpike, 2018)
        >>> u = torch.randn(3)
        >>> spike = rnn.straight_through((u > 0).to(u.dtype), u / (1 + u.abs()))
    """
    return value.detach() + (surrogate - surrogate.detach())


def source(cell: Cell, language: str = "triton") -> str:
    """The source that `rnn.cell` made of a function, "triton" for the kernels or "torch".

    Raises TypeError for a cell that was written by hand.

    Example:
        >>> @rnn.cell(gates=1)
        ... def softsign_unit(x, h_gates, state, params):
        ...     a = x[0] + h_gates[0]
        ...     return (a / (1 + a.abs()),)
        >>> "def step_vjp(d_state, state_prev, state, saved, params" in rnn.source(softsign_unit)
        True
    """
    if not isinstance(cell, DerivedCell):
        raise TypeError(f"source takes a cell that rnn.cell made, got {cell!r}")
    texts = {"triton": cell.triton_source, "torch": cell.torch_source}
    if language not in texts:
        raise ValueError(f"language must be one of {sorted(texts)}, got {language!r}")
    return texts[language]


def derive(recipe: Recipe) -> DerivedCell:
    """The cell of a function, not yet registered."""
    with torch.inference_mode(False), torch.enable_grad():
        made = assembled(recipe, trace(recipe, (2, 3)))
        if made.torch_source != assembled(recipe, trace(recipe, (3, 5))).torch_source:
            raise recipe.refuse("it computes something else for another size, or at another call")
        check_derivative(recipe, made)
    return made


def inner_gates(recipe: Recipe, traced: Traced) -> list[int]:
    """The gates that are used in another way than as x + h: their b_hh stands inside the step."""
    graph, inner = traced.graph, []
    forward = graph.below(traced.state)
    values = graph.below([*traced.state, *(g for g in traced.gradients.values() if g is not None)])
    for k in range(recipe.gates):
        x, h = graph.leaf("x_gates", k), graph.leaf("h_gates", k)
        if x not in forward and h not in forward:
            raise recipe.refuse(f"gate {k} of {recipe.gates} is not used")
        users = {v for v in values if not {x, h}.isdisjoint(graph.nodes[v].args)}
        if users != {graph.apply("add", x, h)} or not {x, h}.isdisjoint(traced.state):
            inner.append(k)
    return inner


def assembled(recipe: Recipe, traced: Traced) -> DerivedCell:
    graph, G, S = traced.graph, recipe.gates, recipe.states
    inner = inner_gates(recipe, traced)
    gradients = [g for g in traced.gradients.values() if g is not None]

    # What the VJP reads: saved values, the states before and after the step, the cell's params.
    before = {graph.leaf("state_prev", s): f"state_prev[{s}]" for s in range(S)}
    after = {v: f"state[{s}]" for s, v in enumerate(traced.state) if v not in before}
    own = {graph.leaf("own", k): f"params[{len(inner) + k}]" for k in range(len(recipe.own))}
    tiles = graph.depending_on("x_gates", "h_gates", "state_prev", "d_state")
    of_d_state = graph.depending_on("d_state")
    linear = [graph.nodes[v].args for v in graph.below(gradients) if v in of_d_state]
    needed = sorted({arg for args in linear for arg in args} - of_d_state)
    thin = {v for v in range(len(graph.nodes)) if v not in tiles}
    saved = cut(graph, needed, {*before, *after, *thin})
    computed = graph.below(gradients, {*saved, *after})
    read = {arg for v in computed for arg in graph.nodes[v].args} | set(computed)
    read_before = {s for s in range(S) if graph.leaf("state_prev", s) in read}
    read_after = {s for s, v in enumerate(traced.state) if v in after and v in read}

    zero = graph.constant(0)
    found = {leaf: zero if g is None else g for leaf, g in traced.gradients.items()}
    d_x = [found[graph.leaf("x_gates", k)] for k in range(G)]
    d_h = [found[graph.leaf("h_gates", k)] for k in range(G)]
    d_params = [*(d_h[k] for k in inner), *(found[v] for v in own)]
    name = inspect.unwrap(recipe.function).__code__.co_name
    name = name if name.isidentifier() else "cell"  # of a lambda
    gates = {graph.leaf("x_gates", k): f"x_gates[{k}]" for k in range(G)}
    gates |= {graph.leaf("h_gates", k): f"h_gates[{k}]" for k in range(G)}
    gates |= {graph.leaf("h_gates", k): f"h_{k}" for k in inner}
    step = Function(
        "step",
        ("x_gates", "h_gates", "state", "params"),
        (traced.state, saved),
        {**gates, **{v: f"state[{s}]" for s, v in enumerate(before)}, **own},
        "state[0]",
        f"One step of {name}.",
        [f"h_{k} = h_gates[{k}] + params[{j}]" for j, k in enumerate(inner)],
    )
    names = {
        v: gates.get(v, "").replace("_gates[", "_").rstrip("]") or graph.name(v) for v in saved
    }
    d_state = {graph.leaf("d_state", s): f"d_state[{s}]" for s in range(S)}
    step_vjp = Function(
        "step_vjp",
        ("d_state", "state_prev", "state", "saved", "params"),
        (d_x, d_h, [traced.gradients[v] for v in before], d_params),
        {**d_state, **after, **before, **own, **names},
        "d_state[0]",
        "Its vector-Jacobian product.",
        [f"{names[v]} = saved[{j}]" for j, v in enumerate(saved)],
    )
    triton_source = module_text(graph, TRITON, step, step_vjp)
    for_autograd = step._replace(results=(traced.differentiable, saved))
    slopes = [v for v in needed if graph.number(v) is None]
    find_slopes = step_vjp._replace(
        name="slopes",
        arguments=step_vjp.arguments[1:],
        results=(slopes,),
        like="state[0]",
        summary="What the vector-Jacobian product needs of a step, whatever d_state is.",
    )
    times_slopes = step_vjp._replace(
        name="times_slopes",
        arguments=("d_state", "slopes"),
        given={**d_state, **{v: f"slopes[{j}]" for j, v in enumerate(slopes)}},
        summary="The vector-Jacobian product.",
        first=(),
    )
    torch_source = module_text(graph, TORCH, for_autograd, find_slopes, times_slopes)
    torch_source += TORCH_STEP_VJP
    key = [name, str(G), torch_source, triton_source]
    key += [f"{n}={getattr(v, '__qualname__', v)}" for n, v in recipe.own.items()]
    name += "_" + hashlib.sha256("\n".join(key).encode()).hexdigest()[:8]
    functions = generated.functions(name, torch_source)
    return DerivedCell(
        name,
        G,
        S,
        len(saved),
        functions["step"],
        functions["step_vjp"],
        params=(*(f"b_h{k}" for k in inner), *recipe.own),
        inner_bias=tuple(inner),
        split=tuple(k for k in range(G) if d_x[k] != d_h[k]),
        own_params=tuple(recipe.own.items()),
        function=recipe.function,
        torch_source=torch_source,
        triton_source=triton_source,
        reads_h=graph.leaf("state_prev", 0) in graph.below(traced.state),
        reads=tuple(sorted(read_before | read_after)),
        recalls=bool(read_before),
        slopes=functions["slopes"],
        times_slopes=functions["times_slopes"],
    )


TORCH_STEP_VJP = """

def step_vjp(d_state, state_prev, state, saved, params):
    return times_slopes(d_state, slopes(state_prev, state, saved, params))
"""


def check_derivative(recipe: Recipe, made: DerivedCell) -> None:
    """Raise unless autograd through the printed step gives what step_vjp gives. It does not where
    the function hides operations from autograd, and then a second derivative would be wrong."""
    samples, G, S = recipe.samples((2, 3)), recipe.gates, recipe.states
    x, h = samples[:G], samples[G : 2 * G]
    state, own = samples[2 * G : 2 * G + S], samples[2 * G + S :]
    params = (*(torch.zeros_like(x[0]) for _ in made.inner_bias), *own)
    new, saved = made.step(tuple(x), tuple(h), tuple(state), params)
    d_state = tuple(torch.ones_like(s) for s in new)
    told = [(n, d) for n, d in zip(new, d_state) if n.requires_grad]
    by_autograd = torch.autograd.grad(
        [n for n, _ in told], samples, [d for _, d in told], allow_unused=True
    )
    with torch.no_grad():
        d_x, d_h, d_prev, d_params = made.step_vjp(d_state, tuple(state), new, saved, params)
    by_vjp = (*d_x, *d_h, *d_prev, *d_params[len(made.inner_bias) :])
    for a, b in zip(by_autograd, by_vjp):
        a, b = (torch.zeros_like(x[0]) if g is None else g for g in (a, b))
        if not torch.allclose(a, b, equal_nan=True):
            raise recipe.refuse(
                "its gradient is not that of its operations: in place of torch.no_grad and of an "
                "autograd.Function, use detach() or rnn.straight_through"
            )


def _register(made: DerivedCell) -> Cell:
    """The cell under a name that no other cell has."""
    name, count = made.name, 1
    while name in CELLS and _differ(CELLS[name], made):
        count += 1
        name = f"{made.name}_{count}"
    return CELLS.setdefault(name, replace(made, name=name))


def _differ(one: Cell, other: Cell) -> bool:
    def described(cell: Cell) -> Any:
        sources = getattr(cell, "torch_source", ""), getattr(cell, "triton_source", "")
        return cell.gates, cell.states, cell.params, cell.own_params, sources

    return described(one) != described(other)
