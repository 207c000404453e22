"""The compiled kernels, without a GPU: nothing spills, and W_hh is not loaded in the time loop."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# sm, dtype, tf32, hidden size, cell, with lengths
GRID = [
    *(
        (sm, *shape, "rnn_tanh", False)
        for sm, shape in itertools.product(
            (80, 90, 100),
            (
                ("bfloat16", True, 128),
                ("bfloat16", True, 256),
                ("float32", True, 128),
                ("float32", False, 128),
            ),
        )
    ),
    (80, "float16", True, 64, "rnn_relu", True),
    (90, "bfloat16", True, 201, "rnn_relu", True),
    (80, "bfloat16", True, 201, "rnn_tanh", True),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled():
    """[(case, forward figures, reverse figures)], made by two processes side by side."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent), "TRITON_DEFAULT_FP_FUSION": "1"}
    halves = [GRID[::2], GRID[1::2]]
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "compile_kernels.py", json.dumps(half)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for half in halves
    ]
    figures = {}
    for half, process in zip(halves, processes):
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        rows = json.loads(output)
        figures |= {case: rows[2 * i : 2 * i + 2] for i, case in enumerate(half)}
    return figures


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("case", GRID, ids=lambda c: f"sm_{c[0]}-" + "-".join(map(str, c[1:])))
def test_resident(case, direction, compiled):
    figures = compiled[case][direction == "reverse"]
    assert figures["spilled"] == 0
    assert figures["sram"] <= figures["planned"]
    # Each part of W_hh is loaded once, before the loop; in the loop come x_gates, or d_output
    # and output, and nothing else.
    assert figures["before"].count(figures["weights"]) == figures["parts"]
    assert figures["inside"] == [figures["tile"]] * (1 if direction == "forward" else 2)
