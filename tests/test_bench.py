"""python -m bench: what it measures is right, and who is not right is not measured."""

from types import SimpleNamespace

import pytest
import torch

from bench import measure as measuring
from bench import providers, timing
from bench.cases import CELLS, DTYPES, Case, quick, sets
from bench.check import make_problem, names, oracle, results_and_gradients
from bench.measure import CANNOT, CRASHED, MEASURED, WRONG, measure
from bench.providers import PROVIDERS, Model, build_eager, build_torch_nn
from bench.report import line_fit
from bench.timing import CrashError, gemm_bounds, interleave, peak_memory, saved_bytes
from rnn import reference

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CASE = Case("rnn_tanh", T=4, B=3, I=5, H=6)
DEEP = Case("rnn_relu", T=6, B=5, I=3, H=7, layers=3, bidirectional=True, packed=True)
FAST = [name for name in PROVIDERS if name != "compiled"]


def measured(case, chosen=FAST, seconds=0.0):
    rows = {}
    measure(case, chosen, CPU, seconds, lambda case: gemm_bounds(case, 1e9), rows)
    return rows


def replace(monkeypatch, name, **fields):
    monkeypatch.setitem(PROVIDERS, name, PROVIDERS[name]._replace(**fields))


# ------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("known", [sets(False), sets(True), quick()], ids=["cpu", "gpu", "quick"])
def test_every_case_is_read_from_its_name(known):
    for chosen in known.values():
        assert chosen.cases
        for case in chosen.cases:
            assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    "name, fault",
    [
        ("rnn_tanh-T4-B3", "lacks H"),
        ("T4-B3-H2", "lacks cell"),
        ("gru9-T4-B3-H2", "'gru9'"),
        ("rnn_tanh-T4-B3-H2-float8", "'float8'"),
        ("rnn_tanh-T0-B3-H2", "'T0'"),
    ],
)
def test_a_name_that_is_none(name, fault):
    with pytest.raises(ValueError, match=fault):
        Case.parse(name)


def test_every_cell_of_the_library_is_measured():
    assert CELLS.keys() == reference.CELLS.keys()
    for gpu in (False, True):
        cases = [case for chosen in sets(gpu).values() for case in chosen.cases]
        assert {case.cell for case in cases} == CELLS.keys()


def test_operations_are_counted():
    assert CASE.flops() == 2 * 4 * 3 * 6 * (5 + 6)
    rows = int(DEEP.lengths().sum())
    assert rows < DEEP.T * DEEP.B and int(DEEP.lengths().max()) == DEEP.T
    assert DEEP.flops() == 2 * rows * 2 * 7 * ((3 + 7) + 2 * (14 + 7))
    assert gemm_bounds(CASE, 1e9)["step"] == pytest.approx(3 * CASE.flops() / 1e9)


# ------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("case", [CASE, DEEP, DEEP._replace(cell="rnn_tanh", layers=2)], ids=str)
def test_the_eager_loop_is_torch_nn(case):
    case = case._replace(dtype="float64")
    p = make_problem(case, CPU)
    models = [build(case, p.weights, CPU) for build in (build_eager, build_torch_nn)]
    both = [results_and_gradients(model, p) for model in models]
    assert len(both[0]) == len(names(case, p))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "tf32"])
@pytest.mark.parametrize("case", [CASE, DEEP._replace(cell="rnn_tanh")], ids=str)
def test_who_is_right_is_timed(case, dtype):
    rows = measured(case._replace(dtype=dtype))
    for name in ("torch-path", "torch.nn", "eager"):
        row = rows[name]
        assert row["status"] == MEASURED and row["complete"], row
        assert {len(row["samples"][figure]) for figure in timing.FIGURES} == {timing.MIN_TURNS}
        assert row["error"] < 10 * DTYPES[dtype].floor


