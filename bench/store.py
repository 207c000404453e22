"""What a run leaves: one JSON file with a row for each case and provider; two of them compared."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

import rnn

from .cases import Case
from .measure import MEASURED, Row, Time

JSON = "results.json"
ROOT = Path(__file__).parent.parent
NOISE = 1.1  # medians that differ by a smaller factor are called equal


class BenchError(Exception):
    """What was asked for cannot be done; the message says why, in one line."""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return f"{re.sub('[(](R|TM)[)]', '', name)}, {os.cpu_count()} cores"


def commit() -> str:
    """Of this checkout; marked as dirty where a file was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not known"
    return done.stdout.strip()


def make_header(device: torch.device) -> dict[str, str]:
    """What all rows of a file are measured on."""
    versions = [f"fused-rnn {rnn.__version__}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("triton"):
        versions.append(f"triton {importlib.metadata.version('triton')}")
    if device.type == "cuda":
        versions.append(f"cudnn {torch.backends.cudnn.version()}")
    versions.append(f"python {platform.python_version()}")
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(versions),
        "commit": commit(),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "not known",
    }


class Results:
    def __init__(self, header: dict[str, str], rows: Iterable[Row] = ()) -> None:
        self.header = header
        self.rows = {(row.case, row.provider): row for row in rows}

    def __str__(self) -> str:
        about = "{device}, {versions}, {threads} threads, commit {commit}; load {load} before"
        return about.format(**self.header)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises BenchError where the file is not one of ours."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            results = cls(data["header"], [Row(**row) for row in data["rows"]])
            for row in results.rows.values():
                row.times = {name: Time(*time) for name, time in row.times.items()}
            str(results)  # its header is whole
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} is not a file of results: {error}") from error
        return results

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(asdict(row)) for row in self.rows.values())
        header = json.dumps(self.header, indent=1)
        part = out / f"{JSON}.part"  # renamed: a run that is stopped leaves a whole file
        part.write_text(f'{{"header": {header},\n"rows": [\n{rows}\n]}}\n')
        part.replace(out / JSON)

    def of(self, case: Case | str, provider: str) -> Row:
        """The row, or one without times where nothing was asked."""
        return self.rows.get((str(case), provider), Row(str(case), provider))

    def cases(self) -> list[Case]:
        return [Case.parse(name) for name in dict.fromkeys(case for case, _ in self.rows)]

    def ratio(self, case: Case | str, provider: str, figure: str) -> float | None:
        """The time of torch.nn / the time of the provider, where both were measured."""
        ours, torch_nn = (self.of(case, name).times for name in (provider, "torch.nn"))
        return torch_nn[figure].median / ours[figure].median if ours and torch_nn else None


def compare(before: Results, after: Results) -> tuple[list[str], list[str]]:
    """What got slower from one to the other, and what got faster, a line each.

    That is every figure whose medians differ by more than NOISE and whose middle three fifths of
    samples lie apart. A row that `after` could not measure any more counts as slower.
    """
    slower, faster = [], []
    for (case, provider), row in before.rows.items():
        now = after.of(case, provider)
        if row.status == MEASURED and now.status not in ("", MEASURED):
            slower.append(f"lost         {case} {provider}: {now.status}: {now.reason}")
        for figure in row.times.keys() & now.times.keys():
            a, b = row.times[figure], now.times[figure]
            line = f"{b.median / a.median:.2f} x the time  {case} {provider} {figure}"
            if b.median > NOISE * a.median and b.low > a.high:
                slower.append(line)
            if a.median > NOISE * b.median and a.low > b.high:
                faster.append(line)
    return sorted(slower, reverse=True), sorted(faster)
