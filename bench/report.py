"""The report page, from the JSON alone. It says what was measured; what follows from it is left
to the reader."""

from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Any

from .cases import Case
from .measure import Row
from .plots import OURS, of_axis, row_of
from .providers import PROVIDERS
from .results import Results, Summary, reason, summaries
from .timing import FIGURES, GRAPHS, MAX_TURNS, MIN_TURNS

HOW = f"""\
All providers of a case run in one process, in turns, each turn beginning with another: at least
{MIN_TURNS} turns, at most {MAX_TURNS}. Before, each is held against `torch.nn` in float64 on the
same numbers: output, final state and every gradient. Whoever is further off than twice `torch.nn`
in the same dtype, plus a floor, is reported as wrong and not timed.

- *forward* is without a graph, *step* is forward and backward, *backward* the latter's second
  part. Gradients are taken of the input and of all parameters.
- µs: median of microseconds per time step, and in brackets the quantiles of 20 % and 80 %. The
  steps of a case are T x L; both directions of a layer share a step. Input projections, and for
  rows of different length packing and padding, are in all times.
- x: median of `torch.nn` / median; above 1 is faster than `torch.nn`.
- error: root mean square, relative, the worst of output, final state and gradients.
- peak: bytes that a training step needs beyond input and parameters. On a CPU by the high-water
  mark of resident memory: pages, so small figures are coarse.
- saved: bytes that autograd keeps for backward, without input and parameters.
- On a GPU times are the device's events. The inputs rotate, together twice as large as L2 where 64
  of them suffice. *graph* is the same replayed as a CUDA graph.
- bound: the lower bound of a training step / its time. On a CPU the operations of its products at
  the best rate of square products, measured in the same run, which its own may surpass; on a GPU
  the model of `bench/compiled.py`, which is no measurement.
"""


def number(value: Any, scale: float = 1.0) -> str:
    return f"{value / scale:.3g}" if isinstance(value, int | float) else str(value)


def per_step(s: Summary, case: Case) -> str:
    us = 1e6 / case.steps
    return f"{s.median * us:.4g} [{s.low * us:.3g}, {s.high * us:.3g}]"


def bound_share(row: Row) -> str:
    bound, step = row.get("bound"), summaries(row).get("step")
    if not isinstance(bound, dict) or step is None:
        return str(bound)
    return f"{100 * bound['step'] / step.median:.0f} %"


def headings(gpu: bool) -> list[str]:
    timed = [f"{name} µs | x" for name in (*FIGURES, *(GRAPHS if gpu else ()))]
    return ["case", "provider", "error", *timed, "peak MB", "saved MB", "bound"]


def cells(results: Results, case: Case, provider: str) -> list[str]:
    """One line of a table: the figures of a provider, or why it has none."""
    row = row_of(results, case, provider)
    mine = summaries(row)
    theirs = summaries(row_of(results, case, "torch.nn"))
    error = number(row["error"]) if "error" in row else "-"
    if not mine:
        return [f"`{case}`", provider, error, reason(row)]
    timed = []
    for name in (*FIGURES, *(GRAPHS if results.header["gpu"] else ())):
        if name not in mine:
            timed.append(row.get("graph_reason", "interrupted before"))
            timed.append("-")
            continue
        timed.append(per_step(mine[name], case))
        ratio = (
            f"{theirs[name].median / mine[name].median:.2f}" if name in theirs else "no torch.nn"
        )
        timed.append(ratio)
    peak, saved = (number(row.get(key), 1e6) for key in ("peak_bytes", "saved_bytes"))
    return [f"`{case}`", provider, error, *timed, peak, saved, bound_share(row)]


WIDTHS = (13, 8, *(26, 6) * (len(FIGURES) + len(GRAPHS)))


