"""A training step on the CPU, against torch.nn.RNN: python -m bench.cpu

Both run in one process on the same weights and input, in turns, so that what disturbs one
disturbs the other; reported are medians and the ratio of medians (above 1: ours is faster).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import rnn


class Case(NamedTuple):
    T: int
    B: int
    H: int  # hidden and input size
    num_layers: int = 1
    bidirectional: bool = False

    def __str__(self) -> str:
        return (
            f"T{self.T}-B{self.B}-H{self.H}-L{self.num_layers}"
            f"{'-bidirectional' if self.bidirectional else ''}"
        )


SHAPES = [
    (128, 16, 128),
    (256, 32, 256),
    (512, 8, 512),
    (64, 64, 1024),
    (1024, 1, 256),
    (128, 64, 64),
]
CASES = (
    [Case(*shape) for shape in SHAPES]
    + [Case(*shape, num_layers=2) for shape in SHAPES]
    + [Case(*shape, bidirectional=True) for shape in SHAPES]
)


def training_step(module: torch.nn.RNN, case: Case) -> Callable[[], list[torch.Tensor]]:
    """A function that runs forward and backward and returns the results and all gradients."""
    generator = torch.Generator().manual_seed(0)
    D = 2 if case.bidirectional else 1
    x = torch.randn(case.T, case.B, case.H, generator=generator).requires_grad_()
    d_output = torch.randn(case.T, case.B, D * case.H, generator=generator)
    d_h_n = torch.randn(case.num_layers * D, case.B, case.H, generator=generator)
    inputs = [x, *module.parameters()]

    def step() -> list[torch.Tensor]:
        output, h_n = module(x)
        gradients = torch.autograd.grad([output, h_n], inputs, [d_output, d_h_n])
        return [output.detach(), h_n.detach(), *gradients]

    return step


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Raise AssertionError unless both computed the same: no time is worth anything before."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def interleaved(steps: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, the functions called in turns until the time is up (5 turns least)."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 5 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
        turns += 1
    return samples


def measure(case: Case, seconds: float) -> dict:
    torch.manual_seed(0)
    theirs = torch.nn.RNN(case.H, case.H, case.num_layers, bidirectional=case.bidirectional)
    ours = rnn.RNN(
        case.H, case.H, case.num_layers, bidirectional=case.bidirectional, backend="torch"
    )
    ours.load_state_dict(theirs.state_dict())
    steps = {"ours": training_step(ours, case), "torch.nn": training_step(theirs, case)}
    check(steps["ours"](), steps["torch.nn"]())
    samples = interleaved(steps, seconds)
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "case": str(case),
        "ours_ms": median["ours"] * 1e3,
        "torch_nn_ms": median["torch.nn"] * 1e3,
        "ratio": median["torch.nn"] / median["ours"],
        "turns": len(samples["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case (default 4)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, training step")
    print(f"{'case':34} {'ours ms':>9} {'torch.nn ms':>12} {'ratio':>6}")
    rows = []
    for case in CASES:
        rows.append(row := measure(case, args.seconds))
        figures = f"{row['ours_ms']:9.2f} {row['torch_nn_ms']:12.2f} {row['ratio']:6.2f}"
        print(f"{row['case']:34} {figures}", flush=True)
    groups = {
        "one layer": lambda case: case.num_layers == 1 and not case.bidirectional,
        "two layers": lambda case: case.num_layers == 2,
        "bidirectional": lambda case: case.bidirectional,
    }
    for name, belongs in groups.items():
        ratios = [row["ratio"] for case, row in zip(CASES, rows) if belongs(case)]
        mean = statistics.geometric_mean(ratios)
        print(f"{name}: least ratio {min(ratios):.2f}, geometric mean {mean:.2f}")
    if args.json:
        report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