def broken(fault):
    """A build of ours that is wrong somewhere."""

    def build(case, weights, device):
        model = PROVIDERS["eager"].build(case, weights, device)

        def forward(x):
            output, h_n = model.forward(x)
            if fault == "a little everywhere":
                output = output * (1 + 1e-4)
            elif fault == "one number":
                output = output.index_put([torch.tensor(i) for i in (1, 0, 2)], torch.tensor(0.5))
            elif fault == "NaN in the final state":
                h_n = h_n * torch.nan
            elif fault == "no gradient of the input":
                output = output + 0 * x.sum()
                output, h_n = model.forward(x.detach() + 0 * x)
            return output, h_n

        return Model(forward, model.parameters)

    return build


@pytest.mark.parametrize(
    "fault, tensor",
    [
        ("a little everywhere", "output"),
        ("one number", "output"),
        ("NaN in the final state", "h_n"),
        ("no gradient of the input", "d_x"),
    ],
)
def test_who_is_wrong_is_not_timed(fault, tensor, monkeypatch):
    replace(monkeypatch, "torch-path", build=broken(fault))
    rows = measured(CASE)
    assert rows["torch-path"]["status"] == WRONG and rows["torch-path"]["samples"] == {}
    assert rows["torch-path"]["reason"].startswith(f"{tensor} is off by")
    assert rows["eager"]["status"] == MEASURED


def test_the_oracle_runs_in_float64_without_our_code(monkeypatch):
    p = make_problem(CASE, CPU)
    monkeypatch.setattr(reference, "forward", None)
    assert {x.dtype for x in oracle(CASE, p)} == {torch.float64}


# ---------------------------------------------------------------------- who cannot, who crashes


def test_every_provider_says_why_it_cannot():
    rows = measured(CASE, list(PROVIDERS)[:1] + list(PROVIDERS)[5:])
    assert rows.keys() == {"fused", "flashrnn", "haste_pytorch"}
    assert rows["fused"]["reason"] == "the tensors are on cpu, not on a GPU"
    assert rows["flashrnn"]["reason"] == "flashrnn is not installed"
    assert rows["haste_pytorch"]["reason"] == "haste_pytorch has no rnn_tanh"
    tf32 = measured(CASE._replace(dtype="tf32"))
    assert {row["status"] for row in tf32.values()} == {CANNOT}
    assert tf32["torch.nn"]["reason"] == "tf32 is a mode of NVIDIA GPUs"


def test_compiled_says_why_it_cannot(monkeypatch):
    why_not = PROVIDERS["compiled"].why_not
    assert "unrolls the loop, 36 steps" in why_not(DEEP, CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler" in why_not(CASE, CPU)


def test_flashrnn_is_asked_for_what_it_has(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda package: object())
    why_not = PROVIDERS["flashrnn"].why_not
    assert why_not(CASE, torch.device("cuda")) is None
    assert why_not(CASE, CPU) == "flashrnn needs CUDA, and the device is cpu"
    assert why_not(DEEP, CPU) == "flashrnn has no rnn_relu"
    assert "one layer" in why_not(CASE._replace(layers=2), torch.device("cuda"))


def test_flashrnn_is_called_in_its_layout(monkeypatch):
    """Against a stand-in that computes by FlashRNN's documented shapes and meaning."""

    def flashrnn(x_gates, R, b, function, backend, dtype):
        assert (function, backend, dtype) == ("elman", "cuda_fused", "float64")
        B, T, G, heads, H = x_gates.shape
        assert (R.shape, b.shape) == ((G, heads, H, H), (G, heads, H))
        h, states = x_gates.new_zeros(B, H), []
        for t in range(T):
            h = torch.tanh(x_gates[:, t, 0, 0] + torch.einsum("dp,bp->bd", R[0, 0], h) + b[0, 0])
            states.append(h)
        states = torch.stack(states, 1)[None, :, :, None]  # (S, B, T, heads, D)
        return states, states[:, :, -1:]

    monkeypatch.setitem(__import__("sys").modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))
    replace(monkeypatch, "flashrnn", why_not=lambda case, device: None)
    rows = measured(CASE._replace(dtype="float64"))
    assert rows["flashrnn"]["status"] == MEASURED, rows["flashrnn"]


