"""One case, all providers: checked, then timed in turns."""

import gc
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .cases import Case
from .check import Problem, errors, make_problem, names, oracle, results_and_gradients, why_wrong
from .providers import PROVIDERS, Model, precision
from .timing import (
    CrashError,
    Figures,
    graphed,
    interleave,
    peak_memory,
    rotating,
    saved_bytes,
    turn,
)

# Of one provider on one case, as it is kept in JSON. "status" is one of STATUS; "reason" says why
# it is not the first; "complete" tells whether all its time was had.
Row = dict[str, Any]
MEASURED, CANNOT, WRONG, CRASHED = STATUS = ("measured", "cannot", "wrong", "crashed")
Bounds = Callable[[Case], Figures | str]


def measure(
    case: Case,
    chosen: list[str],
    device: torch.device,
    seconds: float,
    bounds: Bounds,
    rows: dict[str, Row],
) -> None:
    """Fill `rows` (by provider) as figures come, so that an interrupt loses none. Samples that
    are there already, of an interrupted run, are added to."""
    for name in chosen:
        rows.setdefault(name, {"samples": {}, "complete": False})
    reasons = {name: provider.why_not(case, device) for name, provider in PROVIDERS.items()}
    able = [name for name in chosen if reasons[name] is None]
    for name in chosen:
        if (why := reasons[name]) is not None:
            rows[name] |= cannot(why)
    if able:
        with precision(case.dtype):
            measure_able(case, able, device, seconds, bounds, rows)


def measure_able(
    case: Case,
    able: list[str],
    device: torch.device,
    seconds: float,
    bounds: Bounds,
    rows: dict[str, Row],
) -> None:
    try:
        p = make_problem(case, device)
        models = check(case, p, able, device, rows)
    except Exception as error:  # of the oracle: nobody can be checked
        for name in able:
            rows[name] |= failed(error)
        return
    xs = rotating(p.x)
    turns: dict[str, Callable[[int], Figures]] = {}
    limit = bounds(case) if models else ""
    for name, model in models.items():
        plain = one_turn(model, xs, p)
        try:
            plain(0)  # the warm-up: what is compiled at first use is compiled here
            rows[name]["peak_bytes"] = peak_memory(partial(plain, 0), device)
            turns[name] = with_graphs(model, xs, p, plain, rows[name]) if on_gpu(device) else plain
        except Exception as error:
            rows[name] |= failed(error)
            continue
        rows[name] |= {"bound": limit, "inputs": len(xs), "status": MEASURED}
    gc.collect()
    while turns:
        try:
            interleave(turns, seconds, {name: rows[name]["samples"] for name in turns})
            break
        except CrashError as crash:
            rows[crash.provider] |= failed(crash.__cause__)
            del turns[crash.provider]
    for name in turns:
        rows[name]["complete"] = True


def cannot(why: str) -> Row:
    return {"status": CANNOT, "reason": why, "samples": {}, "complete": True}


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def one_turn(model: Model, xs: list[torch.Tensor], p: Problem) -> Callable[[int], Figures]:
    return lambda i: turn(model, xs, p.d_results, i)


def with_graphs(
    model: Model,
    xs: list[torch.Tensor],
    p: Problem,
    plain: Callable[[int], Figures],
    row: Row,
) -> Callable[[int], Figures]:
    """The turn of a GPU: what is launched, and what is replayed where it could be captured."""
    for i in range(3):
        plain(i)
    replay = graphed(model, xs, p.d_results)
    if isinstance(replay, str):
        row["graph_reason"] = replay
        return plain
    return lambda i: plain(i) | replay(i)


def failed(error: BaseException | None) -> Row:
    """The fields of a row whose provider raised: the one error that is foreseen, or a crash."""
    if isinstance(error, torch.OutOfMemoryError):
        return cannot("out of memory on the device")
    assert error is not None
    last = f"{type(error).__name__}: {error}".splitlines()[0]
    text = "".join(traceback.format_exception(error))
    return {"status": CRASHED, "reason": last, "traceback": text, "complete": True}


def check(
    case: Case, p: Problem, able: list[str], device: torch.device, rows: dict[str, Row]
) -> dict[str, Model]:
    """The models of those who are right. torch.nn comes first, asked for or not: the others are
    held against twice its error."""
    want = oracle(case, p)
    models: dict[str, Model] = {}
    theirs = None
    for name in ["torch.nn", *(name for name in able if name != "torch.nn")]:
        row = rows.get(name, {}) if name in able else {}
        try:
            build = PROVIDERS[name].build
            assert build is not None, f"{name} said that it can run {case}"
            model = build(case, p.weights, device)
            with saved_bytes([p.x, *model.parameters]) as count:
                got = results_and_gradients(model, p)
        except Exception as error:
            row |= failed(error)
            continue
        mine = errors(got, want)
        theirs = theirs or mine
        worst, tensor = max((error.rms, of) for error, of in zip(mine, names(case, p)))
        row |= {"saved_bytes": count(), "error": worst, "error_of": tensor}
        row["largest_error"] = max(error.largest for error in mine)
        wrong = why_wrong(case, p, mine, theirs)
        if wrong:
            row |= {"status": WRONG, "reason": wrong, "complete": True}
        elif name in able:
            models[name] = model
    return models
