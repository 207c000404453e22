"""What is read of the results: lines of text, the page, and a README's summary."""

from collections import Counter
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


def columns(results: Results, case: Case, provider: str) -> list[str]:
    """The time and the ratio of each figure of a row that was measured."""
    us, row, texts = 1e6 / case.steps, results.of(case, provider), []
    for figure in FIGURES:
        median, low, high = (us * seconds for seconds in row.times[figure])
        x = results.ratio(case, provider, figure)
        texts += [f"{median:.4g} [{low:.3g}, {high:.3g}]", f"{x:.2f}" if x else "-"]
    return texts


def terminal(results: Results, case: Case) -> str:
    """The lines of one case."""
    lines = []
    for provider in PROVIDERS:
        row = results.of(case, provider)
        if row.status == MEASURED:
            texts = zip(columns(results, case, provider), [26, 6] * 3)
            lines.append(f"  {provider:12}" + "".join(text.ljust(width) for text, width in texts))
        elif row.status:
            lines.append(f"  {provider:12}{row.status}: {row.reason}")
    return "\n".join(lines)


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


def slower_than_torch(results: Results) -> list[str]:
    """Every figure in which ours is slower than torch.nn, the worst first."""
    return sorted(
        f"{x:.2f} `{case}` {provider} {figure}"
        for case in results.cases()
        for provider in OURS
        for figure in FIGURES
        if (x := results.ratio(case, provider, figure)) and round(x, 2) < 1
    )


def summary(results: Results, folder: str) -> str:
    """What a README says of the results in a folder, between the MARKS."""
    slower = slower_than_torch(results)
    return (
        f"{results.header}. All figures: [{folder}]({folder}/{PAGE}). "
        f"{SHORT}\n\n{in_short(results)}\n\nOurs is slower in {len(slower)} figures"
        f"{', most in: ' if slower else ''}{'; '.join(slower[:6])}.\n"
    )


def put_between(text: str, new: str) -> str:
    """The text with what lies between the MARKS replaced. Raises BenchError without the MARKS."""
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise BenchError(f"no place for the summary: {MARKS[0].strip()} and {MARKS[1]} once each")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return before + MARKS[0] + new + MARKS[1] + after


# -------------------------------------------------------------------------------------- page


def what_ran(results: Results) -> str:
    """What became of the rows, and of ours what rnn.explain says: each answer with its number."""
    answers = Counter(
        ": ".join(filter(None, (f"`{row.provider}`", row.status, row.reason or row.ran)))
        for row in results.rows.values()
    )
    return "\n".join(f"- {answer} ({count} cases)" for answer, count in sorted(answers.items()))


def all_figures(results: Results, cell: str) -> str:
    head = ["case", "provider", "error", *(h for figure in FIGURES for h in (f"{figure} µs", "x"))]
    return table(
        head,
        [
            [f"`{case}`", provider, f"{row.error:.2g}", *columns(results, case, provider)]
            for case in results.cases()
            for provider in PROVIDERS
            if case.cell == cell and (row := results.of(case, provider)).status == MEASURED
        ],
    )


def write_page(results: Results, out: Path) -> None:
    parts = [
        f"# {results.header.device}",
        f"Written by `python -m bench`: {results.header}. `bench/README.md` says what the figures "
        "mean.",
        SHORT,
        in_short(results),
        "## What ran",
        what_ran(results),
        "## Slower than torch.nn",
        "\n".join(f"- {line}" for line in slower_than_torch(results)) or "Nothing.",
    ]
    cells = dict.fromkeys(case.cell for case in results.cases())
    parts += [f"## {cell}\n\n{all_figures(results, cell)}" for cell in cells]
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
