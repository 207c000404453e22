"""How the package is imported: under one name, and without triton too."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rnn
from rnn.kernels import plan

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, Absent())
import torch, rnn
module = rnn.RNN(3, 4)
x = torch.randn(20, 2, 3)
output, _ = module(x)
output.sum().backward()
assert "triton is not installed" in rnn.explain(module, x), rnn.explain(module, x)
try:
    rnn.RNN(3, 4, backend="triton")(x)
except RuntimeError as error:
    assert "triton is not installed" in str(error)
else:
    raise SystemExit("backend='triton' ran without triton")
"""


USED = """
import sys, torch, rnn.kernels.plan
assert rnn.__file__.startswith({folder!r}), rnn.__file__
assert rnn.kernels.plan.__file__.startswith({folder!r}), rnn.kernels.plan.__file__
assert "kernels" not in sys.modules
assert "rnn.gallery" not in sys.modules
rnn.RNN(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
"""


def python(code: str, cwd: Path | None = None) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr


def copy_of_rnn(folder: Path) -> None:
    """The package without rnn/kernels."""
    ignored = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(Path(rnn.__file__).parent, folder / "rnn", ignore=ignored)


@pytest.mark.parametrize("stand_in", ["../kernels", None], ids=["a text file", "nothing"])
def test_a_checkout_without_symbolic_links(stand_in, tmp_path):
    copy_of_rnn(tmp_path)
    shutil.copytree(Path(plan.__file__).parent, tmp_path / "kernels")
    if stand_in:
        (tmp_path / "rnn" / "kernels").write_text(stand_in)
    python(USED.format(folder=str(tmp_path)), tmp_path)


def test_without_the_kernels_the_import_says_so(tmp_path):
    copy_of_rnn(tmp_path)
    (tmp_path / "rnn" / "kernels").write_text("../kernels")
    command = [sys.executable, "-c", "import rnn"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert (
        last == f"ImportError: {tmp_path / 'rnn'} needs the folder {tmp_path / 'kernels'} beside it"
    )


def test_the_name_kernels_is_left_to_its_owner():
    python("import sys, rnn; assert 'kernels' not in sys.modules and 'rnn.kernels' in sys.modules")


def test_without_triton():
    python(WITHOUT_TRITON)


def test_the_public_face():
    patterns = ["EncoderDecoder", "ManyToMany", "ManyToOne", "OneToMany", "OneToOne"]
    functions = ["cell", "check_cell", "convert", "explain", "recurrence", "source"]
    functions += ["straight_through"]
    assert rnn.__all__ == ["GRU", "LSTM", "RNN", *patterns, "Recurrent", *functions]
