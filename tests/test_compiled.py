"""The compiled kernels, without a GPU: W_hh stays on chip, and the tool that says so can say no."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import compiled as tool
from bench.machine_code import (
    CodeLoop,
    IrLoop,
    parse_amdgcn,
    parse_amdgcn_resources,
    parse_resources,
    parse_sass,
    parse_ttgir,
)
from rnn.kernels.chips import CHIPS
from rnn.kernels.plan import NoPlan, plan

pytest.importorskip("triton")


def run(*arguments):
    """`python -m bench.compiled` as a user would run it, kernels not interpreted."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compiled", *arguments],
        cwd=Path(__file__).parent.parent,
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


# -------------------------------------------------------------------------- the library's kernels

# targets, cells, hidden sizes, dtypes, whether rows differ in length
GRIDS = [
    (
        ("sm_80", "sm_90", "sm_100", "gfx942"),
        ("rnn_tanh",),
        (128, 256),
        ("bfloat16", "float32", "float32-ieee"),
        False,
    ),
    (("sm_80", "sm_90"), ("rnn_tanh", "rnn_relu"), (64, 201), ("float16",), True),
    (("sm_80", "sm_90"), ("rnn_tanh",), (1024, 2048), ("bfloat16",), True),
]
CASES = [
    (*case, lengths, direction)
    for *axes, lengths in GRIDS
    for case in itertools.product(*axes)
    for direction in ("forward", "reverse")
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    found = {}
    for targets, cells, hidden, dtypes, lengths in GRIDS:
        path = tmp_path_factory.mktemp("compiled") / "rows.json"
        options = ["--target", *targets, "--cell", *cells, "--hidden", *map(str, hidden)]
        options += ["--dtype", *dtypes, "--json", str(path), *["--lengths"] * lengths]
        done = run(*options)
        assert path.exists(), done.stdout + done.stderr
        figures = json.loads(path.read_text())["rows"]
        clean = all(row["verdict"].startswith(("resident", "torch: ")) for row in figures)
        assert done.returncode == (not clean)
        for row in figures:
            key = ("target", "cell", "hidden", "dtype", "lengths", "pass")
            found[tuple(row[name] for name in key)] = row
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_resident(case, rows):
    target, _, hidden, dtype, _, direction = case
    row = rows[case]
    torch_dtype, tf32 = tool.DTYPES[dtype]
    planned = plan(1, hidden, 16, 1, torch_dtype, tf32, CHIPS[target].limits())
    if isinstance(planned, NoPlan):
        assert row["verdict"] == f"torch: {planned.why}"
        return
    assert row["verdict"] == "resident"
    assert row["spilled"] == 0
    assert row["SRAM"] <= row["SRAM planned"] == planned.sram
    # Each part of W_hh is read once, before the loop; in the loop come x_gates, or output and
    # d_output, and nothing else.
    assert row["W_hh loads before"] == planned.parts * planned.chunks
    loads = {"forward": ["x_gates"], "reverse": ["d_output", "output"]}[direction]
    if planned.slices > 1:  # and, through L2, the flag: raised, read, polled; and the other parts
        loads = loads + ["flags"] * 3 + ["exchange"] * planned.chunks
    else:
        tiles = {"forward": 2, "reverse": 3}[direction]  # read and written in each step
        assert row["device bytes"] == tiles * hidden * planned.block_b * torch_dtype.itemsize
    assert sorted(row["loads"]) == sorted(loads)
    assert row["matrix"] and row["barriers"] > 0
    assert row["bound ns"] == max(row[f"{term} ns"] for term in ("smem", "tensor", "issue", "L2"))


def test_a_spill_fails(tmp_path):
    """4 warps cannot hold their share of the accumulators and operands in registers."""
    path = tmp_path / "rows.json"
    shape = ["--target", "sm_80", "--cell", "rnn_tanh", "--hidden", "256", "--dtype", "bfloat16"]
    done = run(*shape, "--num-warps", "4", "--json", str(path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 of 2 rows resident" in done.stdout
    for row in json.loads(path.read_text())["rows"]:
        assert row["spilled"] > 0 and row["verdict"].startswith("spills ")


# -------------------------------------------------------------------------------- the verdicts

IR = IrLoop(["x_gates"], 1, "shared memory", 64.0, 64.0, 1e6, "bf16", 0.0, 1)
CODE = CodeLoop(200, 200, 4, 0, {"HMMA.16816.F32.BF16": 8}, 16384, 4096)


def row(**changes):
    figures = {"loads": ["x_gates"], "W_hh in": "registers", "SRAM": 10, "SRAM limit": 20}
    return figures | {"spilled": 0, "spill accesses": 0.0} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "resident"),
        ({"spilled": 8, "spill accesses": 2.0}, "spills 8 B a thread; accesses a step: 2"),
        ({"loads": ["weight_hh", "x_gates"]}, "W_hh is read from device memory in the loop"),
        ({"W_hh in": "not found"}, "W_hh is in not found"),
        ({"SRAM": 30}, "needs 30 of 20 bytes of SRAM"),
        ({"spilled": "n/a: no cuobjdump"}, "unknown: n/a: no cuobjdump"),
    ],
)
def test_verdict(changes, verdict):
    assert tool.judge(row(**changes)) == verdict


