"""Deliberate mistakes that the tests must notice: python tests/mutants.py [NAME ...]

Each mutant is one change of one file. It is made in a copy of the tree, and the tests that should
notice it run there; they are run first without any change, where they must pass. Prints each
verdict and, last, the survivors. Exit status: 1 if a mutant survives.

This is run by hand, some minutes for all. A mutant whose old text is not found exactly once is an
error: adapt it to the code.
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
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TREE = ("rnn", "kernels", "bench", "tests", "pyproject.toml", "README.md")  # what the tests need
SECONDS = 900.0  # tests that run longer hang: the mutant is noticed


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # found exactly once in the file
    new: str
    tests: str  # the arguments of pytest that should notice


KERNELS = "tests/test_kernels.py"
SLICES = "tests/test_slices.py"

MUTANTS = [
    # Memory that is not the tensor's: the interpreter by itself does not notice.
    Mutant(
        "row-mask-forward",
        "kernels/recurrence.py",
        """rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    x_gates_offsets""",
        """rows >= 0)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    x_gates_offsets""",
        KERNELS,
    ),
    Mutant(
        "row-mask-backward",
        "kernels/recurrence.py",
        """rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    output_offsets""",
        """rows >= 0)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    output_offsets""",
        KERNELS,
    ),
    Mutant(
        "prefetch-past-the-end",
        "kernels/steps.py",
        "tl.zeros((1, 1), tl.int32) + i < steps",
        "tl.zeros((1, 1), tl.int32) + i <= steps",
        KERNELS,
    ),
    Mutant(
        "offsets-past-the-end",
        "kernels/steps.py",
        "tl.load(offsets_ptr + place, mask=i < steps, other=0)",
        "tl.load(offsets_ptr + place)",
        KERNELS,
    ),
    Mutant(
        "padding-of-x-read",
        "kernels/recurrence.py",
        "wanted = mask & active_at(i + 1, steps, backwards, lengths)",
        "wanted = mask & active_at(i + 1, steps, backwards, None)",
        KERNELS,
    ),
    Mutant(
        "packed-rows-that-do-not-exist-written",
        "kernels/recurrence.py",
        "                written = present\n",
        "                written = mask\n",
        KERNELS,
    ),
    Mutant(
        "padding-left-unwritten",
        "kernels/recurrence.py",
        "mask=written)\n        if stored_ptr",
        "mask=present)\n        if stored_ptr",
        KERNELS,
    ),
    Mutant(
        "32-bit-rows-forward",
        "kernels/recurrence.py",
        """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    first_unit""",
        """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    first_unit""",
        KERNELS,
    ),
    Mutant(
        "32-bit-rows-backward",
        "kernels/recurrence.py",
        """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units""",
        """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    units""",
        KERNELS,
    ),
    Mutant(
        "32-bit-steps",
        "kernels/steps.py",
        "(i + backwards * (steps - 1 - 2 * i)).to(tl.int64)",
        "i + backwards * (steps - 1 - 2 * i)",
        KERNELS,
    ),
    # What blocks that share a layer tell each other.
    Mutant(
        "no-wait",
        "kernels/exchange.py",
        "    while (arrived < SLICES) & (polls < patience):",
        "    arrived = SLICES + 0 * arrived\n    while (arrived < SLICES) & (polls < patience):",
        SLICES,
    ),
    Mutant(
        "alive-forgotten-forward",
        "kernels/recurrence.py",
        "SLICES) & alive\n            h = gather",
        "SLICES)\n            h = gather",
        SLICES,
    ),
    Mutant(
        "alive-forgotten-backward",
        "kernels/recurrence.py",
        "SLICES) & alive\n        d_h_prev",
        "SLICES)\n        d_h_prev",
        SLICES,
    ),
    Mutant(
        "patience-paid-again-forward",
        "kernels/recurrence.py",
        "tl.where(alive, patience, 0), SLICES) & alive\n            h = gather",
        "patience, SLICES) & alive\n            h = gather",
        SLICES,
    ),
    Mutant(
        "patience-paid-again-backward",
        "kernels/recurrence.py",
        "tl.where(alive, patience, 0), SLICES) & alive\n        d_h_prev",
        "patience, SLICES) & alive\n        d_h_prev",
        SLICES,
    ),
    Mutant(
        "one-slot",
        "kernels/recurrence.py",
        "            slot_ptr = exchange_ptr + (i % 2) * exchange_size\n            tl.store(",
        "            slot_ptr = exchange_ptr\n            tl.store(",
        SLICES,
    ),
    # Numbers.
    Mutant(
        "tf32-cut-off",
        "kernels/products.py",
        "    bits += tl.where(tl.abs(x) < 3.401992901712019e38, 0x1000, 0)\n",
        "",
        KERNELS,
    ),
    Mutant(
        "tf32-cut-off-in-weights",
        "kernels/launch.py",
        "bits + 0x1000",
        "bits",
        KERNELS,
    ),
    Mutant(
        "tf32-swallows-nan",
        "kernels/products.py",
        "    bits = (x + 0.0).to(",
        "    bits = x.to(",
        KERNELS,
    ),
    Mutant(
        "weights-not-contiguous",
        "kernels/launch.py",
        "    weight = weight.contiguous()\n",
        "    weight = weight.contiguous() if weight.dtype == torch.float32 else weight\n",
        KERNELS,
    ),
    Mutant(
        "saved-layout-believed",
        "kernels/launch.py",
        "    output = dense(output)\n",
        "",
        KERNELS,
    ),
    # The maths of the cells, as tiles.
    Mutant(
        "tanh-vjp-sign",
        "kernels/cells.py",
        "(1.0 - state[0] * state[0])",
        "(1.0 + state[0] * state[0])",
        KERNELS,
    ),
    Mutant(
        "relu-vjp-sign",
        "kernels/cells.py",
        "tl.where(state[0] <= 0.0, 0.0, d_state[0])",
        "tl.where(state[0] >= 0.0, 0.0, d_state[0])",
        KERNELS,
    ),
    Mutant(
        "gru-vjp-sign",
        "kernels/cells.py",
        "d_h * (state_prev[0] - n) * z",
        "d_h * (n - state_prev[0]) * z",
        KERNELS,
    ),
    Mutant(
        "lstm-vjp-sign",
        "kernels/cells.py",
        "d_c * g * i * (1.0 - i)",
        "-d_c * g * i * (1.0 - i)",
        KERNELS,
    ),
    Mutant(
        "d_h_gates-for-d_x_gates",
        "kernels/recurrence.py",
        "store_tiles(d_x_gates_ptr + d_gates_at, d_x_gates, written, H)",
        "store_tiles(d_x_gates_ptr + d_gates_at, d_h_gates, written, H)",
        KERNELS,
    ),
    Mutant(
        "gradient-of-c-dropped",
        "kernels/recurrence.py",
        "            d_before += (d_prev[s],)\n",
        "            d_before += (d_prev[s] * 0.0,)\n",
        KERNELS,
    ),
    Mutant(
        "gradient-past-w_hh-dropped",
        "kernels/recurrence.py",
        "tl.zeros((BLOCK_S, BLOCK_B), tl.float32) + d_prev[0]",
        "tl.zeros((BLOCK_S, BLOCK_B), tl.float32)",
        KERNELS,
    ),
    Mutant(
        "inactive-gradient-not-handed-on",
        "kernels/recurrence.py",
        "d_state = where_active(active, d_before, d_state)",
        "d_state = d_before",
        KERNELS,
    ),
    Mutant(
        "first-state-of-a-row-not-its-own",
        "kernels/steps.py",
        "        ptrs = tl.where(active, ptrs, state0_ptrs[s] + state0_offsets)\n",
        "",
        KERNELS,
    ),
    Mutant(
        "param-gradient-of-padding",
        "kernels/recurrence.py",
        "            d_params_step = zero_where_not(active, d_params_step)\n",
        "",
        KERNELS,
    ),
]


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
