"""Deliberate mistakes that the tests must notice: python tests/mutants.py [NAME ...]

Each mutant is one change of one file. It is made in a copy of the tree, and the tests that should
notice it run there; they are run first without any change, where they must pass. Prints each
verdict and, last, the survivors. Exit status: 1 if a mutant survives.

The mutants are in mutations.py. This is run by hand, some minutes for all. A mutant whose old text
is not found exactly once is an error: adapt it to the code.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
TREE = ("rnn", "kernels", "bench", "tests", "pyproject.toml", "README.md")  # what the tests need
SECONDS = 900.0  # tests that run longer hang: the mutant is noticed


def copy_tree(folder: Path) -> None:
    for name in TREE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)


def failure(tests: str, mutant: Mutant | None = None) -> str:
    """Run the tests in a copy of the tree; what failed there, or "" where all passed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        if mutant:
            file = folder / mutant.file
            file.write_text(file.read_text().replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, *shlex.split(tests)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"longer than {SECONDS:.0f} s"
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0 or (done.returncode == 1 and failed):
        return failed[0] if failed else ""
    # A signal may be a mutant's doing; whatever else pytest returns says that it tested nothing.
    if done.returncode < 0 and mutant:
        return f"signal {-done.returncode}"
    raise RuntimeError(f"{' '.join(command)} {tests}\n{done.stdout}{done.stderr}")


def check_texts(mutants: list[Mutant]) -> list[str]:
    counts = {m.name: (ROOT / m.file).read_text().count(m.old) for m in mutants}
    return [f"{name}: its old text occurs {n} times" for name, n in counts.items() if n != 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [m.name for m in MUTANTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not args.names or m.name in args.names]
    if wrong := check_texts(chosen):
        parser.error("; ".join(wrong))
    with ThreadPoolExecutor(args.jobs) as pool:
        selections = list(dict.fromkeys(m.tests for m in chosen))
        for tests, failed in zip(selections, pool.map(failure, selections)):
            if failed:
                parser.error(f"these tests fail without any change: {tests}: {failed}")
        survivors = []
        for mutant, failed in zip(chosen, pool.map(lambda m: failure(m.tests, m), chosen)):
            print(f"{mutant.name:40} {failed or 'SURVIVES'}", flush=True)
            survivors += [mutant.name] * (not failed)
    print(f"{len(survivors)} of {len(chosen)} survive: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