def test_the_bound_is_the_largest_term():
    chip = CHIPS["sm_80"]
    bounds = tool.lower_bounds(chip, 1, 8, IR, CODE)
    assert bounds["smem ns"] == pytest.approx(8 * 4096 / 128 / 1.41)
    assert bounds["tensor ns"] == pytest.approx(1e6 / 1024 / 1.41)
    assert bounds["issue ns"] == pytest.approx(8 * 200 / 4 / 1.41)
    assert bounds["L2 ns"] == 0
    assert bounds["bound ns"] == bounds["tensor ns"] and bounds["bound by"] == "tensor"
    assert tool.lower_bounds(chip, 4, 8, IR, CODE)["L2 ns"] > 0


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(tool.Path, "exists", lambda path: False)
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    code, resources = tool.read_code(SimpleNamespace(asm={"cubin": b""}), 1)
    assert (code, resources) == ("n/a: no nvdisasm", "n/a: no cuobjdump")
    bounds = tool.lower_bounds(CHIPS["sm_80"], 1, 8, IR, code)
    assert bounds["smem ns"] == bounds["issue ns"] == "n/a: no nvdisasm"
    assert bounds["bound by"] == "tensor"


def test_the_table_of_chips():
    units = {target: chip.limits().matrix_unit for target, chip in CHIPS.items()}
    assert units == {
        "sm_80": "mma",
        "sm_89": "mma",
        "sm_90": "wgmma",
        "sm_100": "tcgen05",
        "gfx942": "mma",
    }
    found = plan(1, 128, 16, 1, torch.bfloat16, True, CHIPS["gfx942"].limits())
    assert "of 64 KiB each (MI300X)" in str(found)


# --------------------------------------------------------------------------------- the parsers

