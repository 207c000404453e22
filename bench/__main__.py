"""Measure this library against torch.nn: python -m bench

On a GPU or a CPU, whatever there is, each case is run by this library, by torch.nn (cuDNN, or
PyTorch's C++ on a CPU) and by FlashRNN where it is installed; --providers names others. Each is
checked against float64 first; one that is wrong is reported and not timed. Then they are timed in
turns: forward, backward and training step, each by the median and the quantiles of 20 % and 80 %.

  python -m bench                          all cases: less than ten minutes on two cores
  python -m bench --quick                  a few: about a minute
  python -m bench --cases sizes rnn_tanh-T128-B16-H256 --providers auto torch.nn loop
  python -m bench --into README.md         also write a summary between the README's marks
  python -m bench --compare A.json B.json  what got slower; exit status 1 if anything did
  python -m bench --accept                 on a GPU: its tests, then this library against cuDNN

It leaves results.json and README.md in --out; bench/README.md says what the figures mean. Exit
status: 0; 1 if this library was wrong or crashed, or --compare found something slower; 2 if what
was asked cannot be done.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rnn.jobs.cli import Parser, duration
from rnn.modules import NAMES

from . import report, store
from .cases import CELLS, DTYPES, EXAMPLE, Case, sets
from .measure import CRASHED, FIGURES, WRONG, measure
from .providers import DEFAULT, OURS, PROVIDERS
from .store import BenchError, Results

SECONDS, QUICK_SECONDS = 2.0, 0.5


def choose_cases(
    names: Sequence[str] | None, gpu: bool, cells: Sequence[str] = CELLS
) -> list[Case]:
    """The cases of those sets, of those cells, and those named. Raises BenchError."""
    known = sets(gpu, cells)
    cases: list[Case] = []
    for name in names or [name for name in known if name != "quick"]:
        try:
            cases += known[name] if name in known else [Case.parse(name)]
        except ValueError as error:
            raise BenchError(f"a set is one of {', '.join(known)}; {error}") from error
    for case in cases:
        if DTYPES[case.dtype].tf32 and not gpu:
            raise BenchError(f"{case}: tf32 is a mode of NVIDIA GPUs, and PyTorch finds no GPU")
    return list(dict.fromkeys(cases))


def benchmark(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = args.cases or (["quick"] if args.quick else None)
    cases = choose_cases(names, device.type == "cuda", args.cells)
    providers = args.providers or DEFAULT
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    part = args.quick or args.cases or args.providers or args.seconds or args.cells != CELLS
    folder = Path("runs/bench") if part else store.ROOT / "bench/results"
    name = re.sub(r"[^a-z0-9]+", "-", store.device_name(device).lower()).strip("-")
    out = args.out or folder / name
    if args.into is not None:
        report.put_between(args.into.read_text(encoding="utf-8"), "")  # better now than after
    out.mkdir(parents=True, exist_ok=True)  # or fail now
    if (old := out / store.JSON).exists():
        Results.read(old)  # results may be replaced, another file may not
    results = Results(store.make_header(device))

    print(f"{store.device_name(device)}: {', '.join(FIGURES)} in µs per time step; torch.nn / this")
    for i, case in enumerate(cases, 1):
        print(f"[{i}/{len(cases)}] {case}", flush=True)
        rows = measure(case, providers, device, seconds)
        results.rows |= {(row.case, row.provider): row for row in rows}
        results.write(out)
        for line in report.lines_of(results, case):
            print("  " + "  ".join(filter(None, line[:-1] if line[1] else line)), flush=True)

    report.write_page(results, out)
    if args.into is not None:
        link = Path(os.path.relpath(out.resolve(), args.into.resolve().parent)).as_posix()
        text = args.into.read_text(encoding="utf-8")
        args.into.write_text(report.put_between(text, report.summary(results, link)))
    print(report.in_short(results), f"written: {out / report.PAGE} and {store.JSON}", sep="\n")
    failed = [row for row in results.rows.values() if row.status in (WRONG, CRASHED)]
    for row in failed:
        print(f"{row.case} {row.provider}: {row.status}: {row.reason}", file=sys.stderr)
    return int(any(row.provider in OURS for row in failed))


def show_comparison(paths: Sequence[Path]) -> int:
    before, after = (Results.read(path) for path in paths)
    print(f"{before}\n{after}")
    if not before.rows.keys() & after.rows.keys():
        raise BenchError(f"{paths[0]} and {paths[1]} have no case and provider in common")
    slower, faster = store.compare(before, after)
    print("\n".join([*slower, *faster, f"{len(slower)} slower, {len(faster)} faster"]))
    return 1 if slower else 0


def run_gpu_tests() -> int:
    if not torch.cuda.is_available():
        raise BenchError("--accept needs a GPU, and PyTorch finds none here")
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=store.ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, known = parser.add_argument, list(PROVIDERS)
    named = f"sets ({', '.join(sets(False))}) or cases, as {EXAMPLE}"
    where = "default: bench/results/<device>, or runs/bench/<device> if only a part is measured"
    add("--quick", action="store_true", help=f"--cases quick --seconds {QUICK_SECONDS}")
    add("--cases", nargs="+", metavar="NAME", help=named)
    which = f"of the sets, among {', '.join(NAMES)} (default {', '.join(CELLS)})"
    add("--cells", nargs="+", choices=NAMES, default=CELLS, metavar="NAME", help=which)
    who = f"of {', '.join(known)} (default {', '.join(DEFAULT)})"
    add("--providers", nargs="+", choices=known, metavar="NAME", help=who)
    add("--seconds", type=duration, metavar="S", help=f"for each case (default {SECONDS:g})")
    add("--out", type=Path, metavar="DIR", help=where)
    add("--into", type=Path, metavar="FILE", help="write a summary into FILE, between its marks")
    add("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="show what got slower")
    add("--accept", action="store_true", help="run the GPU's tests, then compare with cuDNN")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            return show_comparison(args.compare)
        if args.accept and run_gpu_tests():
            print("the GPU's tests failed: nothing was timed", file=sys.stderr)
            return 1
        return benchmark(args)
    except KeyboardInterrupt:
        return 130
    except BenchError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.strerror}: {error.filename or 'while writing'}")


if __name__ == "__main__":
    sys.exit(main())
