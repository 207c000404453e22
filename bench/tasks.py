"""Which length does a network solve? Two classical tasks: python -m bench.tasks

Adding (Hochreiter & Schmidhuber 1997, in the form of Le, Jaitly & Hinton 2015): T pairs of a
number, uniform in [0, 1), and a mark, 1 at two steps and else 0; wanted after the last step is
the sum of the two marked numbers. Who always says 1 has the mean squared error 1/6.

Copy (Hochreiter & Schmidhuber 1997, in the form of Arjovsky, Shah & Bengio 2016): ten symbols of
eight, T - 1 blanks, a delimiter, ten blanks; wanted are T + 10 blanks and then the ten symbols.
Who remembers nothing has the cross entropy 10 log 8 / (T + 20), in nats a step.

A run is solved at the first evaluation, each 200 steps on 1000 new sequences, whose loss is below
0.06 of that baseline (0.01 for adding). "Not solved in N steps" does not mean "cannot".
Each batch is new: no sequence comes twice. Unlike in the papers the optimiser is Adam with the
gradient's norm clipped at 1 and one rate a task (Le et al.: SGD, rate and clipping searched for
each network and length); some thousand steps and not up to millions; two seeds.

Each finished run is a line of --samples; started again, the command does only what lacks.
"""

import argparse
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import rnn

EVALUATE_EVERY, HELD_OUT = 200, 1000
SOLVED = 0.06  # of the baseline


def adding_batch(T: int, B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T, B, 2): numbers and marks; the sums (B, 1)."""
    numbers = torch.rand(T, B, generator=generator)
    two_steps = torch.rand(T, B, generator=generator).topk(2, 0).indices
    marks = torch.zeros(T, B).scatter_(0, two_steps, 1)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0).unsqueeze(1)


SYMBOLS, RECALLED = 8, 10
BLANK, DELIMITER = SYMBOLS, SYMBOLS + 1


def copy_batch(T: int, B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T + 20, B, 10), one-hot; the symbol wanted at each step (T + 20, B), int64."""
    symbols = torch.randint(SYMBOLS, (RECALLED, B), generator=generator)
    given = torch.full((T + 2 * RECALLED, B), BLANK)
    wanted = given.clone()
    given[:RECALLED] = symbols
    given[-RECALLED - 1] = DELIMITER
    wanted[-RECALLED:] = symbols
    return F.one_hot(given, SYMBOLS + 2).float(), wanted


class ManyToMany(nn.Module):
    """y_t = W_hy h_t at each step: (T, B, I) -> (T, B, O)."""

    def __init__(self, input_size: int, hidden_size: int, outputs: int, cell: str) -> None:
        super().__init__()
        self.rnn = rnn.RNN(input_size, hidden_size, nonlinearity=cell.removeprefix("rnn_"))
        self.readout = nn.Linear(hidden_size, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0])


class ManyToOne(ManyToMany):
    """y = W_hy h_T after the last step: (T, B, I) -> (B, O)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0][-1])


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def copy_baseline(T: int) -> float:
    return RECALLED * math.log(SYMBOLS) / (T + 2 * RECALLED)


class Task(NamedTuple):
    batch: Callable[[int, int, Generator], tuple[Tensor, Tensor]]
    pattern: type[ManyToMany]
    inputs: int
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    baseline: Callable[[int], float]  # loss of the best answer that ignores the input, by T


TASKS = {
    "adding": Task(adding_batch, ManyToOne, 2, 1, F.mse_loss, "squared error", lambda T: 1 / 6),
    "copy": Task(copy_batch, ManyToMany, 10, 9, cross_entropy, "nats a step", copy_baseline),
}


def default(model: ManyToMany) -> None:
    """PyTorch's: all uniform in +-1 / sqrt(H)."""


