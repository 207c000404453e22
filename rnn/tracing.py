"""The step of a cell that a user wrote, traced: its operators and those of its derivative.

The function runs once on small tensors, where each operator is looked at, and once more under
AOTAutograd, whose joint graph has the derivative too. Operators that PyTorch itself can write in
simpler ones come in these (DECOMPOSED); the rest is put in the terms of operations.py (LOWERINGS).
"""

import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from .cells import Tensors
from .graph import Graph
from .operations import DECOMPOSED, LOWERINGS

Step = Callable[[Any, Any, Any, Any], Any]
Initial = float | Callable[[Tensor], Any]


class Recipe(NamedTuple):
    """What the decorator was given."""

    function: Step
    gates: int
    states: int
    own: dict[str, Initial]

    @property
    def leaves(self) -> list[tuple[str, int]]:
        """The arguments of a step one after the other, as leaves of a graph."""
        counts = ("x_gates", self.gates), ("h_gates", self.gates), ("state_prev", self.states)
        return [(n, k) for n, count in (*counts, ("own", len(self.own))) for k in range(count)]

    def __call__(self, *flat: Tensor) -> Any:
        """The function on tensors in the order of the leaves."""
        G, S = self.gates, self.states
        own = dict(zip(self.own, flat[2 * G + S :]))
        return self.function(flat[:G], flat[G : 2 * G], flat[2 * G : 2 * G + S], own)

    def samples(self, shape: tuple[int, int]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = dict(dtype=torch.float64, device="cpu")
        drawn = [torch.randn(shape, generator=generator, **options) for _ in self.leaves]
        return [x.requires_grad_() for x in drawn]

    def refuse(self, why: str, frames: Iterable[tuple[FrameType, int]] = ()) -> ValueError:
        """The error for this function; with its own line, if it is among the frames."""
        code = inspect.unwrap(self.function).__code__
        lines = [line for frame, line in frames if frame.f_code is code]
        at = f"{code.co_filename}:{lines[0] if lines else code.co_firstlineno}"
        text = linecache.getline(code.co_filename, lines[0]).strip() if lines else ""
        return ValueError(f"{code.co_name} cannot be a cell: {why} ({at}{': ' * bool(text)}{text})")


class Watch(TorchDispatchMode):
    """Refuses, on the spot, an operator that has no place in a cell."""

    def __init__(self, recipe: Recipe, samples: list[Tensor]) -> None:
        super().__init__()
        self.recipe, self.known, self.shape = recipe, [*samples], samples[0].shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = None, short_name(func)
        why = ""
        if func._schema.is_mutable:
            why = "writes in place"
        elif torch.Tag.nondeterministic_seeded in func.tags:
            why = "draws random numbers"
        elif name in ("_local_scalar_dense", "is_nonzero", "item"):
            why = "makes a branch or a plain number of values that a kernel has yet to compute"
        elif name not in LOWERINGS and name not in DECOMPOSED:
            why = "is not among the pointwise operators that kernels have"
        elif name != "lift_fresh" and any(self.is_from_elsewhere(x) for x in args):
            why = "reads a tensor from elsewhere: name it in params, or use a plain number"
        else:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                self.known.append(x)
                if x.shape not in (self.shape, ()) and x.numel():
                    shapes = f"{tuple(x.shape)} of arguments {tuple(self.shape)}"
                    why = f"is not pointwise: it makes {shapes}"
        if why:
            raise self.recipe.refuse(f"{func} {why}", traceback.walk_stack(sys._getframe(1)))
        return result

    def is_from_elsewhere(self, x: Any) -> bool:
        return isinstance(x, Tensor) and not any(x is known for known in self.known)


def short_name(func: Any) -> str:
    """aten.add.Tensor -> add; another library's op keeps its full name."""
    return func._schema.name.removeprefix("aten::")


def watched(recipe: Recipe, samples: list[Tensor]) -> Tensors:
    """The step on samples, every operator looked at; raises where there is something to refuse."""
    shape = tuple(samples[0].shape)
    try:
        with Watch(recipe, samples):
            new = recipe(*samples)
    except (IndexError, KeyError) as error:
        G, S = recipe.gates, recipe.states
        said = f"it was declared with gates={G}, states={S}, params {sorted(recipe.own)}"
        raise recipe.refuse(f"{error!r}; {said}", traceback.walk_tb(error.__traceback__)) from error
    if not isinstance(new, tuple) or not all(isinstance(x, Tensor) for x in new):
        raise TypeError(f"{recipe.function} must return a tuple of tensors, got {new!r}")
    if len(new) != recipe.states:
        raise TypeError(
            f"{recipe.function} must return the {recipe.states} new state(s), got {len(new)}"
        )
    for k, x in enumerate(new):
        if tuple(x.shape) != shape or x.dtype != torch.float64:
            raise recipe.refuse(
                f"the new state[{k}] must be {shape} of float64 as the arguments, got "
                f"{tuple(x.shape)} of {x.dtype}"
            )
    return new


class Traced(NamedTuple):
    """A step and its derivative in one graph."""

    graph: Graph
    differentiable: list[int]  # the new states, with detach where the user wrote it
    state: list[int]  # the new states
    gradients: dict[int, int | None]  # of each leaf; None: zero


def trace(recipe: Recipe, shape: tuple[int, int]) -> Traced:
    from torch._functorch.aot_autograd import aot_export_joint_simple

    samples = recipe.samples(shape)
    new = watched(recipe, samples)
    graph = Graph()
    leaves = [graph.leaf(*leaf) for leaf in recipe.leaves]
    if not any(x.requires_grad for x in new):
        raise recipe.refuse("no gradient reaches any of its arguments")

    def step(*flat: Tensor) -> Any:
        return tuple(x.clone() for x in recipe(*flat))  # each a tensor of its own

    decomposed: Any = get_decompositions([getattr(torch.ops.aten, name) for name in DECOMPOSED])
    joint: Any = aot_export_joint_simple(
        step, tuple(samples), trace_joint=True, decompositions=decomposed
    )
    d_state = [graph.leaf("d_state", s) for s in range(recipe.states) if new[s].requires_grad]
    # Two values for each node: what a user's detach() is to autograd, it is not to a kernel.
    inputs = iter([*leaves, *d_state])
    raw: dict[Any, Any] = {}
    plain: dict[Any, Any] = {}
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            raw[node] = plain[node] = next(inputs)
        elif node.op == "get_attr":
            number = getattr(joint, node.target)
            if number.numel() != 1:
                raise recipe.refuse(f"it reads a tensor of the shape {tuple(number.shape)}")
            raw[node] = plain[node] = graph.constant(float(number))
        elif node.op == "call_function":
            name = short_name(node.target)
            if name == "_assert_tensor_metadata":
                continue
            raw[node] = lowered(recipe, graph, node, raw)
            detached = name == "detach"
            plain[node] = plain[node.args[0]] if detached else lowered(recipe, graph, node, plain)
        else:
            outputs = node.args[0]
    if next(inputs, None) is not None:
        raise RuntimeError("AOTAutograd's joint graph has not the inputs that were expected")
    new_nodes, gradients = outputs[: recipe.states], outputs[recipe.states :]
    zero = graph.constant(0)
    found = [zero if g is None else plain[g] for g in gradients]
    return Traced(
        graph,
        [raw[node] for node in new_nodes],
        [plain[node] for node in new_nodes],
        {leaf: None if g == zero else g for leaf, g in zip(leaves, found)},
    )


def lowered(recipe: Recipe, graph: Graph, node: torch.fx.Node, values: dict[Any, int]) -> int:
    """The value of a node, from those of its arguments."""

    def argument(x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return values[x]
        return graph.constant(x) if isinstance(x, int | float) else x

    name = short_name(node.target)
    if name not in LOWERINGS:
        raise recipe.refuse(f"its derivative needs {node.target}, which kernels do not have")
    try:
        kwargs = {key: argument(x) for key, x in node.kwargs.items()}
        return LOWERINGS[name](graph, *map(argument, node.args), **kwargs)
    except (TypeError, NotImplementedError) as error:
        raise recipe.refuse(f"{node.target}: {error}") from error
