"""Clocks, memory and bounds of python -m bench; of its GPU half what fakes can show."""

from types import SimpleNamespace

import pytest
import torch

from bench import measure as measuring
from bench import timing
from bench.cases import Case
from bench.check import make_problem, results_and_gradients
from bench.measure import MEASURED, measure
from bench.providers import PROVIDERS, build_torch_nn
from bench.report import line_fit
from bench.timing import CrashError, gemm_bounds, interleave, peak_memory, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CASE = Case("rnn_tanh", T=4, B=3, I=5, H=6)


def measured_torch_nn():
    rows = {}
    measure(CASE, ["torch.nn"], CPU, 0.0, lambda case: gemm_bounds(case, 1e9), rows)
    return rows["torch.nn"]


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
        kept = []
        kept_peak = peak_memory(lambda: kept.append(torch.ones(16 << 20)), CPU)
        assert 60 << 20 < kept_peak < 100 << 20


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
    row = measured_torch_nn()
    assert row["status"] == MEASURED and row["graph_reason"].startswith("cannot be captured")
    fake_cuda.refuse = None
    assert timing.GRAPHS[1] in measured_torch_nn()["samples"]


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