def orthogonal(model: ManyToMany) -> None:
    """W_hh a random orthogonal matrix, biases 0, W_ih of variance 1 / I, W_hy as PyTorch has it."""
    weight_ih, weight_hh, *biases = model.rnn.all_weights[0]
    nn.init.orthogonal_(weight_hh)
    nn.init.normal_(weight_ih, std=weight_ih.size(1) ** -0.5)
    for bias in biases:
        nn.init.zeros_(bias)


def identity(model: ManyToMany) -> None:
    """W_hh = 1, biases 0, all else normal with deviation 0.001 (Le, Jaitly & Hinton 2015)."""
    weight_ih, weight_hh, *biases = model.rnn.all_weights[0]
    nn.init.eye_(weight_hh)
    for bias in biases:
        nn.init.zeros_(bias)
    for weight in (weight_ih, model.readout.weight):
        nn.init.normal_(weight, std=0.001)


class Network(NamedTuple):
    cell: str  # a name in rnn.reference.CELLS
    initialise: Callable[[ManyToMany], None]


NETWORKS = {
    "tanh": Network("rnn_tanh", default),
    "tanh, orthogonal": Network("rnn_tanh", orthogonal),
    "relu, identity": Network("rnn_relu", identity),
}


class Job(NamedTuple):
    """One run, with all that decides its outcome."""

    task: str
    T: int
    network: str
    seed: int
    max_steps: int
    hidden: int
    batch: int
    learning_rate: float
    max_norm: float = 1.0

    def __str__(self) -> str:
        return f"{self.task} T={self.T} {self.network}, seed {self.seed}"


# Hidden units and batch: those of Le et al. for adding, of Arjovsky et al. for copy.
# The learning rates come from a few trials with seed 0: of relu for adding, of orthogonal tanh for
# copy. These two are favoured by that.
ADDING: dict[str, Any] = {"max_steps": 15_000, "hidden": 100, "batch": 16, "learning_rate": 3e-4}
COPY: dict[str, Any] = {"max_steps": 6_000, "hidden": 128, "batch": 20, "learning_rate": 1e-3}
JOBS = [
    Job(task, T, network, seed, **settings)
    for seed in (0, 1)
    for task, lengths, networks, settings in (
        ("adding", (50, 100, 150, 200, 300), ("tanh", "relu, identity"), ADDING),
        ("copy", (1, 10, 30, 100), NETWORKS, COPY),
    )
    for T, network in product(lengths, networks)
]


def build(job: Job) -> ManyToMany:
    task, network = TASKS[job.task], NETWORKS[job.network]
    model = task.pattern(task.inputs, job.hidden, task.outputs, cell=network.cell)
    network.initialise(model)
    return model


def train(job: Job) -> dict[str, Any]:
    """Train until solved, for max_steps at most, or until a loss is not finite.

    Returns "losses", pairs (step, loss on new sequences), and "solved_at", a step or None.
    """
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
            if loss < SOLVED * task.baseline(job.T):
                return {"losses": losses, "solved_at": step}
            if not math.isfinite(loss):
                break
    return {"losses": losses, "solved_at": None}


def verdict(sample: dict[str, Any]) -> str:
    step, loss = sample["losses"][-1]
    if sample["solved_at"] is not None:
        return f"solved at step {step}"
    if not math.isfinite(loss):
        return f"diverged by step {step}"
    return f"not solved in {step} steps (best loss {min(v for _, v in sample['losses']):.3g})"


def environment() -> dict[str, str]:
    """Where a sample comes from. The commit ends in -dirty if the tree had other changes."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": subprocess.check_output(describe, text=True).strip(),
        "machine": f"{cpu[1] if cpu else platform.machine()}, one thread, float32",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


PAPERS = """\
What the papers report; of all but the first, only who solves which length is compared here.

- Hochreiter & Schmidhuber 1997, section 5.4, table 7: an LSTM of 93 weights solves adding at
  T = 100, 500, 1000 after 74,000, 209,000, 853,000 sequences (means of 10 trials). Their form
  differs: numbers in [-1, 1], both marks in the first half. Not checked: there is no LSTM yet.
