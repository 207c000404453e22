"""What is written for users holds: the README's code and commands, and the docstrings' examples."""

import doctest
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import rnn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_the_code_of_the_readme_runs(capsys, derived):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "layer" in capsys.readouterr().out
    assert namespace["output"].shape == (100, 8, 512)


def test_the_two_commands_are_those_of_ci():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1)
    run = (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[demo]' && python -m rnn" in commands
    assert "pip install -e '.[test]' && python -m pytest -n 2" in commands
    assert "pip install -q -e '.[test]'" in run and "python -m pytest -n 2" in run


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", rnn.__all__)
def test_a_public_name_has_an_example_and_it_runs(name, derived):
    """Of classes, the examples of their methods too."""
    thing = getattr(rnn, name)
    assert ">>> " in inspect.getdoc(thing), f"rnn.{name} has no example"
    globs = {"rnn": rnn, "torch": torch}
    found = doctest.DocTestFinder().find(thing, name, globs=globs)
    runner = doctest.DocTestRunner()
    told: list[str] = []
    failed = sum(runner.run(test, out=told.append).failed for test in found)
    assert not failed, "".join(told)


def test_the_scores_of_the_patterns_are_those_of_the_runs_whose_pictures_are_shown():
    page = (ROOT / "bench/results/patterns/README.md").read_text()
    names = re.findall(r"!\[(.*?)\]\(([\w-]*)\.png\)", page)
    assert len(names) == 5 and all(title == file for title, file in names)
    for name, _ in names:
        assert (ROOT / f"bench/results/patterns/{name}.png").stat().st_size > 0
        scores = json.loads((ROOT / f"bench/results/patterns/{name}.json").read_text())["scores"]
        line = page.split(f"| `{name}`: ")[1].split("\n")[0]
        shown = re.findall(r"\d\.\d{3}", line)
        assert shown == [f"{value:.3f}" for value in scores.values()]
        assert list(scores)[-1] == "RNN"
