"""python -m bench: what it measures is right, and who is not right is not measured."""

from types import SimpleNamespace

import pytest
import torch

from bench import providers, timing
from bench.cases import CELLS, DTYPES, Case, quick, sets
from bench.check import make_problem, names, oracle, results_and_gradients
from bench.measure import CANNOT, CRASHED, MEASURED, WRONG, measure
from bench.providers import PROVIDERS, Model, build_eager, build_torch_nn
from bench.timing import gemm_bounds
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
                output = output.index_put(
                    [torch.tensor(i) for i in (1, 0, 2)], output.new_tensor(0.5)
                )
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


def test_one_wrong_number_among_many_is_found(monkeypatch):
    """In bfloat16 it is lost in the mean of what rounding does."""
    replace(monkeypatch, "torch-path", build=broken("one number"))
    row = measured(Case("rnn_tanh", 64, 16, 16, 16, dtype="bfloat16"))["torch-path"]
    assert row["status"] == WRONG and "(largest)" in row["reason"]
    assert row["error"] < 2e-2


def test_torch_nn_too_is_wrong_where_it_is_nan(monkeypatch):
    replace(monkeypatch, "torch.nn", build=broken("NaN in the final state"))
    rows = measured(CASE)
    assert rows["torch.nn"]["status"] == WRONG
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
