"""Running `python -m rnn` in tests."""

import os
import sys
from pathlib import Path

import pytest

import rnn
from rnn.__main__ import main

TEXT = "".join(f"{n} times {n} is {n * n};\n" for n in range(700))
SMALL = ["--hidden-size", "16", "--backend", "torch"]
RUN = [sys.executable, "-m", "rnn", *SMALL]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(rnn.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


def refusal(capsys, *arguments):
    """The one line on stderr that a command ends with, at exit status 2."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("python -m rnn: ") and line.count("\n") == 1, line
    return line
