"""The tests that interpret or compile kernels, on other releases of Triton.

    python tests/versions.py 3.6.0 3.8.0 [--tests tests/test_compiled.py ...]

Each release is installed into a folder of its own, for this run, and stands before the one of the
environment; torch stays. Exits with 1 if a test failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASES = [
    "3.6.0",
    "3.7.1",
    "3.8.0",
    "3.9.0",
]  # that the CUDA builds of torch bring, and the newest
TESTS = ["tests/test_compiled.py", "tests/test_recurrence.py", "tests/test_slices.py"]


def passes(release: str, tests: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={release}", "numpy<2.4"], check=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        version = [sys.executable, "-c", "import triton; print('Triton', triton.__version__)"]
        got = subprocess.run(version, env=environment, check=True, capture_output=True, text=True)
        assert got.stdout == f"Triton {release}\n", got.stdout
        print(got.stdout, end="", flush=True)
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "-W",
            "ignore::DeprecationWarning",
        ]
        done = subprocess.run([*pytest, *tests], cwd=ROOT, env=environment)
    return done.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE")
    arguments = parser.parse_args()
    failed = [r for r in arguments.releases if not passes(r, arguments.tests)]
    print("failed on Triton", ", ".join(failed)) if failed else print("passed on all")
    sys.exit(bool(failed))
