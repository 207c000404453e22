"""What is read of the results: lines of text, the page, and a README's summary."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

from rnn.cells import CELLS

from .cases import Case
from .measure import FIGURES, MEASURED
from .providers import OURS, PROVIDERS
from .store import BenchError, Results

PAGE = "README.md"
MARKS = ("<!-- bench -->\n", "<!-- /bench -->")

SHORT = (
    "Each entry is the time of `torch.nn` / ours, above 1 is faster: the least of all cases, their "
    "geometric mean, and in how many ours is slower."
)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown, in columns; the last is as wide as it comes."""
    rows = [head, ["---"] * len(head), *lines]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[-1] = 0
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


HEAD = ["provider", "error", *(h for f in FIGURES for h in (f"{f} µs", "x")), "what ran"]


def lines_of(results: Results, case: Case) -> list[list[str]]:
    """A line for each provider; instead of its figures, why it was not measured."""
    us, lines = 1e6 / case.steps, []
    for provider in PROVIDERS:
        row, figures = results.of(case, provider), []
        for figure, time in row.times.items():
            x = results.ratio(case, provider, figure)
            median, low, high = (us * seconds for seconds in time)
            figures += [f"{median:.4g} [{low:.3g}, {high:.3g}]", f"{x:.2f}" if x else "-"]
        if row.status == MEASURED:
            lines.append([provider, f"{row.error:.2g}", *figures, row.ran])
        elif row.status:
            lines.append([provider, *[""] * 7, f"{row.status}: {row.reason}"])
    return lines


def in_short(results: Results) -> str:
    """A line for each cell: the least ratio to torch.nn, the mean, and how often ours is slower."""
    lines = []
    for cell in CELLS:
        cases = [case for case in results.cases() if case.cell == cell]
        for provider in OURS:
            line = [cell, provider]
            for figure in FIGURES:
                ratios = [x for c in cases if (x := results.ratio(c, provider, figure))]
                slower = f"{sum(round(x, 2) < 1 for x in ratios)} of {len(ratios)}"
                if ratios:
                    line.append(f"{min(ratios):.2f}, {geometric_mean(ratios):.2f}, {slower}")
            if len(line) > 2:
                lines.append(line)
    return table(["cell", "provider", *FIGURES], lines)


def summary(results: Results, folder: str) -> str:
    """What a README says of the results in a folder, between the MARKS."""
    about = f"{results}. All figures: [{folder}]({folder}/{PAGE}). {SHORT}"
    return f"{about}\n\n{in_short(results)}\n"


def put_between(text: str, new: str) -> str:
    """The text with what lies between the MARKS replaced. Raises BenchError without the MARKS."""
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise BenchError(f"no place for the summary: {MARKS[0].strip()} and {MARKS[1]} once each")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return before + MARKS[0] + new + MARKS[1] + after


def write_page(results: Results, out: Path) -> None:
    parts = [
        f"# {results.header['device']}",
        f"Written by `python -m bench`: {results}. `bench/README.md` says what the figures mean.",
        SHORT,
        in_short(results),
    ]
    lines = [[f"`{case}`", *line] for case in results.cases() for line in lines_of(results, case)]
    parts.append(table(["case", *HEAD], lines))
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
