"""What a run leaves: one JSON file, written anew after each case; a CSV drawn from it; and the
comparison of two of them."""

import csv
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rnn
from rnn.functional import kernels

from .cases import Case
from .measure import MEASURED, Row
from .timing import FIGURES, GRAPHS

FORMAT = "fused-rnn bench 1"
JSON, CSV, REPORT = "results.json", "results.csv", "README.md"
SAME = ("device", "threads", "versions", "commit")  # what the rows of one file share
ROOT = Path(__file__).parent.parent

Header = dict[str, Any]


class BenchError(Exception):
    """What was asked for cannot be done; the message says why, in one line."""


# ------------------------------------------------------------------------------------ header


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores" if found else model


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Of this checkout; marked where what is measured, or what measures, was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise FileNotFoundError
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "rnn", "kernels", "bench/*.py"
        )
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else "")
    except FileNotFoundError:  # no git, or no checkout
        return "not known: no git checkout"


def make_header(device: torch.device) -> Header:
    versions = {
        "fused-rnn": rnn.__version__,
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels else "not installed",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "format": FORMAT,
        "device": device_name(device),
        "gpu": device.type == "cuda",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        # of the machine, when the run began
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "not known",
        "gemm_rates": {},  # by dtype, operations a second
        "sets": {},
        "mixed_with": [],  # headers of other runs whose rows are here as well
    }


# ------------------------------------------------------------------------------------- store


class Results:
    """The rows of a folder, by case and provider, and what they were measured on."""

    def __init__(self, header: Header, rows: dict[str, dict[str, Row]]) -> None:
        self.header = header
        self.rows = rows

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises BenchError where the file is none of ours."""
        try:
            data = json.loads(path.read_text())
            if data["header"]["format"] != FORMAT:
                raise BenchError(f"{path} is {data['header']['format']!r}, not {FORMAT!r}")
            rows: dict[str, dict[str, Row]] = {}
            for row in data["rows"]:
                rows.setdefault(row.pop("case"), {})[row.pop("provider")] = row
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} is not a file of results of python -m bench") from error
        return cls(data["header"], rows)

    def join(self, header: Header, mix: bool) -> None:
        """Rows of another run will come in. Raises BenchError where that measures something
        else, unless `mix`."""
        known = [self.header, *self.header["mixed_with"]]
        differ = [field for field in SAME if self.header[field] != header[field]]
        if differ and not mix:
            there, here = self.header[differ[0]], header[differ[0]]
            raise BenchError(
                f"the results are of another {differ[0]}: {there}, and now {here}; --mix adds "
                "to them all the same, --fresh replaces them, --out leaves them alone"
            )
        if all(any(old[field] != header[field] for field in SAME) for old in known):
            self.header["mixed_with"].append({field: header[field] for field in SAME})

    def write(self, out: Path) -> None:
        """Replace the file in one go: an interrupt leaves the old one or the new one."""
        out.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(
            json.dumps({"case": case, "provider": name} | rounded(row))
            for case, providers in self.rows.items()
            for name, row in providers.items()
        )
        header = json.dumps(self.header, indent=1)
        temporary = out / (JSON + ".new")
        temporary.write_text(f'{{"header": {header},\n"rows": [\n{rows}\n]}}\n')
        temporary.replace(out / JSON)

    def incomplete(self, case: Case, providers: list[str]) -> list[str]:
        rows = self.rows.get(str(case), {})
        return [name for name in providers if not rows.get(name, {}).get("complete")]


def rounded(row: Row) -> Row:
    """Samples to four digits, which is finer than any clock here is steady."""
    samples = {k: [float(f"{s:.4g}") for s in v] for k, v in row["samples"].items()}
    return row | {"samples": samples}


# ----------------------------------------------------------------------------------- figures


class Summary(NamedTuple):
    median: float  # seconds, of one call
    low: float  # the quantile of 20 %
    high: float  # of 80 %
    samples: int


def summary(samples: list[float]) -> Summary:
    if len(samples) < 2:
        return Summary(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Summary(statistics.median(samples), fifths[0], fifths[-1], len(samples))


def summaries(row: Row) -> dict[str, Summary]:
    """By figure; empty for who was not timed."""
    if row.get("status") != MEASURED:
        return {}
    return {figure: summary(values) for figure, values in row["samples"].items() if values}


def reason(row: Row) -> str:
    """Why a row has no figures."""
    return f"{row.get('status', 'interrupted')}: {row.get('reason', 'before it was timed')}"


def flat_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One dictionary for each case, provider and figure, with every sample in microseconds."""
    header = results.header
    measured_on = {
        "device": header["device"],
        "threads": header["threads"],
        "commit": header["commit"],
        "versions": "; ".join(f"{k} {v}" for k, v in header["versions"].items()),
    }
    for name, providers in results.rows.items():
        case = Case.parse(name)
        theirs = summaries(providers.get("torch.nn", {}))
        for provider, row in providers.items():
            about = {"case": name, **case._asdict(), "provider": provider}
            about |= {"status": row.get("status", "interrupted"), "reason": row.get("reason", "")}
            about |= {key: row.get(key, "") for key in ("error", "peak_bytes", "saved_bytes")}
            found = summaries(row)
            for figure, s in found.items() or [("", None)]:
                if s is not None:
                    about |= {
                        "figure": figure,
                        "median us": s.median * 1e6,
                        "20 % us": s.low * 1e6,
                        "80 % us": s.high * 1e6,
                        "us per step": s.median * 1e6 / case.steps,
                        "ratio to torch.nn": theirs[figure].median / s.median
                        if figure in theirs
                        else "torch.nn was not measured",
                        "samples us": " ".join(f"{x * 1e6:.4g}" for x in row["samples"][figure]),
                    }
                yield about | measured_on


def write_csv(results: Results, path: Path) -> None:
    rows = list(flat_rows(results))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


# -------------------------------------------------------------------------------- comparison


class Change(NamedTuple):
    case: str
    provider: str
    figure: str
    factor: float  # medians, after / before: above 1 is slower
    control: float | None  # the same of torch.nn, where it is another provider
    slower: bool
    faster: bool


def compare(before: Results, after: Results, threshold: float) -> tuple[list[Change], list[str]]:
    """Every figure that both have, and the rows that only the first could measure.

    Slower is what has its median beyond the threshold and, since machines are not quiet, the
    middle three fifths of its samples above those from before. Faster is the mirror image.
    """
    changes, lost = [], []
    for case, providers in before.rows.items():
        for provider, row in providers.items():
            old = summaries(row)
            other = after.rows.get(case, {}).get(provider)
            if other is None or not old:
                continue  # not asked for in the second run, or not measured in the first
            new = summaries(other)
            if not new:
                lost.append(f"{case} {provider}: measured before, now {reason(other)}")
            control = None
            for figure in old.keys() & new.keys():
                a, b = old[figure], new[figure]
                if provider != "torch.nn":
                    control = torch_factor(before, after, case, figure)
                slower = b.median > threshold * a.median and b.low > a.high
                faster = a.median > threshold * b.median and a.low > b.high
                factor = b.median / a.median
                changes.append(Change(case, provider, figure, factor, control, slower, faster))
    figures = [*FIGURES, *GRAPHS]
    changes.sort(key=lambda c: (-c.factor, c.case, c.provider, figures.index(c.figure)))
    return changes, lost


def torch_factor(before: Results, after: Results, case: str, figure: str) -> float | None:
    a, b = (summaries(r.rows.get(case, {}).get("torch.nn", {})) for r in (before, after))
    return b[figure].median / a[figure].median if figure in a and figure in b else None
