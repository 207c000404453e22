"""The README's code runs as it stands."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_python_blocks_run(capsys, derived):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "layer" in capsys.readouterr().out
    assert namespace["output"].shape == (100, 8, 256)


def test_the_two_commands_are_those_of_ci():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1)
    run = (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[demo]' && python -m rnn" in commands
    assert "pip install -e '.[test]' && python -m pytest" in commands
    assert "pip install -q -e '.[test]'" in run and "python -m pytest" in run


def test_the_scores_of_the_patterns_are_those_of_the_runs_whose_pictures_are_shown():
    names = re.findall(r"!\[(.*?)\]\(bench/results/patterns/(.*?)\.png\)", README)
    assert len(names) == 5 and all(title == file for title, file in names)
    for name, _ in names:
        assert (ROOT / f"bench/results/patterns/{name}.png").stat().st_size > 0
        scores = json.loads((ROOT / f"bench/results/patterns/{name}.json").read_text())["scores"]
        line = README.split(f"| `{name}`: ")[1].split("\n")[0]
        shown = re.findall(r"\d\.\d{3}", line)
        assert shown == [f"{value:.3f}" for value in scores.values()]
        assert list(scores)[-1] == "RNN"
