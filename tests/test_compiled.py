"""The compiled kernels, without a GPU: W_hh stays on chip, and the tool that says so can say no."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest

from bench import compiled as tool
from bench.compiled import Job
from bench.machine_code import CodeLoop, parse_code, parse_resources, parse_ttgir
from rnn.cells import CELLS
from rnn.kernels.limits import NoPlan
from rnn.kernels.plan import PortablePlan

pytest.importorskip("triton")

from rnn.kernels import launch

# -------------------------------------------------------------------------- the library's kernels

NVIDIA = ("sm_80", "sm_90")
JOBS = [
    *(Job(t, cell, 64, "bfloat16") for t in NVIDIA for cell in CELLS),
    *(Job(t, "gru", 384, "bfloat16", "padded") for t in NVIDIA),
    *(Job(t, "lstm", 768, "bfloat16", "packed") for t in NVIDIA),
    *(Job("sm_80", "gru", 128, dtype) for dtype in ("tf32", "float32")),
    Job("sm_80", "gru", 64, "float32", batch=300),
    Job("sm_90", "rnn_tanh", 256, "bfloat16"),
    Job("sm_90", "rnn_tanh", 1024, "bfloat16", "padded"),
    Job("sm_90", "rnn_tanh", 1536, "bfloat16", "padded"),
    Job("sm_90", "rnn_relu", 201, "float16", "padded"),
    *(Job("sm_90", "gru", H, "tf32") for H in (128, 256)),
    *(Job("sm_90", "lstm", H, "float32") for H in (64, 320)),
    Job("sm_90", "lstm", 512, "float16", "padded"),
    Job("sm_90", "lstm", 128, "bfloat16", "packed"),
    Job("sm_80", "lstm_norm", 33, "bfloat16", "packed"),
    Job("sm_90", "lstm_norm", 17, "float32"),
    Job("sm_90", "gru_norm", 128, "bfloat16", "padded"),
    Job("sm_100", "gru", 64, "bfloat16"),
    Job("gfx942", "rnn_tanh", 64, "bfloat16"),
]


@pytest.fixture(scope="module")
def compiling():
    """Processes in which kernels are compiled and not interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def rows(compiling):
    found = {}
    for row in tool.rows_of_all(JOBS):
        found.setdefault(Job(*(row[name] for name in Job._fields)), []).append(row)
    return found


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job[:-1])))
def test_resident(job, rows):
    plan = job.plan()
    assert not isinstance(plan, NoPlan), plan
    assert [row["kernel"] for row in rows[job]] == ["forward", "backward"]
    allowed = {"forward": {"x_gates"}, "backward": {"d_output", "output", "stored", "state0"}}
    shared = {"offsets"} if job.lengths == "packed" else set()
    portable = isinstance(plan, PortablePlan)
    shared |= {"flags", "exchange"} if portable and plan.slices > 1 else set()
    for row in rows[job]:
        assert row["verdict"] == "resident"
        assert row["spill_B"] == 0 and row["mma"] > 0 and row["bar"] > 0
        assert row["SRAM_B"] <= plan.sram
        read = {name for names in row["loads"] for name in names.split("/")}
        assert read <= allowed[row["kernel"]] | shared
        if row["engine"] == "Hopper":
            assert row["bar"] <= (4 if row["blocks"] > 1 else 2)
            assert (row["sent_B"] > 0) == (row["blocks"] > 1)
    assert rows[job][0]["loads"]["x_gates"] == CELLS[job.cell].gates


@pytest.fixture(scope="module")
def worker(compiling):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def with_few_registers(job):
    with mock.patch.object(launch, "most_registers", lambda num_warps: 32):
        return tool.rows_of(job)


def test_a_spill_fails(worker):
    for row in worker(with_few_registers, Job("sm_80", "gru", 64, "bfloat16")):
        assert row["spill_B"] > 0 and row["spill_instr"] > 0
        assert row["verdict"].startswith("spills; accesses a step: ")


