"""How the package is imported: under one name, and without triton too."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, Absent())
import torch, rnn
module = rnn.RNN(3, 4)
x = torch.randn(5, 2, 3)
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


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_name_kernels_is_left_to_its_owner():
    python("import sys, rnn; assert 'kernels' not in sys.modules and 'rnn.kernels' in sys.modules")


def test_without_triton():
    python(WITHOUT_TRITON)


def test_the_public_face():
    import rnn

    patterns = ["EncoderDecoder", "ManyToMany", "ManyToOne", "OneToMany", "OneToOne"]
    assert rnn.__all__ == ["RNN", *patterns, "explain", "recurrence"]
