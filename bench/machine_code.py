"""What compiled code says of itself: text of Triton's IR, of SASS or of amdgcn -> figures.

Pure functions: no compiler, no file, no tool. A loop's figures are those of one
iteration, which is one time step.
"""

import math
import re
from typing import NamedTuple

WEIGHTS = "weight_hh"

# ------------------------------------------------------------------------- Triton's IR (ttgir)

LOAD = re.compile(
    r"(tt\.(load|gather|descriptor_load|descriptor_gather|atomic_\w+)"
    r"|amd\w*\.buffer_(load|atomic)\w*|ttn?g\.async_(tma_)?copy_global_to_local)\b"
    r"|tt\.elementwise_inline_asm \"[^\"]*\bld\.global\b"
)
DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)(?=\s)")
VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
OPERAND = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)[a-z]+(\d+)")  # its shape, bits of an element


class Made(NamedTuple):
    """How a value was made: by which operation, of which values, and whether in the time loop."""

    operation: str
    operands: list[str]
    inside: bool


class IrLoop(NamedTuple):
    """The time loop as Triton's last IR has it, for one block."""

    loads: list[str]  # the arguments that are read from device memory, one entry a load
    weights_in: str  # where the products of the loop find W_hh, their left operand
    multiply_adds: int  # of the products
    shared_bytes: int  # of their operands that lie in shared memory, each tile of W_hh read once
    bits: int  # of an operand's element


def parse_ttgir(text: str) -> IrLoop:
    """Find the time loop (the outermost loop that holds a product) and what is in it.

    Raises ValueError where there is none.
    """
    lines = [line.split(" loc(")[0].strip() for line in text.splitlines()]
    start, end = time_loop(lines)
    made: dict[str, Made] = {}
    loads: list[str] = []
    places: dict[str, str] = {}  # of the tiles of W_hh
    multiply_adds = shared_bytes = bits = 0

    for number, line in enumerate(lines[:end]):
        results, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
        operands = VALUE.findall(operation)
        if operation.startswith("scf.for"):  # what it carries begins as what comes in
            carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", operation.partition("iter_args")[2])
            made |= {name: Made("carried", [initial], False) for name, initial in carried}
            operands = [initial for _, initial in carried]
        elif operation.startswith("arith.select"):  # the first value chooses among the others
            operands = operands[1:]
        name, _, count = results.partition(":")
        for i in range(int(count or 1)):
            one = f"{name}#{i}" if count else name
            made[one] = Made(operation, operands[i:], number > start)

        if number > start and LOAD.match(operation):
            loads.append(history(operands[0], made)[1])
        elif number > start and DOT.match(operation):
            left, right = OPERAND.findall(operation.partition(" : ")[2])[:2]
            *batch, rows, depth = map(int, left[0].split("x")[:-1])
            columns, bits = int(right[0].split("x")[-2]), int(left[1])
            depth *= math.prod(batch)  # of several products at once
            multiply_adds += rows * columns * depth
            if operands[0] not in places:
                places[operands[0]] = place(operands[0], made)
                reads = places[operands[0]] == "shared memory"
                shared_bytes += reads * rows * depth * bits // 8
            shared_bytes += columns * depth * bits // 8

    weights_in = " and ".join(sorted(set(places.values())))
    return IrLoop(loads, weights_in, multiply_adds, shared_bytes, bits)


def history(name: str, made: dict[str, Made]) -> tuple[list[Made], str]:
    """How a value came about, the last operation first, and the argument that it began as."""
    steps: list[Made] = []
    while name in made:
        steps.append(made[name])
        if not made[name].operands:
            break
        name = made[name].operands[0]
    return steps, name.removeprefix("%").removesuffix("_ptr")


def place(name: str, made: dict[str, Made]) -> str:
    """Where the left operand of a product lies when the loop begins, or from where it comes."""
    for operation, _, inside in history(name, made)[0]:
        if operation.startswith("ttg.local_alloc"):
            return "shared memory"
        if operation.startswith("ttng.tmem_alloc"):
            return "tensor memory"
        if operation.startswith(("ttg.local_load", "ttng.tmem_load")) and not inside:
            return "registers"
        if LOAD.match(operation):
            return "device memory" if inside else "registers"
    return "no place that is known"


def time_loop(lines: list[str]) -> tuple[int, int]:
    """First and last line of the longest outermost loop that holds a product."""
    loops, depth, start, floor = [], 0, None, 0
    for number, line in enumerate(lines):
        if start is None and re.search(r"\bscf\.(for|while)\b", line):
            start, floor = number, depth
        depth += line.count("{") - line.count("}")
        if start is not None and depth == floor and number > start:
            if any(DOT.search(inner) for inner in lines[start:number]):
                loops.append((start, number))
            start = None
    if not loops:
        raise ValueError("no loop with a matrix product in the ttgir")
    return max(loops, key=lambda loop: loop[1] - loop[0])


# ------------------------------------------------------------------------------ machine code


class Instruction(NamedTuple):
    name: str  # with its modifiers
    target: str  # the label that it may branch to, or ""
    falls_through: bool


class CodeLoop(NamedTuple):
    """The time loop as the machine has it, for one warp (AMD: wave)."""

    instructions: int
    issued: int  # those that take an issue slot of chips.Chip.issue_rate
    matrix: int  # matrix instructions
    barriers: int
    spills: int  # loads and stores of spilled registers


SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*)")
AMDGCN = re.compile(r"\s+()((?:[sv]|ds|buffer|global|flat|scratch)_\w+)\s*(\S*)")
ISSUED = re.compile(r"[A-Z]|v_")
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
    kinds = (re.compile(""), ISSUED, MATRIX, BARRIER, SPILL)
    return CodeLoop(*(sum(bool(kind.match(name)) for name in names) for kind in kinds))


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
