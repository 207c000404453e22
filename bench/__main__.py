"""`python -m bench`: this library against torch.nn and others, on whatever the machine has."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

try:
    import matplotlib  # noqa: F401
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name not in ("tqdm", "matplotlib"):
        raise
    print(f"python -m bench needs {error.name}: pip install -e '.[bench]'", file=sys.stderr)
    sys.exit(2)

import torch

from rnn.jobs.cli import Parser, duration

from .cases import EXAMPLE, Case, Set, quick, sets
from .measure import CRASHED, WRONG, cannot, measure
from .plots import draw
from .providers import PROVIDERS
from .report import MARKS, behind_rows, headings, in_short, page, put_between, quote, terminal
from .results import (
    CSV,
    JSON,
    REPORT,
    ROOT,
    SAME,
    BenchError,
    Results,
    compare,
    device_name,
    make_header,
    slug,
    write_csv,
)
from .timing import Figures, gemm_bounds, gemm_rate, model_bounds

SECONDS, QUICK_SECONDS = 3.0, 1.0
TOO_SLOW = (
    "left out of --quick, since compiling alone takes longer; --providers compiled asks for it"
)
HEAD_TO_HEAD = ("fused", "torch.nn")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m bench",
        description=__doc__,
        epilog="Interrupted, it keeps what it has; the same command again goes on from there.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases: two minutes on two cores")
    add("--cases", nargs="+", metavar="NAME", help=f"sets (see --list) or cases, as {EXAMPLE}")
    add(
        "--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS)
    )
    add(
        "--seconds",
        type=duration,
        metavar="S",
        help=f"of each case, all providers together (default {SECONDS:g}; {QUICK_SECONDS:g} quick)",
    )
    add(
        "--out", type=Path, metavar="DIR", help="default: bench/results/<device>, or runs/ if quick"
    )
    add("--mix", action="store_true", help="add to results of another commit, version or device")
    add("--fresh", action="store_true", help="replace the results in --out")
    add("--into", type=Path, metavar="FILE", help="write a summary into FILE, between its marks")
    add("--list", action="store_true", help="show the sets, the cases and the providers")
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="show what got slower from A to B, and exit 1 if anything did",
    )
    add(
        "--threshold",
        type=duration,
        default=1.1,
        metavar="X",
        help="what counts as slower, by medians (default 1.1; the samples must be apart as well)",
    )
    add(
        "--accept",
        action="store_true",
        help="on a GPU: the GPU's tests, then ours against cuDNN, and where we are behind",
    )
    return parser


# --------------------------------------------------------------------------------------- run


class Job(NamedTuple):
    device: torch.device
    sets: dict[str, Set]
    providers: list[str]
    seconds: float
    out: Path
    slow: dict[str, str]  # providers that are left out, and why
    into: Path | None  # a file that quotes the results

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(case for chosen in self.sets.values() for case in chosen.cases))


def choose_sets(known: dict[str, Set], names: list[str] | None) -> dict[str, Set]:
    """Those named; what is no set is a case. Raises BenchError."""
    if names is None:
        return known
    chosen, single = {}, []
    for name in names:
        if name in known:
            chosen[name] = known[name]
            continue
        try:
            single.append(Case.parse(name))
        except ValueError as error:
            raise BenchError(
                f"{name} is no set ({', '.join(known)}) and no case: {error}"
            ) from error
    return chosen | ({"named": Set("Cases named on the command line", single)} if single else {})


def checked_marks(path: Path | None) -> Path | None:
    """The file, where it has room for a quotation: better found out before than after a run."""
    try:
        if path is not None:
            put_between(path.read_text(), "")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BenchError(f"{path} must hold {' and '.join(map(str.strip, MARKS))} once") from error
    return path


def prepare(args: argparse.Namespace) -> Job:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    slow = {"compiled": TOO_SLOW} if args.quick and args.providers is None else {}
    folder = slug(device_name(device))
    default = Path("runs/bench") / folder if args.quick else ROOT / "bench/results" / folder
    return Job(
        device,
        choose_sets(quick() if args.quick else sets(gpu), args.cases),
        args.providers or list(PROVIDERS),
        args.seconds or (QUICK_SECONDS if args.quick else SECONDS),
        args.out or default,
        slow,
        checked_marks(args.into),
    )


def open_results(job: Job, mix: bool, fresh: bool) -> tuple[Results, list[tuple[Case, list[str]]]]:
    """What --out holds already, and the providers of each case that are not in it."""
    header = make_header(job.device)
    there = (job.out / JSON).exists() and not fresh
    results = Results.read(job.out / JSON) if there else Results(header, {})
    todo = [(case, results.incomplete(case, job.providers)) for case in job.cases()]
    todo = [(case, names) for case, names in todo if names]
    if todo:
        results.join(header, mix)
    for name, chosen in job.sets.items():
        cases = [str(case) for case in chosen.cases]
        results.header["sets"][name] = {"title": chosen.title, "axis": chosen.axis, "cases": cases}
    return results, todo


def bounds(case: Case, device: torch.device, results: Results) -> Figures | str:
    if device.type == "cuda":
        return model_bounds(case, device)
    rates = results.header["gemm_rates"]
    if case.dtype not in rates:
        rates[case.dtype] = gemm_rate(case.dtype, device)
    return gemm_bounds(case, rates[case.dtype])


def run(job: Job, results: Results, todo: list[tuple[Case, list[str]]]) -> None:
    """Measure, and write after each case."""
    limits = partial(bounds, device=job.device, results=results)
    with tqdm(todo, unit="case", disable=not todo) as progress:
        for case, names in progress:
            progress.set_postfix_str(str(case))
            rows = results.rows.setdefault(str(case), {})
            rows |= {name: cannot(job.slow[name]) for name in names if name in job.slow}
            timed = [name for name in names if name not in job.slow]
            if "torch.nn" in set(job.providers) - set(timed):
                timed.append("torch.nn")  # once more: the others' ratios are of one run
            try:
                measure(case, timed, job.device, job.seconds, limits, rows)
            finally:
                results.write(job.out)
            progress.write(terminal(results, case, names))


def finish(job: Job, results: Results) -> None:
    """The CSV, the pictures, the page, and what another file quotes of it."""
    results.write(job.out)
    write_csv(results, job.out / CSV)
    (job.out / REPORT).write_text(page(results, draw(results, job.out)))
    if job.into is not None:
        folder = os.path.relpath(job.out.resolve(), job.into.resolve().parent)
        text = job.into.read_text()
        job.into.write_text(put_between(text, quote(results, Path(folder).as_posix())))
    print("time of torch.nn / ours: least, geometric mean, cases in which ours is behind")
    print(in_short(results))
    print(f"{job.out / REPORT}, {JSON} and {CSV} beside it")


def benchmark(job: Job, mix: bool, fresh: bool) -> tuple[Results, int]:
    """The results and an exit status: 1 where a provider was wrong or crashed, 130 after an
    interrupt."""
    results, todo = open_results(job, mix, fresh)
    about = f"{results.header['device']}, {results.header['threads']} threads"
    print(f"{about}: {len(job.cases())} cases, {', '.join(job.providers)}")
    print(f"columns: {', '.join(headings(results.header['gpu'])[1:])}")
    if not todo:
        print(f"all of it was measured already, in {job.out}; --fresh measures anew")
    try:
        run(job, results, todo)
    except KeyboardInterrupt:
        finish(job, results)
        print(f"interrupted; the same command goes on from {job.out}", file=sys.stderr)
        return results, 130
    finish(job, results)
    bad = [
        f"{case} {name}: {row['status']}: {row['reason']}"
        for case, rows in results.rows.items()
        for name, row in rows.items()
        if row.get("status") in (WRONG, CRASHED)
    ]
    print("\n".join(bad), end="\n" if bad else "", file=sys.stderr)
    return results, 1 if bad else 0


# --------------------------------------------------------------------------- compare, accept


def show_comparison(paths: list[Path], threshold: float) -> int:
    before, after = (Results.read(path) for path in paths)
    for field in SAME:
        here, there = (results.header.get(field) for results in (before, after))
        if here != there:
            print(f"the {field} differs: {here}, then {there}")
    changes, lost = compare(before, after, threshold)
    if not changes and not lost:
        raise BenchError(f"{paths[0]} and {paths[1]} have no figure in common")
    for change in changes:
        if change.slower or change.faster:
            control = "" if change.control is None else f" (torch.nn: {change.control:.2f})"
            word = "slower" if change.slower else "faster"
            what = f"{change.case} {change.provider} {change.figure}"
            print(f"{word} {change.factor:.2f}{control}  {what}")
    print("\n".join(lost), end="\n" if lost else "")
    slower = sum(change.slower for change in changes)
    faster = sum(change.faster for change in changes)
    print(f"{len(changes)} figures: {slower} slower, {faster} faster, {len(lost)} lost")
    return 1 if slower or lost else 0


def accept(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise BenchError("--accept needs a GPU, and torch.cuda.is_available() is false")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=ROOT)
    if tests.returncode != 0:
        print("the GPU's tests failed: nothing was timed", file=sys.stderr)
        return 1
    args.providers = args.providers or list(HEAD_TO_HEAD)
    args.cases = args.cases or ["grid", "dtype", "sequences", "published"]
    results, status = benchmark(prepare(args), args.mix, args.fresh)
    behind = behind_rows(results, ["fused"])
    for ratio, _, case, figure in behind:
        print(f"behind cuDNN: {ratio:.2f}  {case} {figure}")
    print(f"behind cuDNN in {len(behind)} figures")
    return status


def show_list(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    for name, chosen in (quick() if args.quick else sets(gpu)).items():
        print(f"{name}: {chosen.title}")
        print("\n".join(f"    {case}" for case in chosen.cases))
    print("providers")
    for provider in PROVIDERS.values():
        print(f"    {provider.name}: {provider.about}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where something was slower, wrong or crashed; 2 for an error of the
    command line; 130 after an interrupt."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.list:
            show_list(args)
            return 0
        if args.compare:
            return show_comparison(args.compare, args.threshold)
        if args.accept:
            return accept(args)
        return benchmark(prepare(args), args.mix, args.fresh)[1]
    except BenchError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