- Le, Jaitly & Hinton 2015 (arXiv 1504.00941), section 4.1: adding at T = 150, 200, 300, 400; relu
  with identity learns as well as LSTM does, tanh and LSTM begin to struggle around T = 150. The
  error of the constant 1 is given as 0.1767; it is 1/6, the variance of the sum of two numbers.
- Arjovsky, Shah & Bengio 2016 (arXiv 1511.06464), section 5: copy at T = 100, 200, 300, 500 and
  adding at T = 100, 200, 400, 750; a tanh RNN does not beat the baseline at any of them.
- Henaff, Szlam & LeCun 2016 (arXiv 1602.06662): in networks with linear transitions a random
  orthogonal W_hh suits copy, and the identity suits adding.
"""


def report(samples: dict[Job, dict[str, Any]]) -> str:
    """Markdown."""
    rows: dict[tuple[str, int, str], list[str]] = {}
    for job, sample in samples.items():
        runs = rows.setdefault((job.task, job.T, job.network), [])
        runs.append(f"seed {job.seed}: {verdict(sample)}")
    origins = sorted({", ".join(sample["environment"].values()) for sample in samples.values()})
    lines = [
        f"# {__doc__}",
        f"{len(samples)} of {len(JOBS)} runs are done:",
        "",
        *(f"- {origin}" for origin in origins),
        "",
        PAPERS,
    ]
    lines += ["| task | T | network | baseline | runs |", "|---|---|---|---|---|"]
    for (name, T, network), runs in rows.items():
        baseline = TASKS[name].baseline(T)
        lines.append(f"| {name} | {T} | {network} | {baseline:.4f} | {'; '.join(runs)} |")
    return "\n".join(lines) + "\n"


def plot(samples: dict[Job, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((job.task, job.T) for job in samples))
    figure = Figure(figsize=(12, 3.2 * -(-len(panels) // 3)), layout="constrained")
    figure.suptitle("Loss on new sequences by step; dashed: baseline; dotted: solved below")
    for i, (name, T) in enumerate(panels, 1):
        axis = figure.add_subplot(-(-len(panels) // 3), 3, i, yscale="log", title=f"{name}, {T=}")
        for job, sample in samples.items():
            if (job.task, job.T) == (name, T):
                colour = f"C{list(NETWORKS).index(job.network)}"
                label = job.network if job.seed == 0 else None
                axis.plot(*zip(*sample["losses"]), colour, linewidth=1, label=label)
        axis.axhline(TASKS[name].baseline(T), color="black", linestyle="--")
        axis.axhline(SOLVED * TASKS[name].baseline(T), color="black", linestyle=":")
        axis.set_ylabel(TASKS[name].loss_name)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.tasks", None, __doc__, formatter_class=raw)
    default = Path("runs/tasks.jsonl")
    parser.add_argument("--samples", type=Path, default=default, help=f"default {default}")
    parser.add_argument("--results", type=Path, help="folder for tasks.json, tasks.md, tasks.png")
    parser.add_argument("--report-only", action="store_true", help="of what --samples holds")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a step is too small to share
    args.samples.parent.mkdir(parents=True, exist_ok=True)
    args.samples.touch()
    done = [json.loads(line) for line in args.samples.read_text().splitlines()]
    samples = {Job(**sample["job"]): sample for sample in done}
    here = environment()
    for job in JOBS if not args.report_only else ():
        if job not in samples:
            samples[job] = {"job": job._asdict(), **train(job), "environment": here}
            with args.samples.open("a") as file:
                file.write(json.dumps(samples[job]) + "\n")
        print(f"{job}: {verdict(samples[job])}", flush=True)
    samples = {job: samples[job] for job in sorted(JOBS) if job in samples}
    if args.results:
        lines = ",\n".join(json.dumps(sample) for sample in samples.values())
        (args.results / "tasks.json").write_text(f"[\n{lines}\n]\n")
        (args.results / "tasks.md").write_text(report(samples))
        plot(samples, args.results / "tasks.png")


if __name__ == "__main__":
    main()