def terminal(results: Results, case: Case, providers: Sequence[str]) -> str:
    """The lines of a case under its name, in columns."""
    lines = [str(case)]
    for provider in providers:
        _, *rest = cells(results, case, provider)
        if len(rest) == 3:
            widths: tuple[int, ...] = (13, 8, 0)
        else:
            widths = (*WIDTHS[: len(rest) - 3], 8, 8, 6)
        lines.append("  " + " ".join(cell.ljust(width) for cell, width in zip(rest, widths)))
    return "\n".join(line.rstrip() for line in lines)


def table(lines: Sequence[Sequence[str]], head: str) -> str:
    width = head.count("|") + 1
    padded = [[*line, *[""] * (width - len(line))] for line in lines]
    rows = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([f"| {head} |", "|" + "---|" * width, *rows])


def set_table(results: Results, cases: list[Case]) -> str:
    lines = [
        cells(results, case, provider)
        for case in cases
        for provider in PROVIDERS
        if provider in results.rows.get(str(case), {})
    ]
    return table(lines, " | ".join(headings(results.header["gpu"])))


def in_short(results: Results) -> str:
    """For each set, torch.nn / ours: where ours is behind most comes first."""
    found = []
    for chosen in results.header["sets"].values():
        for provider in OURS:
            ratios: dict[str, list[float]] = {name: [] for name in FIGURES}
            for case in chosen["cases"]:
                mine, theirs = (
                    summaries(results.rows.get(case, {}).get(name, {}))
                    for name in (provider, "torch.nn")
                )
                for name in mine.keys() & theirs.keys() & ratios.keys():
                    ratios[name].append(theirs[name].median / mine[name].median)
            if all(ratios.values()):
                figures = [
                    f"{min(r):.2f}, {geometric_mean(r):.2f}, {sum(x < 1 for x in r)} of {len(r)}"
                    for r in ratios.values()
                ]
                least = min(min(r) for r in ratios.values())
                found.append((least, [chosen["title"], provider, *figures]))
    lines = [line for _, line in sorted(found)]
    return table(lines, " | ".join(["cases", "provider", *FIGURES]))


WORST = 6  # cases that a quotation names
MARKS = ("<!-- bench -->\n", "<!-- /bench -->")


def quote(results: Results, folder: str) -> str:
    """What a README says of a page of results, between the MARKS."""
    header, rows = results.header, behind_rows(results, OURS)
    worst = "; ".join(f"{r:.2f} `{case}` {figure}" for r, _, case, figure in rows[:WORST])
    return (
        f"{header['device']}, {header['threads']} threads, PyTorch {header['versions']['torch']}, "
        f"commit {header['commit']}; all figures and pictures: [{folder}]({folder}/README.md). "
        "Given is the time of `torch.nn` / ours: above 1 is faster.\n\n"
        + (f"Ours is behind in {len(rows)} figures, and most in: {worst}.\n\n" if rows else "")
        + "The least of all cases, their geometric mean, and in how many ours is behind; the worst "
        f"come first:\n\n{in_short(results)}\n"
    )


