"""A pointwise function as a graph: each value once, an operation of rnn/operations.py on others.

Also which values a forward pass should save for its backward pass: `cut`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .operations import OPERATIONS, evaluate


class Node(NamedTuple):
    """An operation on values; or, of a leaf, the name of a tuple and a place in it; or a number."""

    op: str
    args: tuple[int, ...] = ()
    number: float = 0.0


class Graph:
    """Values are numbers of nodes, in an order in which they can be computed."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._values: dict[Node, int] = {}
        self._names: dict[int, str] = {}
        self._linear: set[int] = set()  # values that depend on d_state

    def _value(self, node: Node) -> int:
        if node not in self._values:
            self._values[node] = len(self.nodes)
            if node.op == "d_state" or not self._linear.isdisjoint(node.args):
                self._linear.add(len(self.nodes))
            self.nodes.append(node)
        return self._values[node]

    def leaf(self, name: str, place: int) -> int:
        return self._value(Node(name, number=place))

    def constant(self, number: float) -> int:
        return self._value(Node("constant", number=float(number)))

    def number(self, value: int) -> float | None:
        """The number that a value is, or None."""
        node = self.nodes[value]
        return node.number if node.op == "constant" else None

    def is_truth(self, value: int) -> bool:
        op = self.nodes[value].op
        return op in OPERATIONS and OPERATIONS[op].truth

    def name(self, value: int) -> str:
        """The name of a variable, the same wherever this value is printed."""
        if value not in self._names:
            op = self.nodes[value].op
            count = sum(self.nodes[v].op == op for v in self._names)
            self._names[value] = f"{op}_{count + 1}"
        return self._names[value]

    def apply(self, op: str, *args: int) -> int:
        """An operation, without what changes nothing. Truths become 1 and 0 where numbers are
        wanted, and arguments that commute have one order."""
        truths = OPERATIONS[op].truths
        numbers = (self.apply("number", a) if self.is_truth(a) else a for a in args[truths:])
        args = (*args[:truths], *numbers)
        constants = [self.number(a) for a in args]
        known = [n for n in constants if n is not None]
        if len(known) == len(args):
            return self.constant(evaluate(op, known))
        if op == "where" and constants[0] is not None:
            return args[1] if constants[0] else args[2]
        if op in ("and", "or") and known:
            constant, other = args if constants[0] is not None else args[::-1]
            return other if bool(known[0]) == (op == "and") else constant
        if op in ("add", "mul") and constants[0] is not None:
            args, constants = args[::-1], constants[::-1]
        if (op, constants[-1]) in (("add", 0.0), ("sub", 0.0), ("mul", 1.0), ("div", 1.0)):
            return args[0]
        if op == "neg" and self.nodes[args[0]].op == "neg":
            return self.nodes[args[0]].args[0]
        if op == "neg" and (factors := self._factors(args[0])) is not None:
            return self.apply("mul", factors[0], self.apply("neg", factors[1]))
        if op == "add":
            for value, negative in (args, args[::-1]):
                if self.nodes[negative].op == "neg":
                    return self.apply("sub", value, self.nodes[negative].args[0])
        gathered = self._gathered(op, *args) if op in ("add", "sub", "mul", "div") else None
        if gathered is not None:
            return gathered
        if op == "add" and constants[1] is None:
            args = self._gates_first(*sorted(args))
        elif op == "mul" and constants[1] is None:
            args = tuple(sorted(args))
        return self._value(Node(op, args))

    def _factors(self, value: int) -> tuple[int, int] | None:
        """Of a product of a value that depends on d_state and one that does not, these two."""
        node = self.nodes[value]
        if node.op == "mul" and value in self._linear:
            a, b = node.args
            if (a in self._linear) != (b in self._linear):
                return (a, b) if a in self._linear else (b, a)
        return None

    def _gathered(self, op: str, a: int, b: int) -> int | None:
        """Products as d * (what does not depend on d_state), which need not wait for d: of
        (d u) v, -d v and d / v, of d u + d v and (x + d u) + d v. None where there is nothing to
        gather."""
        if op == "mul" and b in self._linear:
            a, b = b, a
        if op in ("mul", "div"):
            if a not in self._linear or b in self._linear:
                return None
            if op == "div":
                return self.apply("mul", a, self.apply("div", self.constant(1), b))
            if self.nodes[a].op == "neg":
                return self.apply("mul", self.nodes[a].args[0], self.apply("neg", b))
            factors = self._factors(a)
            if factors is None:
                return None
            return self.apply("mul", factors[0], self.apply("mul", factors[1], b))
        of_b = self._factors(b)
        if of_b is None:
            return None
        whole = self.nodes[a]
        for x, rest in (
            (a, None),
            *(zip(whole.args, whole.args[::-1]) if whole.op == "add" else ()),
        ):
            of_x = self._factors(x)
            if of_x is not None and of_x[0] == of_b[0]:
                both = self.apply("mul", of_x[0], self.apply(op, of_x[1], of_b[1]))
                return both if rest is None else self.apply("add", rest, both)
        return None

    def _gates_first(self, a: int, b: int) -> tuple[int, int]:
        """Of a sum, x_gates[k] + h_gates[k] first, so that it is seen however the sum is written:
        (y + x_gates[k]) + h_gates[k] is (x_gates[k] + h_gates[k]) + y."""
        for one, whole in ((a, b), (b, a)):
            other = {"x_gates": "h_gates", "h_gates": "x_gates"}.get(self.nodes[one].op)
            partner = self._values.get(Node(other or "", number=self.nodes[one].number))
            if partner is not None and self.nodes[whole].op == "add":
                args = self.nodes[whole].args
                if partner in args:
                    rest = args[0] if args[1] == partner else args[1]
                    return self.apply("add", one, partner), rest
        return a, b

    def below(self, roots: Iterable[int], given: Iterable[int] = ()) -> list[int]:
        """The values that the roots are computed from and they themselves, without what is given,
        in order."""
        found, stack, known = set(), list(roots), set(given)
        while stack:
            value = stack.pop()
            if value not in found and value not in known:
                found.add(value)
                stack += self.nodes[value].args
        return sorted(found)

    def depending_on(self, *leaves: str) -> set[int]:
        """All values that depend on a leaf of these names."""
        found: set[int] = set()
        for value, node in enumerate(self.nodes):
            if node.op in leaves or not found.isdisjoint(node.args):
                found.add(value)
        return found


