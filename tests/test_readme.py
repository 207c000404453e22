"""The README's code runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.count("layer ") == 2
    assert namespace["output"].shape == (100, 8, 256)


def test_the_two_commands_are_those_of_ci():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1)
    run = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert "pip install -e '.[demo]' && python -m rnn" in commands
    assert "pip install -e '.[test]' && python -m pytest" in commands
    assert "pip install -q -e '.[test]'" in run and "python -m pytest" in run