TTGIR = """
  tt.func public @forward_kernel(%x_gates_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, \
%weight_hh_ptr: !tt.ptr<bf16>, %output_ptr: !tt.ptr<bf16>, %T: i32) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32
    %c2_i32 = arith.constant 2 : i32
    %p = tt.splat %weight_hh_ptr : !tt.ptr<bf16> -> tensor<64x64x!tt.ptr<bf16>, #blocked>
    %tiles = tt.load %p, %mask, %cst : tensor<64x64x!tt.ptr<bf16>, #blocked>
    BEFORE
    %x:2 = scf.for %i = %c0_i32 to %T step STEP iter_args(%h_1 = %h, %x_1 = %x_0) -> (a, b) : i32 {
      %0 = tt.addptr %x_gates_ptr, %i : !tt.ptr<bf16>, i32
      %1 = tt.splat %0 : !tt.ptr<bf16> -> tensor<64x16x!tt.ptr<bf16>, #blocked>
      %ahead = tt.load %1, %mask, %cst : tensor<64x16x!tt.ptr<bf16>, #blocked>
      INSIDE
      %2 = tt.splat %output_ptr : !tt.ptr<bf16> -> tensor<64x16x!tt.ptr<bf16>, #blocked>
      tt.store %2, %y, %mask : tensor<64x16x!tt.ptr<bf16>, #blocked>
      scf.yield %h_1, %ahead : tensor<64x16xbf16, #mma>, tensor<64x16xbf16, #blocked>
    }
    tt.return
  }
"""
ALLOC = "%w = ttg.local_alloc %tiles : (tensor<64x64xbf16>) -> !ttg.memdesc<64x64xbf16, #smem>"
LOAD = "%r = ttg.local_load %w : !ttg.memdesc<64x64xbf16, #smem> -> tensor<64x64xbf16, #dot>"
DOT = "%acc = tt.dot %r, %h_1, %z : tensor<64x64xbf16> * tensor<64x16xbf16> -> tensor<64x16xf32>"
WGMMA = (
    "%acc = ttng.warp_group_dot %w, %hs, %z {inputPrecision = 0 : i32} : "
    "!ttg.memdesc<64x64xbf16, #smem> * !ttg.memdesc<64x16xbf16, #smem> -> tensor<64x16xf32, #mma>"
)
TCGEN05 = (
    "ttng.tc_gen5_mma %w, %hs, %acc, %true : !ttg.memdesc<64x64xbf16, #smem>, "
    "!ttg.memdesc<64x16xbf16, #smem>, !ttg.memdesc<64x16xf32, #tmem, #ttng.tensor_memory>"
)
IN_TMEM = "%w = ttng.tmem_alloc %tiles : (tensor<64x64xbf16>) -> !ttg.memdesc<64x64xbf16, #tmem>"
SELECT = "%r = arith.select %active, %r, %zero : tensor<64x64xi1>, tensor<64x64xbf16>"
AGAIN = "%r = tt.load %p, %mask, %cst : tensor<64x64x!tt.ptr<bf16>, #blocked>"


def ttgir(before, inside, step="%c1_i32"):
    return TTGIR.replace("BEFORE", before).replace("INSIDE", inside).replace("STEP", step)


@pytest.mark.parametrize(
    ("before", "inside", "where"),
    [
        ([ALLOC], [LOAD, DOT], "shared memory"),
        ([ALLOC], [WGMMA], "shared memory"),
        ([ALLOC, LOAD], [DOT], "registers"),
        ([IN_TMEM], [TCGEN05], "tensor memory"),
        ([ALLOC], [LOAD, SELECT, DOT], "shared memory"),
        ([], [AGAIN, DOT], "device memory"),
    ],
    ids=["mma", "wgmma", "hoisted", "tcgen05", "masked", "loaded-again"],
)
def test_where_the_weights_lie(before, inside, where):
    loop = parse_ttgir(ttgir("\n".join(before), "\n".join(inside)))
    assert loop.weights_in == where
    assert loop.weight_loads == 1
    assert loop.loads == ["x_gates"] + ["weight_hh"] * (where == "device memory")
    assert loop.multiply_adds == 64 * 64 * 16
    assert loop.operand == "bf16"


def test_figures_are_per_step():
    one, two = (parse_ttgir(ttgir(ALLOC, TCGEN05, step)) for step in ("%c1_i32", "%c2_i32"))
    assert (one.steps, two.steps) == (1, 2)
    assert (one.load_bytes, one.store_bytes) == (2048, 2048)
    assert one.tcgen05_bytes == (64 * 64 + 64 * 16) * 2
    assert (two.load_bytes, two.multiply_adds) == (1024, one.multiply_adds / 2)


def test_no_loop_is_an_error():
    with pytest.raises(ValueError, match="no loop with a matrix product"):
        parse_ttgir(ttgir(ALLOC, ""))
    with pytest.raises(ValueError, match="no loop in the machine code"):
        parse_sass("        /*0000*/                   EXIT ;\n")


