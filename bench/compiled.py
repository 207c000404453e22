"""The compiled kernels, examined without a GPU: python -m bench.compiled

For each cell, pass, dtype and hidden size this takes the plan that the library itself takes on a
chip, compiles exactly what a launch would run there, and reads the machine code. The kernels are
compiled by the library's own call with the launch left out, so that nothing about their arguments
or options is repeated here.

A row is resident if W_hh is read from device memory before the time loop and nowhere else, and
no register is spilled. Exit status: 1 if the library would run a row that is not resident.

Times are the model of `lower_bounds`, not measured. dtype float32 lets products be rounded to
tf32, float32-ieee does not (three tf32 products each).
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from rnn import functional, reference
from rnn.kernels.chips import CHIPS, Chip
from rnn.kernels.plan import L2_TRIPS, NoPlan, Plan, plan

from .machine_code import (
    WEIGHTS,
    CodeLoop,
    IrLoop,
    parse_amdgcn,
    parse_amdgcn_resources,
    parse_resources,
    parse_sass,
    parse_ttgir,
)

DTYPES = {
    "bfloat16": (torch.bfloat16, True),
    "float16": (torch.float16, True),
    "float32": (torch.float32, True),
    "float32-ieee": (torch.float32, False),
}
PASSES = ("forward", "reverse")

Row = dict[str, Any]  # a figure that could not be had is a string: "n/a: " and the reason


class Job(NamedTuple):
    """Both passes of one layer on one chip."""

    target: str
    cell: str
    hidden: int
    dtype: str  # a key of DTYPES
    lengths: bool = False
    num_warps: int | None = None  # instead of the plan's
    batch: int = 16


# ------------------------------------------------------------------------------- compilation


class AbsentDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = target
        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        else:
            self.target = GPUTarget("hip", target, 64)

    def get_current_device(self) -> str:
        return self.name  # the key of each kernel's cache: targets must not share one

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_launches(call: Callable[[], object], target: str) -> dict[str, Any]:
    """Run `call`, compiling each kernel that it would launch on the target instead of launching.

    Returns the compiled kernel, or the exception that the compiler raised, by kernel name.
    """
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

    driver.set_active(AbsentDevice(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        call()
    return compiled


def training_step(job: Job, found: Plan) -> None:
    """What the library does for one layer, forward and backward, with all gradients wanted."""
    dtype, _ = DTYPES[job.dtype]
    H, G = job.hidden, reference.CELLS[job.cell].gates
    x_gates = torch.zeros(2, job.batch, G * H, dtype=dtype, requires_grad=True)
    h0 = torch.zeros(job.batch, H, dtype=dtype, requires_grad=True)
    weight_hh = torch.zeros(G * H, H, dtype=dtype, requires_grad=True)
    lengths = torch.full((job.batch,), 2) if job.lengths else None
    with mock.patch.object(functional, "choose", return_value=found):
        outputs = functional.recurrence(x_gates, h0, weight_hh, cell=job.cell, lengths=lengths)
    gradients = [torch.zeros_like(x) for x in outputs]
    torch.autograd.grad(outputs, [x_gates, h0, weight_hh], gradients)


# ----------------------------------------------------------------------------------- figures


def run_tool(name: str, *arguments: str, cubin: bytes) -> str:
    """The output of a CUDA tool; "n/a: " and the reason where it is absent or fails."""
    import triton

    beside = Path(triton.__file__).parent / "backends/nvidia/bin" / name  # where ptxas lies
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        return f"n/a: no {name}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *arguments, file.name], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"n/a: {name} failed"


def read_code(compiled: Any, steps: int) -> tuple[CodeLoop | str, tuple[int, int] | str]:
    """The time loop; registers and spilled bytes of a thread. Or "n/a: " and the reason."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        return parse_amdgcn(assembly, steps), parse_amdgcn_resources(assembly)
    sass = run_tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])
    usage = run_tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    return (
        sass if sass.startswith("n/a: ") else parse_sass(sass, steps),
        usage if usage.startswith("n/a: ") else parse_resources(usage),
    )