# ------------------------------------------------------------------------------ what to save

SAVE = 64  # what it costs to write a value and to read it again
COSTLY, CHEAP = 8, 1  # to compute it once more

End = str | tuple[int, str]  # "source", "sink", or a value "before" or "after" the cut
Edges = dict[End, dict[End, float]]


def cut(graph: Graph, needed: Iterable[int], available: Iterable[int]) -> list[int]:
    """The values to save, so that all `needed` can be had from them and from what is available.

    The cheapest choice, by the costs above: a minimum cut, as AOTAutograd's partitioner finds one
    (Jain et al., Checkmate, 2020, for the problem). That partitioner knows neither that the states
    are stored anyway nor that kernels store no truths.
    """
    free = set(available)
    needed = [v for v in needed if v not in free]
    gates = graph.depending_on("x_gates", "h_gates", "state_prev")
    edges: Edges = {}

    def edge(a: End, b: End, capacity: float) -> None:
        edges.setdefault(a, {})[b] = capacity
        edges.setdefault(b, {}).setdefault(a, 0)

    # A value is saved where the cut runs between its two ends, and computed again where it runs
    # before both.
    values = graph.below(needed, free)
    for v in values:
        node = graph.nodes[v]
        leaf = not node.args
        again = math.inf if leaf else COSTLY if OPERATIONS[node.op].costly else CHEAP
        can_save = v in gates and not graph.is_truth(v)
        edge("source", (v, "before"), again)
        edge((v, "before"), (v, "after"), SAVE if can_save else math.inf)
        for arg in node.args:
            if arg not in free:
                edge((arg, "after"), (v, "before"), math.inf)
    for v in needed:
        edge((v, "after"), "sink", math.inf)
    reached = _maximum_flow(edges)
    return [v for v in values if (v, "before") in reached and (v, "after") not in reached]


def _maximum_flow(edges: Edges) -> set[End]:
    """Takes the flow from source to sink off the capacities (Edmonds and Karp, 1972); what can
    then still be reached from the source."""
    while True:
        came_from: dict[End, End] = {"source": "source"}
        queue: deque[End] = deque(["source"] if edges else [])
        while queue and "sink" not in came_from:
            a = queue.popleft()
            for b, capacity in edges[a].items():
                if capacity > 0 and b not in came_from:
                    came_from[b] = a
                    queue.append(b)
        if "sink" not in came_from:
            return set(came_from)
        path = list(_path(came_from))
        flow = min(edges[a][b] for a, b in path)
        for a, b in path:
            edges[a][b] -= flow
            edges[b][a] += flow


def _path(came_from: dict[End, End]) -> Iterator[tuple[End, End]]:
    b: End = "sink"
    while b != "source":
        yield came_from[b], b
        b = came_from[b]