def sass(text):
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/  {line} ;"
        for i, line in enumerate(lines)
    )


def test_sass():
    """The wait loop lies behind the kernel's end and jumps back into the time loop; its own
    backward branch spans instructions after the loop, which are not counted."""
    loop = parse_sass(
        sass(
            """
            LDG.E R0, desc[UR4][R2.64]
            .L_x_1:
            LDSM.16.M88.4 R4, [R1]
            HMMA.16816.F32.BF16 R8, R4, R6, R8
            BAR.SYNC.DEFER_BLOCKING 0x0
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
            @!P0 BRA `(.L_x_3)
            .L_x_2:
            STS.U16 [R1], R8
            LDL R9, [R0]
            BRA.U UP0, `(.L_x_1)
            STG.E desc[UR4][R2.64], R8
            EXIT
            .L_x_3:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
            @!P0 BRA `(.L_x_3)
            BRA `(.L_x_2)
            .L_x_4:
            BRA `(.L_x_4)
            """
        )
    )
    assert loop.instructions == loop.issued == 11
    assert loop.barriers == loop.spills == 1
    assert loop.matrix == {"HMMA.16816.F32.BF16": 1}
    assert loop.multiply_adds == 16 * 8 * 16
    assert loop.shared_bytes == 4 * 128 + 32 * 2


@pytest.mark.parametrize(
    ("instruction", "multiply_adds", "shared_bytes"),
    [
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspB, R24", 4096, (64 + 16) * 16 * 2 / 4),
        ("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24", 4096, 16 * 16 * 2 / 4),
        ("HGMMA.64x8x8.F32.TF32 R24, gdesc[UR28], RZ, !UPT", 1024, (64 + 8) * 8 * 4 / 4),
        ("HMMA.1688.F32.TF32 R8, R4, R6, RZ", 1024, 0),
        ("LDSM.16.MT88.2 R8, [R4]", 0, 256),
        ("LDS.128 R8, [R4]", 0, 512),
        ("STS [R4], R8", 0, 128),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_work_of_an_instruction(instruction, multiply_adds, shared_bytes):
    loop = parse_sass(sass(f".L_x_0:\n{instruction}\nBRA `(.L_x_0)"))
    assert (loop.multiply_adds, loop.shared_bytes) == (multiply_adds, shared_bytes)


AMDGCN = """
forward_kernel:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_7:                                ; =>This Inner Loop Header: Depth=1
	s_cbranch_execz .LBB0_9
; %bb.8:                                ;   in Loop: Header=BB0_7 Depth=1
	global_load_dwordx2 v[40:41], v[40:41], off
.LBB0_9:                                ;   in Loop: Header=BB0_7 Depth=1
	s_barrier
	ds_write_b16_d16_hi v45, v21 offset:512
	ds_read2_b64 v[18:21], v53 offset1:16
	v_mfma_f32_16x16x16_bf16 v[62:65], v[18:19], v[2:3], v[62:65]
	s_cbranch_scc0 .LBB0_7
	v_mov_b32_e32 v0, 0
	s_endpgm
	.section	.rodata,"a",@progbits
    .private_segment_fixed_size: 12
    .vgpr_count:     78
"""


def test_amdgcn():
    loop = parse_amdgcn(AMDGCN)
    assert (loop.instructions, loop.issued, loop.barriers) == (7, 1, 1)
    assert loop.matrix == {"v_mfma_f32_16x16x16_bf16": 1}
    assert loop.multiply_adds == 16 * 16 * 16
    assert loop.shared_bytes == 64 * 2 + 64 * 16
    assert parse_amdgcn_resources(AMDGCN) == (78, 12)


def test_resources():
    usage = "Function forward_kernel:\n  REG:255 STACK:432 SHARED:0 LOCAL:8 CONSTANT[0]:440"
    assert parse_resources(usage) == (255, 440)
