"""Compile the kernels as a launch would, for GPUs that need not be there, and print what came out.

Run by test_compiled.py in a process of its own: where kernels are interpreted they cannot be
compiled. Prints one JSON list.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnn.kernels import recurrence
from rnn.kernels.cells import CELLS
from rnn.kernels.plan import Limits, Plan, plan

LIMITS = {
    80: Limits("A100", 163 * 1024, 108, "mma"),
    90: Limits("H100", 227 * 1024, 132, "wgmma"),
    100: Limits("B200", 227 * 1024, 148, "tcgen05"),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(p: Plan, kernel, cell: str, hidden_size: int, dtype, ragged: bool, sm: int):
    step = {"STEP": CELLS[cell].step, "STEP_VJP": CELLS[cell].step_vjp}
    constexprs = {
        "H": hidden_size,
        "BLOCK_H": p.block_h,
        "BLOCK_B": p.block_b,
        "GATES": CELLS[cell].gates,
        "UNIT": 16 if hidden_size % 16 == 0 else 1,
        "PARTS": p.parts,
        **{name: f for name, f in step.items() if name in kernel.arg_names},
        **({} if ragged else {"lengths_ptr": None}),
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name == "lengths_ptr" else POINTERS[dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": p.num_warps, "num_stages": p.num_stages},
    )


def spilled_bytes(cubin: bytes) -> int:
    """Local memory of a kernel, which has no other use than spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def loads(ttgir: str) -> tuple[list[str], list[str]]:
    """The shapes that tt.load reads before and inside the loop over time."""
    before, inside = [], []
    depth, loop_depth = 0, None
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loop_depth = depth
        if "tt.load" in line:
            shape = re.search(r"tensor<(\d+x\d+)x", line)
            assert shape, line
            (before if loop_depth is None else inside).append(shape.group(1))
        depth += line.count("{") - line.count("}")
        if loop_depth is not None and depth <= loop_depth and "}" in line:
            break
    return before, inside


def main() -> None:
    rows = []
    for sm, name, tf32, hidden_size, cell, ragged in json.loads(sys.argv[1]):
        dtype = getattr(torch, name)
        p = plan(CELLS[cell].gates, hidden_size, 37, 1, dtype, tf32, LIMITS[sm])
        assert isinstance(p, Plan), p
        for kernel in (recurrence.forward_kernel, recurrence.reverse_kernel):
            compiled = compile_kernel(p, kernel, cell, hidden_size, dtype, ragged, sm)
            before, inside = loads(compiled.asm["ttgir"])
            rows.append(
                {
                    "spilled": spilled_bytes(compiled.asm["cubin"]),
                    "sram": compiled.metadata.shared,
                    "planned": p.sram,
                    "weights": f"{p.block_h}x{p.block_h}",
                    "tile": f"{p.block_h}x{p.block_b}",
                    "parts": p.parts,
                    "before": before,
                    "inside": inside,
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
