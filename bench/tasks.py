"""Which length does a network solve? Two classical tasks: python -m bench.tasks

Adding (Hochreiter & Schmidhuber 1997, in the form of Le, Jaitly & Hinton 2015): T pairs of a
number, uniform in [0, 1), and a mark, 1 at two steps and else 0; wanted after the last step is
the sum of the two marked numbers. Who always says 1 has the mean squared error 1/6.

Copy (Hochreiter & Schmidhuber 1997, in the form of Arjovsky, Shah & Bengio 2016): ten symbols of
eight, T - 1 blanks, a delimiter, ten blanks; wanted are T + 10 blanks and then the ten symbols.
Who remembers nothing has the cross entropy 10 log 8 / (T + 20), in nats a step.

A run is solved at the first evaluation, each 200 steps on 1000 new sequences, whose loss is below
0.06 of that baseline (0.01 for adding). "Not solved in N steps" is not "cannot"; the loss beside
it is the median of the last five. No sequence comes twice. Unlike in the papers the optimiser is
Adam, the gradient's norm clipped at 1, with one rate a task (Le et al.: SGD, rate and clipping
searched for each network and length); thousands of steps, not up to millions; two seeds.

Each finished run is a line of tasks.jsonl in --out; started again, the command does what lacks.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rnn.modules import NAMES
from rnn.patterns import ManyToMany, ManyToOne, Pattern, cross_entropy

from . import store
from .report import table

EVALUATE_EVERY, HELD_OUT, SOLVED = 200, 1000, 0.06  # steps, sequences, share of the baseline


def adding_batch(T: int, B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T, B, 2): numbers and marks; the sums (B, 1)."""
    numbers = torch.rand(T, B, generator=generator)
    two_steps = torch.rand(T, B, generator=generator).topk(2, 0).indices
    marks = torch.zeros(T, B).scatter_(0, two_steps, 1)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0).unsqueeze(1)


