"""THE table of operations that a derived cell may be made of, and PyTorch's operators in its terms.

An operation has a form in PyTorch and one in Triton, as text with a place for each argument. To add
one, write a line for it here, and a line or a function for the operator of PyTorch that it serves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

COMPARISON, OR, AND, SUM, PRODUCT, SIGN, CALL = range(7)  # what binds how tightly in Python


class Operation(NamedTuple):
    torch: str
    triton: str
    level: int = CALL
    costly: bool = False  # many instructions: better kept than computed again
    truth: bool = False  # its result is true or false
    truths: int = 0  # how many of its first arguments are true or false
    tensors: bool = False  # PyTorch's form takes no plain number


def infix(symbol: str, level: int, **more: Any) -> Operation:
    text = f"{{0}} {symbol} {{1}}"
    return Operation(text, text, level, **more)


def call(name: str, triton: str = "", **more: Any) -> Operation:
    """A function of one argument, of the same name in PyTorch and in kernels/functions.py."""
    return Operation(f"torch.{name}({{0}})", triton or f"{name}({{0}})", **more)


OPERATIONS = {
    "add": infix("+", SUM),
    "sub": infix("-", SUM),
    "mul": infix("*", PRODUCT),
    "div": infix("/", PRODUCT),
    "neg": Operation("-{0}", "-{0}", SIGN),
    "exp": call("exp", "exp({0}, APPROXIMATE)", costly=True),
    "expm1": call("expm1", costly=True),
    "log": call("log", "tl.log({0})", costly=True),
    "log1p": call("log1p", costly=True),
    "tanh": call("tanh", "tanh({0}, APPROXIMATE)", costly=True),
    "sigmoid": call("sigmoid", "sigmoid({0}, APPROXIMATE)", costly=True),
    "sqrt": call("sqrt", "tl.sqrt_rn({0})", costly=True),
    "rsqrt": call("rsqrt", "tl.rsqrt({0})", costly=True),
    "sin": call("sin", "tl.sin({0})", costly=True),
    "cos": call("cos", "tl.cos({0})", costly=True),
    "erf": call("erf", "tl.erf({0})", costly=True),
    "relu": call("relu"),
    "abs": call("abs", "tl.abs({0})"),
    "sign": call("sign"),
    "maximum": Operation("torch.maximum({0}, {1})", "maximum({0}, {1})", tensors=True),
    "minimum": Operation("torch.minimum({0}, {1})", "minimum({0}, {1})", tensors=True),
    "where": Operation("torch.where({0}, {1}, {2})", "tl.where({0}, {1}, {2})", truths=1),
    "number": Operation("{0}.to({like}.dtype)", "tl.where({0}, 1.0, 0.0)", truths=1),
    "detach": Operation("{0}.detach()", "{0}"),
    "gt": infix(">", COMPARISON, truth=True),
    "ge": infix(">=", COMPARISON, truth=True),
    "lt": infix("<", COMPARISON, truth=True),
    "le": infix("<=", COMPARISON, truth=True),
    "eq": infix("==", COMPARISON, truth=True),
    "ne": infix("!=", COMPARISON, truth=True),
    "and": infix("&", AND, truth=True, truths=2),
    "or": infix("|", OR, truth=True, truths=2),
    "not": Operation("~{0}", "~{0}", SIGN, truth=True, truths=1),
}


def evaluate(op: str, numbers: list[float]) -> float:
    """An operation on plain numbers; a truth is 1 or 0."""
    dtypes = [torch.bool if k < OPERATIONS[op].truths else torch.float64 for k in range(3)]
    tensors = [torch.tensor(n, dtype=d, device="cpu") for n, d in zip(numbers, dtypes)]
    text = OPERATIONS[op].torch.format("a", "b", "c", like="a")
    return float(eval(text, {"torch": torch}, dict(zip("abc", tensors))))


# ---------------------------------------------------------------- PyTorch's operators, "aten::..."

Graph = Any  # rnn.graph.Graph, which imports this file
Lowering = Callable[..., int]

# Operators that PyTorch itself writes in simpler ones.
DECOMPOSED = (
    "tanh_backward sigmoid_backward threshold_backward log_sigmoid_forward log_sigmoid_backward "
    "softplus softplus_backward silu silu_backward gelu gelu_backward elu elu_backward hardtanh "
    "hardtanh_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward leaky_relu "
    "leaky_relu_backward mish mish_backward addcmul addcdiv lerp rsub masked_fill"
).split()

_SAME = (
    "mul div neg exp expm1 log log1p tanh sigmoid sqrt rsqrt sin cos erf relu abs sign maximum "
    "minimum where gt ge lt le eq ne"
).split()


def _apply(op: str) -> Lowering:
    return lambda graph, *args: graph.apply(op, *args)


def _same(graph: Graph, x: int, *_: Any, **__: Any) -> int:
    return x


def _sum(op: str) -> Lowering:
    def lower(graph: Graph, a: int, b: int, alpha: int | None = None) -> int:
        return graph.apply(op, a, b if alpha is None else graph.apply("mul", b, alpha))

    return lower


def _power(graph: Graph, x: int, exponent: int) -> int:
    n = graph.number(exponent)
    if n == 0.5 or n == -0.5:
        return graph.apply("sqrt" if n > 0 else "rsqrt", x)
    if n is None or n != int(n) or abs(n) > 16:
        raise NotImplementedError("its exponent must be an integer up to 16, 0.5 or -0.5")
    if n < 0:
        return graph.apply("div", graph.constant(1), _power(graph, x, graph.constant(-n)))
    if n == 0:
        return graph.constant(1)
    half = _power(graph, x, graph.constant(n // 2)) if n > 1 else x
    square = graph.apply("mul", half, half) if n > 1 else x
    return graph.apply("mul", square, x) if n > 1 and n % 2 else square


def _between(graph: Graph, x: int, low: int | None = None, high: int | None = None) -> int:
    if low is not None:
        x = graph.apply("maximum", x, low)
    return x if high is None else graph.apply("minimum", x, high)


def _converted(graph: Graph, x: int, dtype: torch.dtype | None = None, **_: Any) -> int:
    if dtype in (None, torch.float64):
        return graph.apply("number", x) if graph.is_truth(x) else x
    if dtype == torch.bool:
        return _truth(graph, x)
    raise NotImplementedError(f"a step stays in the dtype of its arguments, got {dtype}")


def _full(number: float | None) -> Lowering:
    """`number` everywhere; None: the number is the operator's own last argument."""

    def lower(graph: Graph, *args: Any, **_: Any) -> int:
        return args[-1] if number is None else graph.constant(number)

    return lower