def versions(job, shapes):
    """How many kernels are compiled for layers of T steps of B rows, all in tiles of one height."""
    assert len({job._replace(batch=B).plan().block_b for _, B in shapes}) == 1
    hashes = set()
    for T, B in shapes:
        job = job._replace(batch=B)
        kernels = tool.compile_launches(job.target, tool.training_step, job, job.plan(), T)
        hashes |= {kernel.hash for kernel in kernels.values()}
    return len(hashes)


@pytest.mark.parametrize("lengths", tool.LENGTHS)
def test_another_length_or_batch_compiles_nothing(lengths, worker):
    shapes = [(1, 16), (2, 16), (16, 16), (17, 16), (5, 15), (5, 14)]
    assert worker(versions, Job("sm_90", "gru", 64, "bfloat16", lengths), shapes) == 2


def test_the_command(capsys, monkeypatch):
    """The exit status is that of the kernels; what the library leaves to torch is no failure."""
    shape = ["--target", "sm_80", "--cell", "lstm", "--dtype", "float32", "--hidden", "4096"]
    command = [sys.executable, "-m", "bench.compiled", *shape]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch: " in done.stdout and "0 of 0 kernels resident" in done.stdout
    head = {"target": "sm_80", "cell": "lstm", "verdict": "spills; accesses a step: 3"}
    monkeypatch.setattr(tool, "rows_of_all", lambda jobs: [head])
    monkeypatch.setattr(sys, "argv", ["bench.compiled"])
    assert tool.main() == 1 and "0 of 1 kernels resident" in capsys.readouterr().out


# -------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "resident"),
        ({"spill_B": 8, "spill_instr": 2}, "spills; accesses a step: 2"),
        ({"loads": Counter(["weight_hh"])}, "W_hh is read from device memory in the loop"),
        ({"W_hh_in": "registers and shared memory"}, "resident"),
        ({"W_hh_in": "device memory and registers"}, "W_hh is in device memory and registers"),
        ({"SRAM_B": 30}, "needs 30 of 20 bytes of SRAM"),
    ],
)
def test_verdict(changes, verdict):
    row = {"loads": Counter(["x_gates"]), "W_hh_in": "registers", "SRAM_B": 10, "spill_B": 0}
    assert tool.judge(row | changes, sram_limit=20) == verdict


# --------------------------------------------------------------------------------- the parsers