def copy_batch(T: int, B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T + 20, B, 10), one-hot: 0 to 7, blank 8, delimiter 9; what is wanted (T + 20, B)."""
    symbols = torch.randint(8, (10, B), generator=generator)
    rest = torch.full((T + 10, B), 8)
    given = torch.cat([symbols, rest])
    given[-11] = 9
    return F.one_hot(given, 10).float(), torch.cat([rest, symbols])


class Task(NamedTuple):
    batch: Callable[[int, int, Generator], tuple[Tensor, Tensor]]
    pattern: type[Pattern]
    inputs: int
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    baseline: Callable[[int], float]  # loss of the best answer that ignores the input, by T


TASKS = {
    "adding": Task(adding_batch, ManyToOne, 2, 1, F.mse_loss, lambda T: 1 / 6),
    "copy": Task(
        copy_batch, ManyToMany, 10, 9, cross_entropy, lambda T: 10 * math.log(8) / (T + 20)
    ),
}


def orthogonal(model: Pattern) -> None:
    """W_hh a random orthogonal matrix, biases 0, W_ih of variance 1 / I, W_hy as PyTorch has it."""
    weight_ih, weight_hh, *biases = model.rnn.all_weights[0]
    nn.init.orthogonal_(weight_hh)
    nn.init.normal_(weight_ih, std=weight_ih.size(1) ** -0.5)
    for bias in biases:
        nn.init.zeros_(bias)


def identity(model: Pattern) -> None:
    """W_hh = 1, biases 0, all else normal with deviation 0.001 (Le, Jaitly & Hinton 2015)."""
    weight_ih, weight_hh, *biases = model.rnn.all_weights[0]
    nn.init.eye_(weight_hh)
    for bias in biases:
        nn.init.zeros_(bias)
    for weight in (weight_ih, model.readout.weight):
        nn.init.normal_(weight, std=0.001)


class Network(NamedTuple):
    cell: str  # a name in rnn.modules.NAMES
    initialise: Callable[[Pattern], None] = lambda model: None  # PyTorch's: uniform, +-1 / sqrt(H)


NETWORKS = {
    "tanh": Network("rnn_tanh"),
    "tanh, orthogonal": Network("rnn_tanh", orthogonal),
    "relu, identity": Network("rnn_relu", identity),
    **{name: Network(name) for name in NAMES if not name.startswith("rnn_")},
}
ELMAN, GATED = ("tanh", "tanh, orthogonal", "relu, identity"), ("gru", "lstm")
OTHERS = [name for name in NETWORKS if name not in ELMAN + GATED]


class Job(NamedTuple):  # one run, with all that decides its outcome
    task: str
    T: int
    network: str
    seed: int
    max_steps: int
    hidden: int
    batch: int
    learning_rate: float
    max_norm: float = 1.0


# Hidden units and batch: those of Le et al. for adding, of Arjovsky et al. for copy.
# Rates: from trials with seed 0 of relu on adding, of orthogonal tanh on copy; it favours these.
# Gated cells take a larger rate on adding: 0.001, Adam's own default.
ADDING: dict[str, Any] = {"max_steps": 15_000, "hidden": 100, "batch": 16, "learning_rate": 3e-4}
COPY: dict[str, Any] = {"max_steps": 6_000, "hidden": 128, "batch": 20, "learning_rate": 1e-3}
JOBS = [
    Job(task, T, network, seed, **settings)
    for seed in (0, 1)
    for task, lengths, networks, settings in (
        ("adding", (50, 100, 150, 200, 300), ("tanh", "relu, identity"), ADDING),
        ("adding", (50, 100, 200), GATED, {**ADDING, "learning_rate": 1e-3}),
        ("copy", (1, 10, 30, 100), ELMAN, COPY),
        ("copy", (1, 10, 30), GATED, COPY),
    )
    for T, network in product(lengths, networks)
]


def jobs_of(cells: Sequence[str]) -> list[Job]:
    """Adding at the shortest length, one seed each."""
    return [Job("adding", 50, cell, 0, **{**ADDING, "learning_rate": 1e-3}) for cell in cells]


def build(job: Job) -> Pattern:
    task, network = TASKS[job.task], NETWORKS[job.network]
    model = task.pattern(task.inputs, job.hidden, task.outputs, cell=network.cell)
    network.initialise(model)
    return model


def train(job: Job) -> dict[str, Any]:
    """Train until solved, for max_steps at most, or until a loss is not finite. Returns "losses",
    pairs (step, loss on new sequences), and "solved_at", a step or None."""
    task = TASKS[job.task]
    torch.manual_seed(job.seed)
    model = build(job)
    generator = Generator().manual_seed(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.learning_rate)
    losses: list[tuple[int, float]] = []
    for step in range(1, job.max_steps + 1):
        x, wanted = task.batch(job.T, job.batch, generator)
        optimizer.zero_grad()
        task.loss(model(x), wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        if step % EVALUATE_EVERY == 0 or step == job.max_steps:
            x, wanted = task.batch(job.T, HELD_OUT, generator)
            with torch.no_grad():
                loss = float(task.loss(model(x), wanted))
            losses.append((step, loss))
            solved = loss < SOLVED * task.baseline(job.T)
            if solved or not math.isfinite(loss):
                return {"losses": losses, "solved_at": step if solved else None}
    return {"losses": losses, "solved_at": None}


def verdict(sample: dict[str, Any]) -> str:
    step, loss = sample["losses"][-1]
    if sample["solved_at"] is not None:
        return f"solved at step {step}"
    if not math.isfinite(loss):
        return f"diverged by step {step}"
    median = statistics.median(loss for _, loss in sample["losses"][-5:])
    return f"not solved in {step} steps (loss {median:.3g})"


def report(samples: dict[Job, dict[str, Any]], jobs: Sequence[Job] = JOBS) -> str:
    """Markdown."""
    rows: dict[tuple[str, int, str], list[str]] = {}
    for job, sample in sorted(samples.items(), key=lambda item: item[0]):
        runs = rows.setdefault((job.task, job.T, job.network), [])
        runs.append(f"seed {job.seed}: {verdict(sample)}")
    origins = sorted(
        {"- " + ", ".join(sample["environment"].values()) for sample in samples.values()}
    )
    lines = [f"# {__doc__}", f"{len(samples)} of {len(jobs)} runs are done.\n", *origins, ""]
    cells = [
        [task, str(T), network, f"{TASKS[task].baseline(T):.4f}", "; ".join(runs)]
        for (task, T, network), runs in rows.items()
    ]
    return "\n".join([*lines, table(["task", "T", "network", "baseline", "runs"], cells)]) + "\n"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.tasks", None, __doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default="runs/tasks", help="default: runs/tasks")
    which = f"run adding at T = 50 with these instead: {', '.join(OTHERS)}"
    parser.add_argument("--cell", nargs="+", choices=OTHERS, metavar="NAME", help=which)
    args = parser.parse_args()
    jobs = jobs_of(args.cell) if args.cell else JOBS
    torch.set_num_threads(1)  # a step is too small to share
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tasks.jsonl"
    path.touch()
    done = [json.loads(line) for line in path.read_text().splitlines()]
    samples = {job: sample for sample in done if (job := Job(**sample["job"])) in jobs}
    here = store.make_header(torch.device("cpu"))
    del here["load"]
    for job in jobs:
        if job not in samples:
            samples[job] = {"job": job._asdict(), **train(job), "environment": here}
            with path.open("a") as file:
                file.write(json.dumps(samples[job]) + "\n")
        print(*job[:4], verdict(samples[job]), sep=", ", flush=True)
        (args.out / "tasks.md").write_text(report(samples, jobs))


if __name__ == "__main__":
    main()