def lower_bounds(chip: Chip, slices: int, num_warps: int, ir: IrLoop, code: CodeLoop | str) -> Row:
    """Times in ns that a step cannot come below on the chip; a model, not measured.

    Each term takes one resource of the SM at its peak rate, as if nothing waited for anything:
    shared memory, the matrix unit, the issue slots, and the trips to L2 that exchange the state.
    The largest is the bound. Latencies of dependent instructions are left out, so that a real
    step takes longer, often by a factor.
    """
    rate = chip.tf32_rate if ir.operand == "f32" else chip.bf16_rate
    shared: float | str
    clocks: dict[str, float | str]
    if isinstance(code, str):
        shared = code
        clocks = {"smem": code, "tensor": ir.multiply_adds / rate, "issue": code}
    else:
        shared = code.shared_bytes * num_warps + ir.tcgen05_bytes
        # Warps may do the same product twice: then the machine code has more of them than the IR.
        products = max(ir.multiply_adds, code.multiply_adds * num_warps)
        clocks = {
            "smem": shared / chip.sram_rate,
            "tensor": products / rate if code.matrix else "n/a: no matrix instruction",
            "issue": code.issued * num_warps / chip.issue_rate,
        }
    clocks["L2"] = L2_TRIPS * chip.l2_trip if slices > 1 else 0.0
    times = {k: v if isinstance(v, str) else v / chip.clock for k, v in clocks.items()}
    bound, name = max((v, k) for k, v in times.items() if not isinstance(v, str))
    named = {f"{k} ns": v for k, v in times.items()}
    return {"smem bytes": shared, **named, "bound ns": bound, "bound by": name}


def judge(row: Row) -> str:
    """ "resident", or the reason why not; "unknown: ..." where a tool is missing."""
    if WEIGHTS in row["loads"]:
        return "W_hh is read from device memory in the loop"
    if row["W_hh in"] not in ("shared memory", "registers", "tensor memory"):
        return f"W_hh is in {row['W_hh in']}"
    if isinstance(row["SRAM"], int) and row["SRAM"] > row["SRAM limit"]:
        return f"needs {row['SRAM']} of {row['SRAM limit']} bytes of SRAM"
    if isinstance(row["spilled"], str):
        return f"unknown: {row['spilled']}"
    if row["spilled"] > 0:
        return f"spills {row['spilled']} B a thread; accesses a step: {text(row['spill accesses'])}"
    return "resident"


def figures(chip: Chip, hidden: int, found: Plan, compiled: Any) -> Row:
    ir = parse_ttgir(compiled.asm["ttgir"])
    code, resources = read_code(compiled, ir.steps)
    sram = getattr(compiled.metadata, "shared", "n/a: no metadata.shared")
    row = {
        "slices": found.slices,
        "tile": f"{found.block_h // found.slices}x{found.block_b}",
        "warps": found.num_warps,
        "registers": resources if isinstance(resources, str) else resources[0],
        "spilled": resources if isinstance(resources, str) else resources[1],
        "SRAM": sram,
        "SRAM planned": found.sram,
        "SRAM limit": chip.sram,
        "SRAM %": sram if isinstance(sram, str) else 100 * sram / chip.sram,
        "W_hh in": ir.weights_in,
        "W_hh loads before": ir.weight_loads,
        "loads": ir.loads,
        "matrix": code if isinstance(code, str) else code.matrix,
        "instructions": code if isinstance(code, str) else code.instructions,
        "barriers": code if isinstance(code, str) else code.barriers,
        "spill accesses": code if isinstance(code, str) else code.spills,
        # Of the units that a tile is padded with nothing is read or written.
        "device bytes": (ir.load_bytes + ir.store_bytes) * hidden / found.block_h,
        **lower_bounds(chip, found.slices, found.num_warps, ir, code),
    }
    return row | {"verdict": judge(row)}


