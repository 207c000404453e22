"""What compiled code says of itself: text of Triton's IR, of SASS or of amdgcn -> figures.

Pure functions: no compiler, no file, no tool. Every figure of a loop is per time step.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

WEIGHTS = "weight_hh"

# ------------------------------------------------------------------------- Triton's IR (ttgir)

LOAD = re.compile(
    r"\b(tt\.(load|gather|descriptor_load|descriptor_gather|atomic_\w+)"
    r"|amd\w*\.buffer_(load|atomic)\w*|ttn?g\.async_(tma_)?copy_global_to_local)\b"
)
STORE = re.compile(r"\b(tt\.(store|descriptor_store)|amd\w*\.buffer_store)\b")
DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)(?=\s)")
VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
TENSOR = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?([a-z]+)(\d+)")
OPERAND = re.compile(r"(?:tensor|memdesc)<(\d+)x(\d+)x([a-z]+)(\d+)")
TCGEN05_ROWS = 128  # of one instruction


class IrLoop(NamedTuple):
    """The time loop as Triton's last IR has it, for one block."""

    loads: list[str]  # the arguments that are read from device memory, one entry a load
    weight_loads: int  # of W_hh, before the loop
    weights_in: str  # where the products of the loop find W_hh
    load_bytes: float
    store_bytes: float
    multiply_adds: float
    operand: str  # element type of the products: "f32", "bf16" or "f16"
    tcgen05_bytes: float  # that tcgen05 reads from shared memory: its SASS has no shapes
    steps: int  # time steps of one iteration


class _Value(NamedTuple):
    argument: str  # the function's argument that it comes from
    place: str  # where its elements lie


