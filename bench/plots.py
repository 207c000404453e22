"""Pictures of the results, from the JSON alone. Each is left out where it would be empty."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from .cases import Case
from .measure import Row
from .providers import PROVIDERS
from .results import Results, summaries
from .timing import FIGURES

COLOURS = dict(zip(PROVIDERS, ("C3", "C0", "black", "C1", "C2", "C4", "C5")))
OURS = ("fused", "torch-path")


def of_axis(results: Results, axis: str) -> list[Case]:
    """The cases of all sets that sweep this field."""
    sets = [s for s in results.header["sets"].values() if s["axis"] == axis]
    return [Case.parse(name) for name in dict.fromkeys(n for s in sets for n in s["cases"])]


def row_of(results: Results, case: Case, provider: str) -> Row:
    return results.rows.get(str(case), {}).get(provider, {})


def sweep(results: Results, axis: str, title: str) -> Figure | None:
    """Microseconds per time step of all providers against one field, a panel for each figure."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    drawn = False
    for axes, name in zip(figure.subplots(1, 3, sharey=True), FIGURES):
        for provider, colour in COLOURS.items():
            points = []
            for case in of_axis(results, axis):
                found = summaries(row_of(results, case, provider)).get(name)
                if found:
                    us = [1e6 * x / case.steps for x in (found.median, found.low, found.high)]
                    points.append((getattr(case, axis), *us))
            if not points:
                continue
            drawn = True
            x, middle, low, high = zip(*sorted(points))
            axes.plot(x, middle, "o-", color=colour, label=provider, markersize=4)
            axes.fill_between(x, low, high, color=colour, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("µs per time step")
    if drawn:
        figure.legend(*legend_of(figure), loc="outside right upper")
    return figure if drawn else None


def legend_of(figure: Figure) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each provider once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def heat_map(results: Results) -> Figure | None:
    """How many times as fast as torch.nn ours is, over B and H."""
    cases = of_axis(results, "grid")
    ours = [p for p in OURS if any(summaries(row_of(results, c, p)) for c in cases)]
    if not ours:
        return None
    rows, columns = sorted({c.H for c in cases}), sorted({c.B for c in cases})
    figure = Figure(figsize=(13, 3.6 * len(ours)), layout="constrained")
    panels = figure.subplots(len(ours), 3, squeeze=False)
    for axes, (provider, name) in zip(panels.flat, ((p, f) for p in ours for f in FIGURES)):
        table = [[math.nan] * len(columns) for _ in rows]
        for case in cases:
            mine = summaries(row_of(results, case, provider)).get(name)
            theirs = summaries(row_of(results, case, "torch.nn")).get(name)
            if mine and theirs:
                table[rows.index(case.H)][columns.index(case.B)] = theirs.median / mine.median
        logs = [[math.log2(ratio) for ratio in line] for line in table]
        axes.imshow(logs, cmap="RdYlGn", norm=TwoSlopeNorm(0, -2, 2), aspect="auto", origin="lower")
        for i, line in enumerate(table):
            for j, ratio in enumerate(line):
                axes.text(j, i, "none" if math.isnan(ratio) else f"{ratio:.2f}", ha="center")
        axes.set_xticks(range(len(columns)), [str(B) for B in columns])
        axes.set_yticks(range(len(rows)), [str(H) for H in rows])
        axes.set_xlabel("B")
        axes.set_ylabel("H")
        axes.set_title(f"{name}: torch.nn / {provider}")
    return figure


def memory(results: Results) -> Figure | None:
    """Bytes against T: saved for backward, and the peak of a training step."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    drawn = False
    kinds = {"saved_bytes": "saved for backward", "peak_bytes": "peak of a training step"}
    for axes, (key, title) in zip(figure.subplots(1, 2), kinds.items()):
        for provider, colour in COLOURS.items():
            found = [(c.T, row_of(results, c, provider).get(key)) for c in of_axis(results, "T")]
            points = sorted((T, size) for T, size in found if isinstance(size, int) and size > 0)
            if points:
                drawn = True
                axes.plot(*zip(*points), "o-", color=colour, label=provider, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("T")
        axes.set_ylabel("bytes")
        axes.grid(alpha=0.3)
    if drawn:
        figure.legend(*legend_of(figure), loc="outside right upper")
    return figure if drawn else None


def error_against_time(results: Results) -> Figure | None:
    """Every row that was timed: its error, and the time of its training step by torch.nn's."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for provider, colour in COLOURS.items():
        points = []
        for providers in results.rows.values():
            mine = summaries(providers.get(provider, {})).get("step")
            theirs = summaries(providers.get("torch.nn", {})).get("step")
            if mine and theirs:
                # An oracle in the same dtype is met exactly: a logarithm needs a number.
                error = max(providers[provider]["error"], 1e-17)
                points.append((mine.median / theirs.median, error))
        if points:
            drawn = True
            x, y = zip(*points)
            axes.scatter(x, y, s=12, color=colour, label=provider, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("time of a training step / that of torch.nn")
    axes.set_ylabel("relative error against float64")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()
    return figure if drawn else None


def draw(results: Results, out: Path) -> dict[str, str]:
    """Write the pictures; returns their titles by file name."""
    figures: Iterable[tuple[str, str, Any]] = [
        ("hidden_size.png", "Time per step against H", sweep(results, "H", "H")),
        ("grid.png", "Ratio to torch.nn over B and H", heat_map(results)),
        ("steps.png", "Time per step against T", sweep(results, "T", "T")),
        ("memory.png", "Memory against T", memory(results)),
        ("batch.png", "Time per step against B", sweep(results, "B", "B")),
        ("error.png", "Error against time", error_against_time(results)),
    ]
    drawn = {}
    for name, title, figure in figures:
        if figure is not None:
            figure.savefig(out / name, dpi=90)
            drawn[name] = title
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier run
    return drawn
