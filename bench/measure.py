"""One case, all providers: checked against float64, then timed in turns."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnn.modules import cell_named

from .cases import DTYPES, Case
from .providers import PROVIDERS, CannotError, Model, Weights, build_loop, construct

MIN_ROUNDS, MAX_ROUNDS = 5, 50
FIGURES = ("forward", "backward", "step")
MEASURED, CANNOT, WRONG, CRASHED = "measured", "cannot", "wrong", "crashed"


class Time(NamedTuple):
    """Seconds."""

    median: float
    low: float  # the quantile of 20 %
    high: float  # of 80 %

    @classmethod
    def of(cls, samples: list[float]) -> "Time":
        fifths = quantiles(samples, n=5, method="inclusive")
        return cls(*(float(f"{s:.4g}") for s in (median(samples), fifths[0], fifths[-1])))


@dataclass
class Row:
    """One provider on one case."""

    case: str
    provider: str
    status: str = ""  # MEASURED, CANNOT, WRONG or CRASHED
    reason: str = ""  # why it was not measured
    ran: str = ""  # of ours: which backend ran, and why
    error: float | None = None  # relative; the worst of all tensors
    times: dict[str, Time] = field(default_factory=dict)  # by figure; empty if not measured


def measure(
    case: Case, providers: Sequence[str], device: torch.device, seconds: float
) -> list[Row]:
    """A row for each provider. `seconds` is for the timing of all of them together."""
    problem = make_problem(case, device)
    rows = {name: Row(str(case), name) for name in providers}
    with precision(case.dtype):
        models = right_models(case, problem, rows)
        time_in_turns(models, problem, rows, seconds)
    return list(rows.values())


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let products of float32 be rounded to tf32, or not, as the dtype of a case says."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = DTYPES[dtype].tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def reported(row: Row) -> Iterator[None]:
    """What is raised inside ends the row, not the run."""
    try:
        yield
    except CannotError as error:
        row.status, row.reason = CANNOT, str(error)
    except torch.OutOfMemoryError:
        row.status, row.reason = CANNOT, "out of memory on the device"
    except Exception as error:
        traceback.print_exc()
        row.status, row.reason = CRASHED, f"{type(error).__name__}: {error}".splitlines()[0]


# ------------------------------------------------------------------------------------- check


class Problem(NamedTuple):
    x: Tensor  # (T, B, I)
    weights: Weights
    d_results: list[Tensor]  # the gradients of the output and of each last state

    def to(self, device: torch.device, dtype: torch.dtype) -> "Problem":
        weights = {name: w.to(device, dtype) for name, w in self.weights.items()}
        d_results = [d.to(device, dtype) for d in self.d_results]
        return Problem(self.x.to(device, dtype), weights, d_results)


def make_problem(case: Case, device: torch.device) -> Problem:
    """Seeded; the weights as the modules initialise them, all rounded to the dtype of the case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = construct(case).state_dict()
        x = torch.randn(case.T, case.B, case.I)
        last = case.layers * case.directions, case.B, case.H
        d_results = [torch.randn(case.T, case.B, case.directions * case.H)]
        d_results += [torch.randn(last) for _ in range(cell_named(case.cell).states)]
    return Problem(x, weights, d_results).to(device, DTYPES[case.dtype].torch)


def results_and_gradients(model: Model, p: Problem) -> list[Tensor]:
    """Output, last states, and the gradients of x and of the parameters, in their order."""
    x = p.x.detach().requires_grad_()
    results = model.forward(x)
    gradients = torch.autograd.grad(results, [x, *model.parameters], p.d_results)
    return [*(result.detach() for result in results), *gradients]


def error_of(got: Tensor, exact: Tensor, norm: float) -> float:
    """The norm of the difference / that of the exact tensor; inf where something is not finite."""
    if got.shape != exact.shape or not got.isfinite().all():
        return math.inf
    off, size = (got.to(exact) - exact).norm(norm), exact.norm(norm)
    return float(off / size.clamp_min(torch.finfo(exact.dtype).tiny))


def right_models(case: Case, p: Problem, rows: dict[str, Row]) -> dict[str, Model]:
    """The models that may be timed; the rows of the others say why they may not.

    The exact values are those of the equation in float64 on the CPU, from the same numbers. Allowed
    is twice the error of torch.nn in the dtype of the case (where it lacks the cell: of the
    equation), which is run for that even if nobody asked for it, plus a floor.
    """
    doubles = p.to(torch.device("cpu"), torch.float64)
    exact = results_and_gradients(build_loop(case, doubles.weights), doubles)
    names = ["output", *(f"state {s}" for s in range(len(p.d_results) - 1)), "d_x"]
    names += [f"d_{name}" for name in p.weights]
    # The largest error, but at relu's kink rounding decides between a gradient and none.
    norm = 2.0 if case.cell == "rnn_relu" else math.inf
    models: dict[str, Model] = {}
    allowed = [DTYPES[case.dtype].floor] * len(names)
    first = "torch.nn"
    try:
        PROVIDERS[first](case, p.weights)
    except CannotError:  # it has no such cell
        first = "loop"
    for provider in sorted({first, *rows}, key=lambda name: name != first):
        row = rows.get(provider, Row(str(case), provider))
        with reported(row):
            model = PROVIDERS[provider](case, p.weights)
            row.ran = model.ran
            got = results_and_gradients(model, p)
            errors = [error_of(*pair, norm) for pair in zip(got, exact, strict=True)]
            if math.isfinite(max(errors)):
                row.error = float(f"{max(errors):.3g}")
                if provider == first:
                    allowed = [bound + 2 * error for bound, error in zip(allowed, errors)]
            for name, error, bound in zip(names, errors, allowed, strict=True):
                if error > bound and not row.status:
                    row.status = WRONG
                    row.reason = f"{name} is off by {error:.1e}, allowed is {bound:.1e}"
        if provider in rows and not row.status:
            models[provider] = model
    return models


# ------------------------------------------------------------------------------------ timing


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and the result. On a GPU the device's seconds, by its own events."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result
    torch.cuda._sleep(5_000_000)  # some ms for the host to get ahead: else launches are timed
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    result = call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, result


def turn(model: Model, x: Tensor, d_results: list[Tensor]) -> dict[str, float]:
    """The seconds of a forward pass without a graph, and of a training step and its second part."""
    with torch.no_grad():
        forward, _ = timed(lambda: model.forward(x), x.device)
    recorded, results = timed(lambda: model.forward(x), x.device)
    leaves = [x, *model.parameters]
    backward, _ = timed(lambda: torch.autograd.grad(results, leaves, d_results), x.device)
    return {"forward": forward, "backward": backward, "step": recorded + backward}


def time_in_turns(
    models: dict[str, Model], p: Problem, rows: dict[str, Row], seconds: float
) -> None:
    """Fill the rows. Each round begins with another provider; the first is a warm-up."""
    x = p.x.detach().requires_grad_()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    end = math.inf
    for i in range(1 + MAX_ROUNDS):
        if i == 1:
            end = time.perf_counter() + seconds
        if i > MIN_ROUNDS and time.perf_counter() > end:
            break
        names = list(models)
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            with reported(rows[name]):
                rounds[name].append(turn(models[name], x, p.d_results))
            if rows[name].status:
                del models[name]
    for name in models:
        samples = {figure: [s[figure] for s in rounds[name][1:]] for figure in FIGURES}
        rows[name].times = {figure: Time.of(samples[figure]) for figure in FIGURES}
        rows[name].status = MEASURED