TTGIR = """
  tt.func public @forward_kernel(%x_gates_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, \
%weight_hh_ptr: !tt.ptr<bf16>, %output_ptr: !tt.ptr<bf16>, %T: i32) attributes {noinline = false} {
    %p = tt.splat %weight_hh_ptr : !tt.ptr<bf16> -> tensor<64x64x!tt.ptr<bf16>, #blocked>
    %tiles = tt.load %p, %mask, %cst : tensor<64x64x!tt.ptr<bf16>, #blocked>
    BEFORE
    %x:2 = scf.for %i = %c0 to %T step %c1 iter_args(%h_1 = %h, %x_1 = %x_0) -> (a, b) : i32 {
      %0 = tt.addptr %x_gates_ptr, %i : !tt.ptr<bf16>, i32
      %1 = tt.splat %0 : !tt.ptr<bf16> -> tensor<64x16x!tt.ptr<bf16>, #blocked>
      %ahead = tt.load %1, %mask, %cst : tensor<64x16x!tt.ptr<bf16>, #blocked>
      INSIDE
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
BUFFER = "%w = ttg.local_alloc : () -> !ttg.memdesc<1x64x64xbf16, #smem, mutable>"
VIEW = "%v = ttg.memdesc_index %w[%c0] : !ttg.memdesc<1x64x64xbf16> -> !ttg.memdesc<64x64xbf16>"
FILL = "ttg.local_store %tiles, %v : tensor<64x64xbf16> -> !ttg.memdesc<64x64xbf16, #smem>"
REFILL = "%t = ttg.async_copy_global_to_local %p, %v mask %m : tensor<64x64x!tt.ptr<bf16>>"
CARRIED = "%h = arith.truncf %tiles : tensor<64x64xf32> to tensor<64x64xbf16>"
H_IN_SHARED = "%hs = ttg.local_alloc %acc : (tensor<64x16xf32>) -> !ttg.memdesc<64x16xf32>"
DIRECT = (
    '%r = tt.elementwise_inline_asm "{ .reg .pred p; @p ld.global.b16 $0, [$1]; }" {constraints = '
    '"=h,l,r", packed_element = 1 : i32, pure = true} %p, %mask : tensor<64x64x!tt.ptr<bf16>> -> '
    "tensor<64x64xi16, #mma>"
)


def ttgir(before, inside):
    return TTGIR.replace("BEFORE", before).replace("INSIDE", inside)


@pytest.mark.parametrize(
    ("before", "inside", "where"),
    [
        ([ALLOC], [LOAD, DOT], "shared memory"),
        ([ALLOC], [WGMMA], "shared memory"),
        ([ALLOC, LOAD], [DOT], "registers"),
        ([IN_TMEM], [TCGEN05], "tensor memory"),
        ([ALLOC], [LOAD, SELECT, DOT], "shared memory"),
        ([], [AGAIN, DOT], "device memory"),
        ([], [DIRECT, DOT], "device memory"),
        ([BUFFER, VIEW, FILL], [WGMMA], "shared memory"),
        ([BUFFER, VIEW], [REFILL, WGMMA], "device memory"),
        ([CARRIED], [DOT.replace("%r", "%h_1")], "registers"),
        ([ALLOC, LOAD], [DOT, H_IN_SHARED, WGMMA.replace("%w", "%r")], "registers"),
        ([], [DOT], "not found"),
    ],
    ids="mma wgmma hoisted tcgen05 masked loaded-again loaded-by-ptx filled refilled carried "
    "h-is-not-the-weights nowhere".split(),
)
def test_where_the_weights_lie(before, inside, where):
    loop = parse_ttgir(ttgir("\n".join(before), "\n".join(inside)))
    assert loop.weights_in == where
    assert loop.loads == ["x_gates"] + ["weight_hh"] * (where == "device memory")


def test_no_loop_is_an_error():
    with pytest.raises(ValueError, match="no loop with a matrix product"):
        parse_ttgir(ttgir(ALLOC, ""))
    with pytest.raises(ValueError, match="no loop with a matrix instruction"):
        parse_code("        /*0000*/                   EXIT ;\n")


SASS = """
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
"""


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
	scratch_load_dword v1, off, s32
	v_mfma_f32_16x16x16_bf16 v[62:65], v[18:19], v[2:3], v[62:65]
	s_cbranch_scc0 .LBB0_7
	v_mov_b32_e32 v0, 0
	s_endpgm
	.section	.rodata,"a",@progbits
    .private_segment_fixed_size: 12
    .vgpr_count:     78
"""


def test_the_loop_in_sass():
    """The wait loop lies behind the kernel's end and jumps back into the time loop; its own
    backward branch spans instructions after the loop, which are not counted."""
    lines = [line.strip() for line in SASS.strip().splitlines()]
    code = "\n".join(x if x.startswith(".L") else f"        /*0010*/  {x} ;" for x in lines)
    assert parse_code(code) == CodeLoop(instructions=11, matrix=1, barriers=1, spills=1)


def test_the_loop_in_amdgcn():
    assert parse_code(AMDGCN) == CodeLoop(instructions=7, matrix=1, barriers=1, spills=1)


def test_registers_and_spills():
    usage = "Function forward_kernel:\n  REG:255 STACK:432 SHARED:0 LOCAL:8 CONSTANT[0]:440"
    assert parse_resources(usage) == (255, 440)
    assert parse_resources(AMDGCN) == (78, 12)
    with pytest.raises(ValueError, match="no use of registers"):
        parse_resources("")
