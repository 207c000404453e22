"""What compiled code says of itself: text of Triton's IR, of SASS or of amdgcn -> figures.

Pure functions: no compiler, no file, no tool. A loop's figures are those of one iteration, which
is one time step or a few.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

WEIGHTS = "weight_hh"

# ------------------------------------------------------------------------- Triton's IR (ttgir)

LOAD = re.compile(
    r"(tt\.(load|gather|descriptor_load|descriptor_gather|atomic_\w+)"
    r"|amd\w*\.buffer_(load|atomic)\w*|ttn?g\.async_(tma_)?copy_global_to_local)\b"
    r"|tt\.elementwise_inline_asm \"[^\"]*\bld\.global\b"
)
DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)(?=\s)")
STORE = re.compile(  # of the first operand into the second, a buffer
    r"(ttg\.(local_store|async_copy_global_to_local)|ttng\.(tmem_store|async_shared_store))\b"
)
BUFFERS = {"ttg.local_alloc": "shared memory", "ttng.tmem_alloc": "tensor memory"}
TO_REGISTERS = ("ttg.local_load", "ttng.tmem_load")
VALUE = re.compile(r"(%[\w.$-]+)(#\d+)?")
ASSEMBLER = re.compile(r'"[^"]*" \{[^}]*\}')  # of an operation, with its attributes
OPERAND = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)[a-z]+(\d+)")  # its shape, bits of an element


@dataclass(eq=False)
class Node:
    """An operation, one of the values that a loop carries, or an argument of the kernel."""

    operation: str
    line: int
    sources: list["Node"] = field(default_factory=list)  # what it is made of
    arguments: set[str] = field(default_factory=set)  # of the kernel, that it points into


class IrLoop(NamedTuple):
    """The time loop as Triton's last IR has it, for one block."""

    loads: list[str]  # the arguments that are read from device memory, one entry a load
    weights_in: str  # where the products of the loop find W_hh
    sent_bytes: int  # into the shared memory of the cluster's CTAs, by each


def parse_ttgir(text: str) -> IrLoop:
    """Find the time loop and what is in it. Raises ValueError where there is none."""
    nodes, loops = graph(text)
    dots = [node.line for node in nodes if DOT.match(node.operation)]
    loops = [(start, end) for start, end in loops if any(start < dot < end for dot in dots)]
    if not loops:
        raise ValueError("no loop with a matrix product in the ttgir")
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    found = re.search(r'"ttg.num-ctas" = (\d+)', text)
    ctas = int(found[1]) if found else 1  # of a cluster: a shape is that of all
    loads: list[str] = []
    places: set[str] = set()
    sent_bytes = 0
    for node in nodes:
        if not start < node.line < end:
            continue
        if LOAD.match(node.operation):
            loads.append("/".join(sorted(node.sources[0].arguments)))
        elif DOT.match(node.operation):
            for operand in node.sources[:2]:
                places.update(places_of_weights(operand, start, end))
        elif node.operation.startswith("ttng.async_shared_store"):
            shape, size = OPERAND.findall(node.operation.partition(" : ")[2])[0]
            sent_bytes += math.prod(map(int, shape.split("x")[:-1])) // ctas * int(size) // 8
    return IrLoop(loads, " and ".join(sorted(places)) or "not found", sent_bytes)


class Region(NamedTuple):
    line: int  # where it begins
    is_loop: bool
    targets: list[list[Node]]  # what a yield gives a value to


