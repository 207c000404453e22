"""What compiled code says of itself: text of Triton's IR, of SASS or of amdgcn -> figures.

Pure functions: no compiler, no file, no tool. A loop's figures are those of one iteration, which
is one time step or a few.
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
ASSEMBLER = re.compile(r'"[^"]*" \{[^}]*\}')  # of an operation, with its attributes
DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)(?=\s)")
VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
OPERAND = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)[a-z]+(\d+)")  # its shape, bits of an element


class Value(NamedTuple):
    argument: str = ""  # the kernel's argument that it comes from
    place: str = ""  # where its elements lie


class IrLoop(NamedTuple):
    """The time loop as Triton's last IR has it, for one block."""

    loads: list[str]  # the arguments that are read from device memory, one entry a load
    weights_in: str  # where the products of the loop find W_hh
    multiply_adds: int  # of the products
    shared_bytes: int  # of their operands that lie in shared memory: each W_hh is read once, by
    # whatever number of products
    bits: int  # of an operand's element
    sent_bytes: int  # into the shared memory of the cluster's CTAs, by each


def parse_ttgir(text: str) -> IrLoop:
    """Find the time loop (the outermost loop that holds a product) and what is in it.

    Raises ValueError where there is none.
    """
    lines = [line.split(" loc(")[0].strip() for line in text.splitlines()]
    start, end = time_loop(lines)
    found = re.search(r'"ttg.num-ctas" = (\d+)', text)
    ctas = int(found[1]) if found else 1  # of a cluster: a product has the rows of all
    values: dict[str, Value] = {}  # what is known of each name
    loads, places, read = [], set(), set()
    multiply_adds = shared_bytes = bits = sent_bytes = 0

    for number, (line, full_line) in enumerate(zip(lines, text.splitlines())):
        inside = start < number < end
        if line.startswith("tt.func"):
            for name in re.findall(r"%(\w+): ", full_line):
                values["%" + name] = Value(name.removesuffix("_ptr"))
            continue
        results, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
        names = VALUE.findall(ASSEMBLER.sub("", operation).partition(" : ")[0])
        if operation.startswith("scf.for"):  # what it carries begins as what comes in
            carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", operation.partition("iter_args")[2])
            values |= {name: values.get(initial, Value()) for name, initial in carried}
            names = [initial for _, initial in carried]
        operands = [values.get(name, Value()) for name in names]

        if LOAD.match(operation):
            argument = operands[0].argument
            operands = [Value(argument, "device memory" if inside else "registers")]
            if inside:
                loads.append(argument)
        elif DOT.match(operation):
            if inside:
                left, right = OPERAND.findall(operation.partition(" : ")[2])[:2]
                *batch, rows, depth = map(int, left[0].split("x")[:-1])
                rows //= ctas
                columns, bits = int(right[0].split("x")[-2]), int(left[1])
                depth *= math.prod(batch)  # of several products at once
                multiply_adds += rows * columns * depth
                places |= {v.place for v in operands[:2] if v.argument == WEIGHTS}
                reads_left = operands[0].place == "shared memory" and names[0] not in read
                read.add(names[0])
                in_shared = rows * reads_left + columns
                shared_bytes += in_shared * depth * bits // 8
            operands = []
        elif operands and operation.startswith(("ttg.local_alloc", "ttng.tmem_alloc")):
            where = "shared" if operation.startswith("ttg.") else "tensor"
            operands = [operands[0]._replace(place=f"{where} memory")]
        elif operands and operation.startswith(("ttg.local_load", "ttng.tmem_load")):
            if not inside:
                operands[0] = operands[0]._replace(place="registers")
        elif operands and operation.startswith("ttg.local_store"):
            if operands[0].argument == WEIGHTS:
                values[names[1]] = operands[0]._replace(place="shared memory")
        elif inside and operation.startswith("ttng.async_shared_store"):
            shape, size = OPERAND.findall(operation.partition(" : ")[2])[0]
            sent_bytes += math.prod(map(int, shape.split("x")[:-1])) // ctas * int(size) // 8
        elif operation.startswith("arith.select"):  # the first value chooses among the others
            operands = operands[1:]
        if ":" not in results:  # made of several values, W_hh perhaps not the first
            operands.sort(key=lambda value: value.argument != WEIGHTS)
        name, _, count = results.partition(":")
        for i, value in enumerate(operands[: int(count or 1)]):
            values[f"{name}#{i}" if count else name] = value

    return IrLoop(
        loads=loads,
        weights_in=" and ".join(sorted(places)) or "not found",
        multiply_adds=multiply_adds,
        shared_bytes=shared_bytes,
        bits=bits,
        sent_bytes=sent_bytes,
    )


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
