"""The compiled kernels, examined without a GPU: python -m bench.compiled

For each cell, dtype and hidden size this takes the plan that the library itself takes on a chip,
has the library's own launchers compile what both passes would launch there, and reads the machine
code. bench/README.md says how to read the table.

A kernel is resident if W_hh is read from device memory before the time loop and nowhere else, into
registers or shared memory, and no register is spilled. Exit status: 1 if one is not.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from rnn import layer_norm
from rnn.cells import CELLS, Cell
from rnn.kernels.chips import CHIPS
from rnn.kernels.hopper_plan import HopperPlan
from rnn.kernels.layout import Inputs
from rnn.kernels.limits import Layer, NoPlan, Plan
from rnn.kernels.plan import PortablePlan, plan
from rnn.modules import MODULES, NAMES, cell_named

from .cases import DTYPES
from .machine_code import WEIGHTS, CodeLoop, parse_code, parse_resources, parse_ttgir
from .report import table

NORMED = tuple(cell.name for cell in layer_norm.NORMED.values())
LENGTHS = ("equal", "padded", "packed")
ON_CHIP = {"registers", "shared memory", "tensor memory"}

Row = dict[str, Any]  # a line of the table, by column


def find_cell(name: str) -> Cell:
    if name in NORMED:
        layer_norm.register()
        return CELLS[name]
    return cell_named(name)


class Job(NamedTuple):
    """Both passes of one layer on one chip."""

    target: str
    cell: str
    H: int
    dtype: str  # a key of DTYPES
    lengths: str = "equal"  # one of LENGTHS
    batch: int = 16

    def plan(self) -> Plan | NoPlan:
        cell = find_cell(self.cell)
        numbers = cell.gates, cell.states, cell.stored, len(cell.params)
        dtype, tf32, _ = DTYPES[self.dtype]
        sizes, packed = (self.H, self.batch, 1), self.lengths == "packed"
        layer = Layer(*numbers, *sizes, dtype, tf32, packed, across=cell.across)
        return plan(layer, CHIPS[self.target].limits())


# ------------------------------------------------------------------------------- compilation


def absent_device(target: str) -> Any:
    """As much of a Triton driver as compiling asks for."""
    from triton.backends.compiler import GPUTarget

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return SimpleNamespace(
        get_current_device=lambda: target,  # the key of a kernel's cache: targets share none
        get_current_stream=lambda device: 0,
        get_current_target=lambda: gpu,
    )


def compile_launches(target: str, call: Callable, *args: Any) -> dict[str, Any]:
    """Compile each kernel that `call` would launch on the target, and launch none. Returns the
    compiled kernel, or the exception that the compiler raised, by kernel name."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            result: Any = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # the compiler's: any of many types
            result = error
        compiled[kernel.fn.__name__] = result

    driver.set_active(absent_device(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        call(*args)
    return compiled


def training_step(job: Job, planned: Plan, T: int = 2) -> None:
    """Launch what the library launches for one layer, forward and backward, with all gradients."""
    from rnn.kernels import launch

    cell, B, H = find_cell(job.cell), job.batch, job.H
    dtype = DTYPES[job.dtype].torch
    steps = (T * B,) if job.lengths == "packed" else (T, B)
    inputs = Inputs(
        torch.zeros(*steps, cell.gates * H, dtype=dtype),
        tuple(torch.zeros(1, B, H, dtype=dtype) for _ in range(cell.states)),
        torch.zeros(1, cell.gates * H, H, dtype=dtype),
        tuple(torch.zeros(1, H, dtype=dtype) for _ in cell.params),
        None if job.lengths == "equal" else torch.full((B,), T),
        torch.arange(0, T * B, B) if job.lengths == "packed" else None,
    )
    output, state_n, stored = launch.forward(planned, cell, inputs, save=True)
    d_state_n = tuple(torch.zeros_like(state) for state in state_n)
    given = output, stored, torch.zeros_like(output), d_state_n
    needed = True, True, True
    launch.backward(planned, cell, inputs, *given, *needed)


# ----------------------------------------------------------------------------------- figures


def run_tool(name: str, option: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools that lie in Triton's package, beside ptxas."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_code(compiled: Any) -> tuple[CodeLoop, tuple[int, int]]:
    """The time loop; registers and spilled bytes of a thread."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        return parse_code(assembly), parse_resources(assembly)
    cubin = compiled.asm["cubin"]
    sass, usage = run_tool("nvdisasm", "-c", cubin), run_tool("cuobjdump", "-res-usage", cubin)
    return parse_code(sass), parse_resources(usage)


def judge(row: Row, sram_limit: int) -> str:
    """ "resident", or the reason why not."""
    if row["loads"][WEIGHTS]:
        return "W_hh is read from device memory in the loop"
    if not set(row["W_hh_in"].split(" and ")) <= ON_CHIP:
        return f"W_hh is in {row['W_hh_in']}"
    if row["SRAM_B"] > sram_limit:
        return f"needs {row['SRAM_B']} of {sram_limit} bytes of SRAM"
    if row["spill_B"]:
        return f"spills; accesses a step: {row['spill_instr']}"
    return "resident"


def shape_of(planned: Plan, kernel: str) -> tuple[int, int, int]:
    """Blocks that share one W_hh, hidden units of each, time steps of an iteration."""
    if isinstance(planned, HopperPlan):
        how = planned.forward if kernel == "forward" else planned.backward
        return how.ctas, how.block_s, how.ahead
    assert isinstance(planned, PortablePlan)
    steps = planned.steps if kernel == "forward" else planned.steps_backward
    return planned.slices, planned.block_s, steps


def figures(target: str, planned: Plan, kernel: str, compiled: Any) -> Row:
    blocks, units, steps = shape_of(planned, kernel)
    ir = parse_ttgir(compiled.asm["ttgir"])
    code, (registers, spilled) = read_code(compiled)

    def per_step(number: int) -> int:  # rounded up: a read of W_hh that several share is one still
        return -(-number // steps)

    row = {
        "engine": "Hopper" if isinstance(planned, HopperPlan) else "portable",
        "blocks": blocks,
        "steps": steps,
        "tile": f"{units}x{planned.block_b}",
        "warps": compiled.metadata.num_warps,
        "regs": registers,
        "spill_B": spilled,
        "SRAM_B": compiled.metadata.shared,
        "W_hh_in": ir.weights_in,
        "loads": Counter({name: per_step(n) for name, n in Counter(ir.loads).items()}),
        "instr": per_step(code.instructions),
        "mma": per_step(code.matrix),
        "bar": per_step(code.barriers),
        "sent_B": per_step(ir.sent_bytes),
        "spill_instr": per_step(code.spills),
    }
    return row | {"verdict": judge(row, CHIPS[target].sram)}


def rows_of(job: Job) -> list[Row]:
    """One row for each kernel."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # nothing to do here
    torch.set_num_threads(1)
    head = {"kernel": "both", **job._asdict()}
    planned = job.plan()
    if isinstance(planned, NoPlan):
        return [head | {"verdict": f"torch: {planned.why}"}]
    rows = []
    for name, kernel in compile_launches(job.target, training_step, job, planned).items():
        row = head | {"kernel": name.removesuffix("_kernel")}
        if isinstance(kernel, Exception):
            reason = f"{type(kernel).__name__}: {kernel}".splitlines()[0]
            row["verdict"] = f"this Triton cannot compile it: {reason}"
        else:
            row |= figures(job.target, planned, row["kernel"], kernel)
        rows.append(row)
    return rows


def rows_of_all(jobs: list[Job]) -> list[Row]:
    """rows_of each job, side by side. Shows on stderr how far it has come."""
    rows: list[Row] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for i, some in enumerate(pool.map(rows_of, jobs), 1):
            rows += some
            print(f"\r{i} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


# ------------------------------------------------------------------------------------ output

COLUMNS = (
    "cell kernel dtype H lengths engine blocks steps tile warps regs spill_B SRAM_B W_hh_in loads "
    "instr mma bar sent_B verdict"
).split()


def text(figure: Any) -> str:
    if isinstance(figure, Counter):
        return ", ".join(f"{n} {name}" if n > 1 else name for name, n in figure.items())
    return str(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def choose(name: str, choices: Any, default: list) -> None:
        parser.add_argument(name, nargs="+", choices=choices, default=default)

    choose("--target", list(CHIPS), ["sm_80", "sm_90", "sm_100", "gfx942"])
    choose("--cell", [*NAMES, *NORMED], list(MODULES))
    choose("--dtype", ["bfloat16", "float16", "tf32", "float32"], ["bfloat16", "tf32", "float32"])
    choose("--lengths", LENGTHS, ["equal"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256], metavar="H")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="rows (default 16)")
    args = parser.parse_args()
    import triton

    os.environ.pop("TRITON_INTERPRET", None)  # workers inherit it; interpreted is not compiled
    axes = args.target, args.cell, args.hidden, args.dtype, args.lengths
    rows = rows_of_all([Job(*case, args.batch) for case in product(*axes)])
    print(f"Triton {triton.__version__}, torch {torch.__version__}.")
    for target in args.target:
        chip = CHIPS[target]
        print(f"\n{target}: {chip.name}, {chip.sms} SMs, {chip.sram} B of SRAM\n")
        here = [row for row in rows if row["target"] == target]
        print(table(COLUMNS, [[text(row.get(name, "")) for name in COLUMNS] for row in here]))
    ours = [row for row in rows if not row["verdict"].startswith("torch: ")]
    resident = sum(row["verdict"] == "resident" for row in ours)
    print(f"\n{resident} of {len(ours)} kernels resident")
    return 0 if resident == len(ours) else 1


if __name__ == "__main__":
    sys.exit(main())