def graph(text: str) -> tuple[list[Node], list[tuple[int, int]]]:
    """All operations in their order, each with what it is made of, and the lines of the outermost
    loops. A buffer is made of all that is stored into it, and what a loop or a branch hands out of
    all that it may be."""
    known: dict[str, Node] = {}
    operations: list[Node] = []
    loops: list[tuple[int, int]] = []
    regions: list[Region] = []  # that are open
    for number, full_line in enumerate(text.splitlines()):
        line = full_line.split(" loc(")[0].strip()
        if line.startswith("tt.func"):
            for name in re.findall(r"(%[\w.]+): !tt\.ptr", full_line):
                argument = re.sub(r"_ptrs?([._]\d+)?$", "", name[1:])
                known[name] = Node("argument", number, arguments={argument})
        results, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
        called = ASSEMBLER.sub("", operation).partition(" : ")[0]
        carried = []
        if operation.startswith("scf."):
            carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", called.partition("(")[2])
        names = [initial for _, initial in carried] or ["".join(v) for v in VALUE.findall(called)]
        node = Node(operation, number, [known.get(n) or Node("?", number) for n in names])
        operations.append(node)
        if not LOAD.match(operation):
            node.arguments.update(*(source.arguments for source in node.sources))
        given = [
            f"{name}#{i}" if count else name
            for name, count in re.findall(r"(%[\w.$-]+)(?::(\d+))?", results)
            for i in range(int(count or 1))
        ]
        if operation.startswith("scf.yield"):
            for source, targets in zip(node.sources, zip(*regions[-1].targets)):
                for target in targets:
                    target.sources.append(source)
                    target.arguments |= source.arguments
        known |= dict.fromkeys(given, node)
        if operation.startswith("}"):
            ended = regions.pop()
            if ended.is_loop and not any(region.is_loop for region in regions):
                loops.append((ended.line, number))
        if full_line.endswith("{"):
            opened = [
                [Node("carried", number, [s], set(s.arguments)) for s in node.sources] for _ in "ab"
            ]
            if not carried:  # a branch, which hands out what it yields
                opened = [[Node("branch", number) for _ in given]]
            if operation.startswith("}"):  # else
                opened = ended.targets
            elif operation.startswith("scf."):
                known |= dict(zip(given, opened[0]))
                known |= dict(zip((name for name, _ in carried), opened[-1]))
            is_loop = operation.startswith(("scf.for", "scf.while", "} do"))
            regions.append(Region(number, is_loop, opened))
        if STORE.match(operation):
            buffer = node.sources[1]
            while not buffer.operation.startswith(tuple(BUFFERS)):  # it is seen through views
                buffer = buffer.sources[0]
            buffer.sources.append(node)
    return operations, loops


def places_of_weights(operand: Node, start: int, end: int) -> Iterator[str]:
    """Where a product within these lines finds W_hh: from its operand back to the loads."""
    seen: set[tuple[Node, str]] = set()
    todo = [(operand, "")]
    while todo:
        node, place = todo.pop()
        if (node, place) in seen or DOT.match(node.operation):  # made of W_hh, but not W_hh
            continue
        seen.add((node, place))
        inside = start < node.line < end
        name = node.operation.partition(" ")[0]
        if LOAD.match(node.operation):
            if WEIGHTS in node.sources[0].arguments:
                yield "device memory" if inside else place or "registers"
            continue
        if name in BUFFERS:
            place = place or BUFFERS[name]
        elif name in TO_REGISTERS and not inside:
            place = place or "registers"
        todo += [(source, place) for source in node.sources]


# ------------------------------------------------------------------------------ machine code


class Instruction(NamedTuple):
    name: str  # with its modifiers
    target: str  # the label that it may branch to, or ""
    falls_through: bool


class CodeLoop(NamedTuple):
    """The time loop as the machine has it, for one warp (AMD: wave)."""

    instructions: int
    matrix: int  # matrix instructions
    barriers: int
    spills: int  # loads and stores of spilled registers


SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*)")
AMDGCN = re.compile(r"\s+()((?:[sv]|ds|buffer|global|flat|scratch)_\w+)\s*(\S*)")
MATRIX = re.compile(r"[A-Z]*MMA\b|v_mfma|v_smfmac|v_wmma")
BARRIER = re.compile(r"BAR\.|s_barrier")
SPILL = re.compile(r"(LDL|STL)\b|scratch_")


def parse_code(text: str) -> CodeLoop:
    """The time loop in SASS (`nvdisasm -c`) or in amdgcn."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := SASS.match(line) or AMDGCN.match(line):
            predicate, name, operands = found.groups()
            target = re.search(r"\.L\w+", operands)
            # BRA `(L) always jumps; with an operand before the label it asks that first.
            always = re.match(r"BRA `|EXIT|RET|s_branch|s_endpgm", f"{name} {operands}")
            code.append(
                Instruction(name, target[0] if target else "", bool(predicate or not always))
            )
    names = [code[i].name for i in code_loop(code, labels)]
    kinds = (MATRIX, BARRIER, SPILL)
    return CodeLoop(len(names), *(sum(bool(kind.match(name)) for name in names) for kind in kinds))


def code_loop(code: list[Instruction], labels: dict[str, int]) -> set[int]:
    """The instructions of the time loop: a matrix instruction, and all from which control comes
    back to it. Of several loops, the longest. Raises ValueError where there is none.

    Not the span of a backward branch: a wait loop moved behind the end of the kernel jumps
    backwards too, over instructions that it does not repeat.
    """
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        targets = [labels[instruction.target]] if instruction.target in labels else []
        for j in targets + [i + 1] * instruction.falls_through:
            if j < len(code):
                after[i].append(j)
                before[j].append(i)

    def reached(first: int, steps: list[list[int]]) -> set[int]:
        seen: set[int] = set()
        todo = [first]
        while todo:
            new = set(steps[todo.pop()]) - seen
            seen |= new
            todo += new
        return seen

    loops: list[set[int]] = []
    for i, instruction in enumerate(code):
        if MATRIX.match(instruction.name) and not any(i in loop for loop in loops):
            loops.append(reached(i, after) & reached(i, before))
    if not any(loops):
        raise ValueError("no loop with a matrix instruction in the machine code")
    return max(loops, key=len)


# ------------------------------------------------------------------------- registers, spills


def parse_resources(text: str) -> tuple[int, int]:
    """Registers and bytes of spilled registers of a thread, from `cuobjdump -res-usage` or from
    the metadata of amdgcn. The kernels have no arrays: local memory holds nothing but spills."""
    registers = re.search(r"REG:(\d+)|\.vgpr_count:\s*(\d+)", text)
    local = re.findall(r"(?:STACK:|LOCAL:|\.private_segment_fixed_size:\s*)(\d+)", text)
    if registers is None or not local:
        raise ValueError("no use of registers and local memory in the compiler's output")
    return int(registers[1] or registers[2]), sum(map(int, local))