def crash_at(call):
    calls = []

    def build(case, weights, device):
        model = PROVIDERS["eager"].build(case, weights, device)

        def forward(x):
            calls.append(None)
            if len(calls) == call:
                raise ZeroDivisionError("of the test")
            return model.forward(x)

        return Model(forward, model.parameters)

    return build


@pytest.mark.parametrize("call", [1, 2, 8], ids=["in the check", "warming up", "when timed"])
def test_a_crash_names_itself_and_stops_nobody_else(call, monkeypatch):
    replace(monkeypatch, "torch-path", build=crash_at(call))
    rows = measured(CASE)
    crashed = rows["torch-path"]
    assert crashed["status"] == CRASHED and crashed["reason"] == "ZeroDivisionError: of the test"
    assert "forward" in crashed["traceback"]
    for name in ("torch.nn", "eager"):
        assert rows[name]["status"] == MEASURED
        assert len(rows[name]["samples"]["step"]) >= timing.MIN_TURNS


def test_out_of_memory_is_no_crash(monkeypatch):
    def build(case, weights, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    replace(monkeypatch, "torch-path", build=build)
    row = measured(CASE)["torch-path"]
    assert (row["status"], row["reason"]) == (CANNOT, "out of memory on the device")


# ------------------------------------------------------------------------------------ timing


def test_turns_begin_with_each_in_turn_and_lose_nothing():
    order, samples = [], {name: {} for name in "abc"}

    def turn(name):
        def call(i):
            order.append(name)
            if len(order) == 10:
                raise KeyboardInterrupt
            return {"step": float(i)}

        return call

    with pytest.raises(KeyboardInterrupt):
        interleave({name: turn(name) for name in "abc"}, 0.0, samples)
    assert "".join(order) == "abcbcacaba"
    assert [samples[name]["step"] for name in "abc"] == [[0.0, 1.0, 2.0]] * 3


def test_a_crash_in_a_turn_keeps_its_cause():
    with pytest.raises(CrashError) as caught:
        interleave({"a": lambda i: {"step": 1 / (i - 1)}}, 0.0, {"a": {}})
    assert caught.value.provider == "a" and isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
def test_saved_bytes_are_those_stated(layers, directions):
    """Beside `output`: h0, and where a layer has two directions the stacked weights."""
    T, B, I, H = 9, 4, 5, 6
    D = directions
    case = Case("rnn_tanh", T, B, I, H, layers=layers, bidirectional=D == 2)
    p = make_problem(case, CPU)
    model = PROVIDERS["torch-path"].build(case, p.weights, CPU)
    with saved_bytes([p.x, *model.parameters]) as count:
        results_and_gradients(model, p)
    widths = [I] + [D * H] * (layers - 1)
    weights = sum(4 * D * H * (width + H) for width in widths) if D == 2 else 0
    h0 = 4 * layers * D * B * H
    assert case.saved_bytes_per_step() == 4 * B * D * H
    assert count() == T * layers * case.saved_bytes_per_step() + h0 + weights


def test_a_line_is_found_and_what_is_none_is_told():
    a, b, residual = line_fit([(T, 100 + 3 * T) for T in (16, 256, 4096)])
    assert (a, b) == pytest.approx((100, 3)) and residual < 1e-9
    assert line_fit([(T, T * T) for T in (16, 256, 4096)])[2] > 0.5


def test_peak_memory_sees_what_is_freed_again():
    peak = peak_memory(lambda: torch.ones(16 << 20).sum(), CPU)  # 64 MiB
    if isinstance(peak, str):
        assert peak.startswith("not known: ")
    else:
        assert 60 << 20 < peak < 100 << 20


def test_peak_memory_says_why_it_is_not_known(monkeypatch):
    def refuse(path, mode="r"):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    called = []
    peak = peak_memory(lambda: called.append(1), CPU)
    assert peak.startswith("not known: ") and called == [1]


# ------------------------------------------------------------------- the GPU's half, with fakes


@pytest.fixture
def fake_cuda(monkeypatch):
    """Events that count milliseconds, and graphs that call again what was captured."""
    clock = SimpleNamespace(now=0, captured=[], refuse=None)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            clock.now += 1
            self.at = clock.now

        def elapsed_time(self, other):
            return float(other.at - self.at)

    class Nothing:
        def __init__(self, *args, **kwargs):
            if clock.refuse and args:
                raise RuntimeError(clock.refuse)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def wait_stream(self, other):
            pass

        def replay(self):
            clock.captured.append(None)

    cuda = torch.cuda
    for name in ("Stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(cuda, name, Nothing)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "current_stream", Nothing)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
    return clock


def test_a_gpu_is_timed_by_its_own_events(fake_cuda):
    watch = timing.Stopwatch(torch.device("cuda"))
    for _ in range(3):
        watch.mark()
    assert watch.laps() == [1e-3, 1e-3]


@pytest.mark.parametrize("kilobytes, copies", [(1, 64), (256, 8), (4096, 2)])
def test_inputs_rotate_past_l2(kilobytes, copies, fake_cuda):
    class OnGpu(SimpleNamespace):
        detach = clone = requires_grad_ = lambda self: self

    x = OnGpu(device=torch.device("cuda"), numel=lambda: kilobytes * 256, element_size=lambda: 4)
    assert len(timing.rotating(x)) == copies


def test_graphs_are_replayed_or_say_why_not(fake_cuda):
    p = make_problem(CASE, CPU)
    model = build_torch_nn(CASE, p.weights, CPU)
    xs = [p.x.clone().requires_grad_() for _ in range(10)]
    replay = timing.graphed(model, xs, p.d_results)
    assert replay(3).keys() == set(timing.GRAPHS) and len(fake_cuda.captured) == 2
    fake_cuda.refuse = "operation not permitted when stream is capturing"
    assert timing.graphed(model, xs, p.d_results).startswith("cannot be captured: operation not")
    fake_cuda.refuse = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        timing.graphed(model, xs, p.d_results)


def test_a_row_of_a_gpu_says_why_it_has_no_graph(fake_cuda, monkeypatch):
    monkeypatch.setattr(measuring, "on_gpu", lambda device: True)
    fake_cuda.refuse = "stream is capturing"
    row = measured(CASE)["torch.nn"]
    assert row["status"] == MEASURED and row["graph_reason"].startswith("cannot be captured")
    fake_cuda.refuse = None
    assert timing.GRAPHS[1] in measured(CASE)["torch.nn"]["samples"]


def test_the_bound_of_a_gpu_is_the_model_of_bench_compiled(fake_cuda, monkeypatch):
    from bench import compiled
    from rnn import functional
    from rnn.kernels.chips import CHIPS

    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(functional, "device_limits", lambda device: CHIPS["sm_90"].limits())
    jobs = []

    def rows_of_all(some):
        jobs.extend(some)
        return {some[0]: [{"bound ns": 100.0}, {"bound ns": 150.0}]}

    monkeypatch.setattr(compiled, "rows_of_all", rows_of_all)
    case = Case("rnn_tanh", 10, 16, 64, 64, layers=2)
    bounds = timing.model_bounds(case, device)
    assert bounds == pytest.approx({"forward": 2e-6, "backward": 3e-6, "step": 5e-6})
    assert jobs[0].target == "sm_90" and jobs[0].dtype == "float32-ieee"
    too_large = timing.model_bounds(case._replace(H=8192), device)
    assert too_large.startswith("no kernel to model: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert timing.model_bounds(case, device) == "no model of T4"