def _truth(graph: Graph, x: int) -> int:
    return x if graph.is_truth(x) else graph.apply("ne", x, graph.constant(0))


def _logical(op: str) -> Lowering:
    return lambda graph, *args: graph.apply(op, *(_truth(graph, a) for a in args))


def _one_over(graph: Graph, x: int) -> int:
    return graph.apply("div", graph.constant(1), x)


LOWERINGS: dict[str, Lowering] = {
    **{op: _apply(op) for op in _SAME},
    **{name: _same for name in ("clone", "alias", "lift_fresh", "lift_fresh_copy", "expand")},
    **{name: _full(0) for name in ("zeros_like", "new_zeros", "zeros", "empty_like")},
    **{name: _full(1) for name in ("ones_like", "new_ones", "ones")},
    **{name: _full(None) for name in ("full_like", "new_full", "full", "scalar_tensor", "fill")},
    "add": _sum("add"),
    "sub": _sum("sub"),
    "pow": _power,
    "clamp": _between,
    "clamp_min": _between,
    "clamp_max": lambda graph, x, high: _between(graph, x, None, high),
    "reciprocal": _one_over,
    "sgn": _apply("sign"),
    "isnan": lambda graph, x: graph.apply("ne", x, x),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_not": _logical("not"),
    "bitwise_and": _logical("and"),
    "bitwise_or": _logical("or"),
    "bitwise_not": _logical("not"),
    "_to_copy": _converted,
    "detach": _apply("detach"),
}


def number_text(number: float) -> str:
    return repr(number) if math.isfinite(number) else f'float("{number}")'
