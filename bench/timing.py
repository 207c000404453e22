"""Time, memory and what is saved for backward; the lower bounds that a time is held against."""

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .cases import DTYPES, Case
from .providers import Model, precision

MIN_TURNS, MAX_TURNS = 5, 100
FIGURES = ("forward", "backward", "step")  # forward without a graph; step: forward and backward
GRAPHS = ("forward, graph", "step, graph")  # the same, replayed as a CUDA graph
Figures = dict[str, float]  # seconds
Samples = dict[str, list[float]]


class CrashError(Exception):
    """A provider failed in a way that nobody foresaw; its cause is what it raised."""

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self.provider = provider


class Stopwatch:
    """mark() now and again; laps() are the seconds in between. On a GPU the device's own events,
    so that what the host is ahead is not counted."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:])
        if not self.gpu:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def rotating(x: Tensor) -> list[Tensor]:
    """Inputs to be taken in turns: on a GPU together twice as large as L2, but at most 64, so
    that none is found there from the turn before. On a CPU x alone."""
    copies = 1
    if x.device.type == "cuda":
        l2 = torch.cuda.get_device_properties(x.device).L2_cache_size
        copies = min(64, max(2, math.ceil(2 * l2 / (x.numel() * x.element_size()))))
    return [x.detach().clone().requires_grad_() for _ in range(copies)]


def turn(model: Model, xs: list[Tensor], d_results: list[Tensor], i: int) -> Figures:
    """One forward pass without a graph, one training step."""
    watch = Stopwatch(xs[0].device)
    with torch.no_grad():
        watch.mark()
        model.forward(xs[2 * i % len(xs)])
        watch.mark()
    x = xs[(2 * i + 1) % len(xs)]
    watch.mark()
    results = model.forward(x)
    watch.mark()
    torch.autograd.grad(results, [x, *model.parameters], d_results)
    watch.mark()
    forward, _, recorded, backward = watch.laps()
    return {"forward": forward, "backward": backward, "step": recorded + backward}


def interleave(
    turns: dict[str, Callable[[int], Figures]],
    seconds: float,
    samples: dict[str, Samples],
) -> None:
    """Call all in turns until the time is up, each turn beginning with another, and append to
    `samples` as they come, so that an interrupt loses none. Raises CrashError."""
    names = list(turns)
    end = time.perf_counter() + seconds
    for i in range(MAX_TURNS):
        if i >= MIN_TURNS and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            try:
                figures = turns[name](i)
            except Exception as error:
                raise CrashError(name) from error
            for figure, value in figures.items():
                samples.setdefault(name, {}).setdefault(figure, []).append(value)


def graphed(
    model: Model, xs: list[Tensor], d_results: list[Tensor]
) -> Callable[[int], Figures] | str:
    """A turn of replayed CUDA graphs, or why there is none. A graph has its input in one place:
    there is one for each of up to 8 inputs, all in one memory pool."""
    xs = xs[:8]

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            model.forward(x)

    def step(x: Tensor) -> None:
        torch.autograd.grad(model.forward(x), [x, *model.parameters], d_results)

    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, list[Any]] = {}
    try:
        for name, call in zip(GRAPHS, (forward, step)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a warm-up on another stream: capturing asks for it
                call(xs[0])
            torch.cuda.current_stream().wait_stream(side)
            graphs[name] = []
            for x in xs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    call(x)
                graphs[name].append(graph)
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        torch.cuda.synchronize()
        return f"cannot be captured: {str(error).splitlines()[0]}"

    def replay(i: int) -> Figures:
        figures = {}
        for name in GRAPHS:
            watch = Stopwatch(xs[0].device)
            watch.mark()
            graphs[name][i % len(xs)].replay()
            watch.mark()
            figures[name] = watch.laps()[0]
        return figures

    return replay


# ------------------------------------------------------------------------------------ memory


@contextmanager
def saved_bytes(leaves: list[Tensor]) -> Iterator[Callable[[], int]]:
    """Within it, what autograd saves is counted: bytes of unique storages without the leaves'."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(saved.values())


def process_status(field: str) -> int:
    """Bytes, from /proc/self/status (Linux)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def peak_memory(call: Callable[[], object], device: torch.device) -> int | str:
    """Bytes that the call needed beyond those that were in use before, or why that is not known.

    On a CPU: the high-water mark of resident memory, set back before; it counts pages.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        call()
        return f"not known: {sys.platform} has no /proc/self/clear_refs"
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed and kept would hide what is needed
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        call()
        return f"not known: the kernel does not set its mark back ({error.strerror})"
    before = process_status("VmRSS")
    call()
    return max(0, process_status("VmHWM") - before)


# ------------------------------------------------------------------------------ lower bounds


def gemm_rate(dtype: str, device: torch.device, seconds: float = 0.2) -> float:
    """Floating-point operations a second of a square product: the best of all sizes, 64 and up as
    long as one takes no longer than `seconds`, and of what fits in that time for each."""
    best, n = 0.0, 64
    with precision(dtype):
        while n <= 2048:
            a, b = (torch.randn(n, n).to(device, DTYPES[dtype].torch) for _ in range(2))
            a @ b  # the first one prepares things
            times: list[float] = []
            end = time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                watch = Stopwatch(device)
                watch.mark()
                a @ b
                watch.mark()
                times += watch.laps()
            best = max(best, 2.0 * n**3 / min(times))
            if 8 * min(times) > seconds:
                break  # the next size would take too long
            n *= 2
    return best


def gemm_bounds(case: Case, rate: float) -> Figures:
    """Seconds that the products of a case take at the rate of a large product."""
    forward = case.flops() / rate
    return {"forward": forward, "backward": 2 * forward, "step": 3 * forward}


def model_bounds(case: Case, device: torch.device) -> Figures | str:
    """Seconds that the steps of a case cannot come below on this GPU by the model of
    bench/compiled.py (which see), or why it says nothing. The kernels are compiled for it in
    processes of their own."""
    from rnn.functional import choose
    from rnn.kernels.chips import CHIPS
    from rnn.kernels.plan import NoPlan

    from .compiled import Job, rows_of_all

    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if torch.version.hip is not None or target not in CHIPS:
        return f"no model of {torch.cuda.get_device_name(device)}"
    dtype = {"float32": "float32-ieee", "tf32": "float32"}.get(case.dtype, case.dtype)
    with precision(case.dtype):
        torch_dtype = DTYPES[case.dtype].torch
        found = choose("auto", case.cell, case.H, case.B, case.directions, torch_dtype, device)
    if isinstance(found, NoPlan):
        return f"no kernel to model: {found.why}"
    job = Job(target, case.cell, case.H, dtype, lengths=case.packed, batch=case.B)
    bounds: Figures = {}
    for row, figure in zip(rows_of_all([job])[job], FIGURES):
        if "bound ns" not in row:
            return f"no model: {row['verdict']}"
        bounds[figure] = case.steps * len(found.grids()) * row["bound ns"] / 1e9
    return bounds | {"step": bounds["forward"] + bounds["backward"]}