def put_between(text: str, new: str) -> str:
    """The text with what lies between the MARKS replaced. ValueError where they are not there."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return before + MARKS[0] + new + MARKS[1] + after


# -------------------------------------------------------------------------------------- fits


def line_fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """a, b of y = a + b x with the least sum of squared relative residuals, and the largest of
    these. Weighted so, a long sequence does not outweigh the others."""
    s = [[0.0, 0.0], [0.0, 0.0]]
    r = [0.0, 0.0]
    for x, y in points:
        basis = (1 / y, x / y)
        for i in range(2):
            r[i] += basis[i]
            for j in range(2):
                s[i][j] += basis[i] * basis[j]
    determinant = s[0][0] * s[1][1] - s[0][1] * s[1][0]
    a = (r[0] * s[1][1] - r[1] * s[0][1]) / determinant
    b = (r[1] * s[0][0] - r[0] * s[1][0]) / determinant
    return a, b, max(abs(a + b * x - y) / y for x, y in points)


def fits(results: Results) -> str:
    """Time and memory against T: y = a + b T for each provider and figure."""
    cases = of_axis(results, "T")
    lines = []
    for provider in PROVIDERS:

        def add(name: str, unit: str, value: Callable[[Case, Row], float | None]) -> None:
            rows = [(case, row_of(results, case, provider)) for case in cases]  # noqa: B023
            points = [(c.T, y) for c, row in rows if row and (y := value(c, row))]
            if len(points) < 3:
                return
            a, b, residual = line_fit(points)
            at = ", ".join(f"{y / T:.4g}" for T, y in points)
            figures = [f"{a:.4g}", f"{b:.5g}", f"{100 * residual:.1f} %"]
            lines.append([provider, f"{name}, {unit}", *figures, at])  # noqa: B023

        for figure in FIGURES:

            def time(case: Case, row: Row, figure: str = figure) -> float | None:
                found = summaries(row).get(figure)
                return found.median * 1e6 if found else None

            add(figure, "µs", time)
        add("saved", "bytes", lambda case, row: row.get("saved_bytes"))
        add("peak", "bytes", lambda case, row: positive(row.get("peak_bytes")))
    if not lines:
        return "The T sweep was not measured: no fit."
    stated = {case.saved_bytes_per_step() for case in cases}
    steps = ", ".join(str(case.T) for case in cases)
    return (
        "y = a + b T, by least squares of the relative residuals; the largest residual beside. "
        f"This library states that it saves B x D x H x itemsize bytes a step: {stated.pop()} here."
        "\n\n" + table(lines, f"provider | y | a | b | residual | y / T at T = {steps}")
    )


def positive(size: Any) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


# -------------------------------------------------------------------------------------- page


def page(results: Results, pictures: dict[str, str]) -> str:
    header = results.header
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    rates = ", ".join(f"{d} {r / 1e9:.0f} GFLOP/s" for d, r in header["gemm_rates"].items())
    lines = [
        f"# {header['device']}",
        "",
        f"Written by `python -m bench`. {versions}; commit {header['commit']}; "
        f"{header['threads']} threads; load of the machine at the start {header['load']}. "
        + (f"Square products: {rates}." if rates else ""),
        "",
        *(f"Some rows are of another run: {other}." for other in header["mixed_with"]),
        "## How",
        "",
        HOW,
        *(f"- `{p.name}`: {p.about}." for p in PROVIDERS.values()),
        "",
        "## In short",
        "",
        "Time of torch.nn / ours, above 1 is faster: the least of all cases, their geometric mean, "
        "and in how many ours is behind.",
        "",
        in_short(results),
        "",
        "## Pictures",
        "",
        *(f"![{title}]({name})\n" for name, title in pictures.items()),
        "## Against T",
        "",
        fits(results),
        "",
        "## Behind torch.nn",
        "",
        behind(results),
        "",
        "## All",
        "",
    ]
    placed: set[str] = set()
    for chosen in header["sets"].values():
        lines += [f"### {chosen['title']}", ""]
        lines += [set_table(results, [Case.parse(name) for name in chosen["cases"]]), ""]
        placed.update(chosen["cases"])
    others = [Case.parse(name) for name in results.rows if name not in placed]
    if others:
        lines += ["### Other cases", "", set_table(results, others), ""]
    return "\n".join(lines)


def behind_rows(results: Results, ours: Sequence[str]) -> list[tuple[float, str, str, str]]:
    """(ratio, provider, case, figure) wherever ours is slower than torch.nn, the worst first."""
    found = []
    for name, providers in results.rows.items():
        theirs = summaries(providers.get("torch.nn", {}))
        for provider in ours:
            for figure, mine in summaries(providers.get(provider, {})).items():
                if figure in theirs and mine.median > theirs[figure].median:
                    ratio = theirs[figure].median / mine.median
                    found.append((ratio, provider, name, figure))
    return sorted(found)


def behind(results: Results) -> str:
    rows = behind_rows(results, OURS)
    if not rows:
        return "In no case that was measured is this library slower than `torch.nn`."
    lines = [[f"{r:.2f}", p, f"`{case}`", figure] for r, p, case, figure in rows]
    return table(lines, "x | provider | case | figure")