def rows_of(job: Job) -> list[Row]:
    """One row for each pass."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # nothing to do here
    torch.set_num_threads(1)
    chip = CHIPS[job.target]
    dtype, tf32 = DTYPES[job.dtype]
    gates = reference.CELLS[job.cell].gates
    found = plan(gates, job.hidden, job.batch, 1, dtype, tf32, chip.limits())
    rows: list[Row] = [{**job._asdict(), "chip": chip.name, "pass": name} for name in PASSES]
    if isinstance(found, NoPlan):
        return [row | {"verdict": f"torch: {found.why}"} for row in rows]
    if job.num_warps is not None:
        found = dataclasses.replace(found, num_warps=job.num_warps)
    compiled = compile_launches(lambda: training_step(job, found), job.target)
    for row in rows:
        kernel = compiled.get(f"{row['pass']}_kernel", "no such kernel was launched")
        try:
            if isinstance(kernel, Exception | str):
                raise ValueError(kernel)
            row |= figures(chip, job.hidden, found, kernel)
        except ValueError as error:  # of the compiler, or of a parser that did not find its loop
            row["verdict"] = f"not compiled or not understood: {error}".splitlines()[0]
    return rows


def rows_of_all(jobs: list[Job]) -> dict[Job, list[Row]]:
    """rows_of each job, side by side. Shows on stderr how far it has come."""
    rows: dict[Job, list[Row]] = {}

    def run(some: list[Job], workers: int | None) -> None:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(rows_of, job): job for job in some}
            for future in as_completed(futures):
                try:
                    rows[futures[future]] = future.result()
                except BrokenProcessPool:
                    continue
                print(f"\r{len(rows)} of {len(jobs)}", end="", file=sys.stderr, flush=True)

    run(jobs, os.cpu_count())
    for job in [job for job in jobs if job not in rows]:
        # Where the compiler aborts it takes the whole pool with it; alone, each shows its own.
        run([job], 1)
        aborted = {**job._asdict(), "chip": CHIPS[job.target].name, "verdict": "compiler aborted"}
        rows.setdefault(job, [{**aborted, "pass": name} for name in PASSES])
    print(file=sys.stderr)
    return rows


# ------------------------------------------------------------------------------------ output

COLUMNS = {  # key in a row: heading
    "cell": "cell",
    "pass": "pass",
    "dtype": "dtype",
    "hidden": "H",
    "slices": "slices",
    "tile": "tile",
    "warps": "warps",
    "registers": "regs",
    "spilled": "spill B",
    "SRAM": "SRAM B",
    "SRAM %": "%",
    "W_hh in": "W_hh in",
    "loads": "loads",
    "matrix": "matrix",
    "instructions": "instr",
    "barriers": "bar",
    "device bytes": "device B",
    "smem bytes": "smem B",
    "smem ns": "smem ns",
    "tensor ns": "tensor ns",
    "issue ns": "issue ns",
    "L2 ns": "L2 ns",
    "bound ns": "bound ns",
    "bound by": "by",
    "verdict": "verdict",
}


def text(figure: Any) -> str:
    if isinstance(figure, dict):
        return ", ".join(f"{count:g} {name}" for name, count in figure.items()) or "none"
    if isinstance(figure, list):
        return ", ".join(figure) or "none"
    return f"{figure:.0f}" if isinstance(figure, float) else str(figure)


def table(rows: Iterable[Row]) -> str:
    """A Markdown table; its last column is as wide as it comes."""
    lines = [list(COLUMNS.values())]
    lines += [[text(row.get(key, "")) for key in COLUMNS] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    widths[-1] = 3
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    targets, cells = list(CHIPS), list(reference.CELLS)
    default = [t for t in targets if t != "sm_89"]
    parser.add_argument("--target", nargs="+", choices=targets, default=default)
    parser.add_argument("--cell", nargs="+", choices=cells, default=cells)
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256], metavar="H")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        default=["bfloat16", "float32", "float32-ieee"],
    )
    parser.add_argument("--lengths", action="store_true", help="rows of different length")
    parser.add_argument("--num-warps", type=int, metavar="N", help="instead of the plan's")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="rows (default 16)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE as well")
    args = parser.parse_args()
    if functional.kernels is None:
        parser.error("triton is not installed")

    os.environ.pop("TRITON_INTERPRET", None)  # workers inherit it; interpreted is not compiled
    jobs = [
        Job(*case, lengths=args.lengths, num_warps=args.num_warps, batch=args.batch)
        for case in product(args.target, args.cell, args.hidden, args.dtype)
    ]
    rows = rows_of_all(jobs)
    versions = {"triton": functional.kernels.triton.__version__, "torch": torch.__version__}
    print(", ".join(f"{k} {v}" for k, v in versions.items()), "on", platform.machine())
    print(
        "Figures of one block and time step; matrix, instr and bar of one warp. "
        "ns: lower bounds by the model, not measured."
    )
    for target in args.target:
        chip = CHIPS[target]
        print(f"\n{target}: {chip.name}, {chip.sms} SMs at {chip.clock} GHz, {chip.sram} B of SRAM")
        print(table(row for job in jobs if job.target == target for row in rows[job]))
    every = [row for job in jobs for row in rows[job]]
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions, "rows": every}, indent=1))
    ours = [row["verdict"] for row in every if not row["verdict"].startswith("torch: ")]
    unknown = sum(verdict.startswith("unknown: ") for verdict in ours)
    resident = ours.count("resident")
    print(f"\n{resident} of {len(ours)} rows resident", f"{unknown} unknown", sep=", ")
    return 0 if resident + unknown == len(ours) else 1


if __name__ == "__main__":
    sys.exit(main())
