"""Generated source, loaded: PyTorch's from memory, Triton's from a file, where Triton reads it.

The files lie in `fused_rnn` beside torch.hub's folder (~/.cache/torch/hub, or where TORCH_HOME or
XDG_CACHE_HOME say), under a hash of what they hold; where that cannot be written to, in a temporary
folder of this process.
"""

import hashlib
import importlib.util
import linecache
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def functions(name: str, source: str) -> dict[str, Any]:
    """The functions of a source. Tracebacks show its lines."""
    file = f"<rnn.source of {name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    namespace: dict[str, Any] = {}
    exec(compile(source, file, "exec"), namespace)
    return namespace


@lru_cache
def temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fused_rnn-"))


def written(name: str, source: str) -> Path:
    """The file of a source, which is written unless it is there already."""
    file_name = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    try:
        return _written(Path(torch.hub.get_dir()).parent / "fused_rnn" / file_name, source)
    except OSError:
        return _written(temporary_folder() / file_name, source)


def _written(path: Path, source: str) -> Path:
    if path.is_file() and path.read_text(encoding="utf-8") == source:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, other = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(source)
    os.replace(other, path)  # at once, whatever other processes do
    return path


def load(name: str, source: str) -> ModuleType:
    """A source for Triton, imported from its file."""
    path = written(name, source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
