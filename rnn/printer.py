"""A graph as the source of functions: in PyTorch for every device, in Triton for the kernels."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .graph import Graph
from .operations import CALL, OPERATIONS, SIGN, number_text

LINE, LONG = 96, 72  # characters of a line; of an expression that gets one of its own


class Function(NamedTuple):
    """What is printed: a function of tuples that returns tuples of values."""

    name: str
    arguments: Sequence[str]
    results: Sequence[Sequence[int | None]]  # None: a gradient that is zero
    given: dict[int, str]  # values that are at hand, and how they are written
    like: str  # an argument that has the shape and dtype of every result
    summary: str
    first: Sequence[str] = ()  # lines before all others


class Language(NamedTuple):
    name: str  # a field of Operation
    head: str
    decorator: str
    more_arguments: str
    nothing: str  # how a gradient that is zero is written
    spread: str  # a value in the shape of {like}


TORCH = Language("torch", "import torch\n", "", "", "None", "{0} + torch.zeros_like({like})")
TRITON = Language(
    "triton",
    "import triton\nimport triton.language as tl\n",
    "@triton.jit\n",
    ", APPROXIMATE: tl.constexpr",
    "0.0",
    "tl.where({like} == {like}, {0}, {0})",
)

KERNEL_FUNCTIONS = {
    "cells": ("sigmoid", "tanh"),
    "functions": ("exp", "expm1", "log1p", "maximum", "minimum", "relu", "sign"),
}


def printed(graph: Graph, function: Function, language: Language) -> str:
    """The source of a function, a line for each value that is used more than once."""
    roots = [v for result in function.results for v in result if v is not None]
    values = graph.below(roots, function.given)
    wide = graph.depending_on("x_gates", "h_gates", "state_prev", "d_state")
    uses = Counter(arg for v in values for arg in graph.nodes[v].args) + Counter(roots)
    names, lines = dict(function.given), list(function.first)
    texts: dict[int, tuple[str, int]] = {}  # and how tightly each binds

    def text(value: int, level: int) -> str:
        if value in names:
            return names[value]
        written, binds = texts[value]
        return f"({written})" if binds < level else written

    for v in values:
        node = graph.nodes[v]
        if node.op == "constant":
            texts[v] = number_text(node.number), SIGN if node.number < 0 else CALL
            continue
        operation = OPERATIONS[node.op]
        template, level = getattr(operation, language.name), operation.level
        if template.startswith("{0}."):
            bounds = [CALL]
        else:
            bounds = [0 if level == CALL else level + k for k in range(len(node.args))]
        args = [text(a, bound) for a, bound in zip(node.args, bounds)]
        constant = [k for k, a in enumerate(node.args) if graph.number(a) is not None]
        if language is TORCH and (operation.tensors or (node.op, constant) == ("where", [1, 2])):
            for k in constant:
                args[k] = f"torch.full_like({function.like}, {args[k]})"
        written = template.format(*args, like=function.like)
        texts[v] = written, level
        if uses[v] > 1 or len(written) > LONG:
            lines.append(f"{graph.name(v)} = {written}")
            names[v] = graph.name(v)

    def result(value: int | None) -> str:
        if value is None:
            return language.nothing
        written = text(value, 0)
        if value not in wide:
            return language.spread.format(text(value, SIGN), like=function.like)
        return written

    results = [tuple_text(map(result, each)) for each in function.results]
    line = f"return {', '.join(results)}"
    if len(line) > LINE:
        each = results if len(results) > 1 else list(map(result, function.results[0]))
        line = "\n".join(["return (", *(f"    {item}," for item in each), ")"])
    lines.append(line)
    arguments = ", ".join(function.arguments) + language.more_arguments
    body = textwrap.indent("\n".join([f'"""{function.summary}"""', *lines]), "    ")
    return f"{language.decorator}def {function.name}({arguments}):\n{body}\n"


def module_text(graph: Graph, language: Language, *functions: Function) -> str:
    """The source of a module with these functions."""
    texts = [printed(graph, f, language) for f in functions]
    called = set(re.findall(r"(?<![.\w])[a-z]\w*(?=\()", "".join(texts)))
    lines = [
        f"from rnn.kernels.{file} import {', '.join(names)}\n"
        for file, file_names in KERNEL_FUNCTIONS.items()
        if (names := [name for name in file_names if name in called and language is TRITON])
    ]
    return "\n\n".join([language.head + "".join(["\n"] * bool(lines) + lines), *texts])


def tuple_text(items: Iterable[str]) -> str:
    texts = list(items)
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