def parse_ttgir(text: str) -> IrLoop:
    """Find the time loop (the outermost loop that holds a product) and what is in it.

    Raises ValueError where there is none.
    """
    lines = [line.split(" loc(")[0] for line in text.splitlines()]
    start, end = _time_loop(lines)
    values: dict[str, _Value] = {}
    constants: dict[str, int] = {}
    nowhere = _Value("", "")
    loads, weight_loads, places = [], 0, set()
    load_bytes = store_bytes = tcgen05_bytes = multiply_adds = 0
    operand, steps = "", 1

    for number, line in enumerate(lines):
        inside = start < number < end
        if "tt.func" in line:
            for name in re.findall(r"%(\w+): ", text.splitlines()[number]):
                values["%" + name] = _Value(name.removesuffix("_ptr"), "")
            continue
        results, _, operation = line.partition(" = ")
        if not results.strip().startswith("%"):
            results, operation = "", line
        if constant := re.match(r"arith\.constant (-?\d+) : i\d+", operation):
            constants[results.strip()] = int(constant[1])
        if "scf.for" in operation:
            pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", operation.partition("iter_args")[2])
            for name, initial in pairs:
                values[name] = values.get(initial, nowhere)
            operands = [initial for _, initial in pairs]
            if number == start and (step := re.search(r"step (%[\w.$-]+)", operation)):
                steps = constants.get(step[1], 1)
        else:
            operands = VALUE.findall(operation.partition(" : ")[0])

        found = [values.get(name, nowhere) for name in operands]
        if LOAD.search(operation):
            argument = found[0].argument
            found = [_Value(argument, "device memory" if inside else "registers")]
            if inside:
                loads.append(argument)
                load_bytes += _bytes(operation)
            else:
                weight_loads += argument == WEIGHTS
        elif STORE.search(operation) and inside:
            store_bytes += _bytes(operation)
        elif dot := DOT.search(operation):
            a, b = OPERAND.findall(operation.partition(" : ")[2])[:2]
            rows, depth, columns, size = int(a[0]), int(a[1]), int(b[1]), int(a[3]) // 8
            if inside:
                operand = a[2] + a[3]
                multiply_adds += rows * columns * depth
                places |= {v.place for v in found[:2] if v.argument == WEIGHTS}
                if dot[1] == "ttng.tc_gen5_mma":  # the left operand once, the right for each tile
                    left = rows if found[0].place == "shared memory" else 0
                    right = columns * -(-rows // TCGEN05_ROWS)
                    tcgen05_bytes += (left + right) * depth * size
            found = [nowhere]
        elif found:
            moved = {"ttg.local_alloc": "shared memory", "ttng.tmem_alloc": "tensor memory"}
            if place := moved.get(operation.split()[0]):
                found[0] = found[0]._replace(place=place)
            elif re.match(r"ttg\.local_load|ttng\.tmem_load", operation) and not inside:
                found[0] = found[0]._replace(place="registers")
            elif ":" not in results:  # computed from several, W_hh perhaps not the first
                found = [next((v for v in found if v.argument == WEIGHTS), found[0])]
        name, _, count = results.strip().partition(":")
        for i, value in enumerate(found[: int(count or 1)] if name else []):
            values[f"{name}#{i}" if count else name] = value

    return IrLoop(
        loads=loads,
        weight_loads=weight_loads,
        weights_in=" and ".join(sorted(places)) or "not found",
        load_bytes=load_bytes / steps,
        store_bytes=store_bytes / steps,
        multiply_adds=multiply_adds / steps,
        operand=operand,
        tcgen05_bytes=tcgen05_bytes / steps,
        steps=steps,
    )


def _time_loop(lines: list[str]) -> tuple[int, int]:
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


def _bytes(operation: str) -> int:
    """Bytes of the tensor that a load or store moves; 0 for a scalar."""
    tensors = TENSOR.findall(operation)
    if not tensors:
        return 0
    shape, _, bits = tensors[-1]
    size = int(bits) // 8
    for extent in shape.split("x")[:-1]:
        size *= int(extent)
    return size


# ------------------------------------------------------------------------------ machine code


class Instruction(NamedTuple):
    name: str  # with its modifiers
    operands: str
    target: str  # the label that it may branch to, or ""
    falls_through: bool


class CodeLoop(NamedTuple):
    """The time loop as the machine has it, for one warp (AMD: wave)."""

    instructions: float
    issued: float  # those that take an issue slot of chips.Chip.issue_rate
    barriers: float
    spills: float  # loads and stores of spilled registers
    matrix: dict[str, float]  # matrix instructions by name
    multiply_adds: float  # of them; 0 for tcgen05
    shared_bytes: float  # from and to shared memory: loads, stores and operands of wgmma


MATRIX = re.compile(r"[A-Z]*MMA\b|v_mfma|v_smfmac|v_wmma")
SPILL = re.compile(r"(LDL|STL)\b|scratch_")


def parse_sass(text: str, steps: int = 1) -> CodeLoop:
    """The time loop, of so many steps an iteration, in the output of `nvdisasm -c`."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*)", line)
        if found:
            predicate, name, operands = found.groups()
            target = re.search(r"\(([.\w$]+)\)", operands) if "`(" in operands else None
            # BRA `(L) always jumps; with an operand before the label it asks that first.
            always = not predicate and (
                re.match(r"(EXIT|RET)\b", name) or (name == "BRA" and operands.startswith("`("))
            )
            code.append(Instruction(name, operands, target[1] if target else "", not always))
    return _figures(code, labels, steps, r"BAR\.", "", _sass_work)


def parse_amdgcn(text: str, steps: int = 1) -> CodeLoop:
    """The time loop, of so many steps an iteration, in amdgcn assembly."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(code)
        found = re.match(r"\s+((?:[sv]|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)", line)
        if found:
            name, operands = found.groups()
            target = operands.strip() if "branch" in name else ""
            always = name in ("s_branch", "s_endpgm")
            code.append(Instruction(name, operands, target, not always))
    return _figures(code, labels, steps, "s_barrier", "v_", _amdgcn_work)


def _figures(
    code: list[Instruction],
    labels: dict[str, int],
    steps: int,
    barrier: str,
    issued: str,
    work: Callable[[Instruction], tuple[float, float]],  # multiply-adds, bytes of shared memory
) -> CodeLoop:
    loop = [code[i] for i in _code_loop(code, labels)]
    matrix = Counter(i.name for i in loop if MATRIX.match(i.name))
    return CodeLoop(
        instructions=len(loop) / steps,
        issued=sum(i.name.startswith(issued) for i in loop) / steps,
        barriers=sum(bool(re.match(barrier, i.name)) for i in loop) / steps,
        spills=sum(bool(SPILL.match(i.name)) for i in loop) / steps,
        matrix={name: count / steps for name, count in matrix.items()},
        multiply_adds=sum(work(i)[0] for i in loop) / steps,
        shared_bytes=sum(work(i)[1] for i in loop) / steps,
    )


def _code_loop(code: list[Instruction], labels: dict[str, int]) -> list[int]:
    """The instructions of the time loop: those from which control comes back to them.

    Not the span of a backward branch: a wait loop moved behind the end of the kernel jumps
    backwards too, over instructions that it does not repeat. Of several loops the time loop is
    the one with the most matrix instructions. Raises ValueError where nothing is repeated.
    """
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        targets = [labels[instruction.target]] if instruction.target in labels else []
        if instruction.falls_through:
            targets.append(i + 1)
        for j in targets:
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

    loops: list[list[int]] = []
    for i in range(len(code)):
        backwards = any(j <= i for j in after[i])
        if backwards and not any(i in loop for loop in loops):
            loops.append(sorted(reached(i, after) & reached(i, before)))
    matrix = [sum(bool(MATRIX.match(code[i].name)) for i in loop) for loop in loops]
    if not any(loops):
        raise ValueError("no loop in the machine code")
    return max(zip(matrix, map(len, loops), loops))[2]


def _sass_work(instruction: Instruction) -> tuple[float, float]:
    """Multiply-adds, and bytes from or to shared memory, of one warp's instruction."""
    base, *modifiers = instruction.name.split(".")
    if base == "HMMA":  # m, n and k run together
        return {"16816": 2048, "1688": 1024, "1684": 512}.get(modifiers[0], 0), 0
    if base == "HGMMA":  # a quarter of what its four warps do together
        rows, columns, depth = map(int, modifiers[0].split("x"))
        size = 4 if "TF32" in modifiers else 2
        left = rows if re.match(r"R\d+, gdesc", instruction.operands) else 0  # or from registers
        return rows * columns * depth / 4, (left + columns) * depth * size / 4
    if base in ("LDSM", "STSM"):  # so many matrices of 8 rows of 16 bytes
        return 0, 128 * int(modifiers[-1] if modifiers[-1] in ("2", "4") else 1)
    if base in ("LDS", "STS", "LDGSTS", "ATOMS"):
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return 0, 32 * next((widths[m] for m in modifiers if m in widths), 4)
    return 0, 0


def _amdgcn_work(instruction: Instruction) -> tuple[float, float]:
    """Multiply-adds, and bytes from or to the LDS, of one wave's instruction."""
    if shape := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", instruction.name):
        return int(shape[1]) * int(shape[2]) * int(shape[3]), 0
    if access := re.match(r"ds_(?:read|write|load|store)(2?)\w*?_[bui](\d+)", instruction.name):
        return 0, 64 * int(access[2]) // 8 * (2 if access[1] else 1)
    return 0, 0


# ------------------------------------------------------------------------- registers, spills


def parse_resources(text: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of a thread's local memory, from `cuobjdump -res-usage`.

    The kernels have no arrays of their own: local memory has no other use than spilled registers.
    """
    registers = re.search(r"REG:(\d+)", text)
    if registers is None:
        raise ValueError("no REG: in the output of cuobjdump")
    return int(registers[1]), sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def parse_amdgcn_resources(text: str) -> tuple[int, int]:
    """Vector registers of a lane, and bytes of its scratch memory, from the metadata."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    if registers is None or scratch is None:
        raise ValueError("no .vgpr_count or .private_segment_fixed_size in the amdgcn text")
    return int(registers[1]), int(scratch[1])
