import os
import signal
from importlib.util import find_spec

import torch

# Where there is no GPU the kernels are run by Triton's interpreter. It must be chosen before a
# kernel module is imported, hence here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from interpreted import patch_language_once_a_launch

    patch_language_once_a_launch()

# A shell that puts pytest into the background has it ignore Ctrl-C, and nohup a hang-up: the tests
# of both would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # Windows has none
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Processes of pytest-xdist share the cores: threads that wait for each other cost seconds a step.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def nan_filled():
    """torch.empty and its kin return NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tf32(request):
    """Set torch's switch for tf32 in recurrent networks to request.param for one test."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other cost seconds a step where something else has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The checkpoint of a run of one step, as bytes."""
    from commands import TEXT

    from rnn.jobs import charlm, cli
    from rnn.jobs.language_model import Settings

    folder = tmp_path_factory.mktemp("one-step")
    (folder / "text.txt").write_text(TEXT)
    settings = Settings(
        hidden_size=16, backend="torch", device="cpu", seconds=1e-9, text=str(folder / "text.txt")
    )
    charlm.run(settings, folder)
    return (folder / cli.CHECKPOINT).read_bytes()


@pytest.fixture
def path(one_step, tmp_path):
    """The file of such a checkpoint, in a folder of its own."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(one_step)
    return path


@pytest.fixture
def checked(monkeypatch):
    """No kernel touches an address outside of its tensors."""
    if not torch.cuda.is_available():
        from interpreted import Checked

        from rnn.kernels import launch

        monkeypatch.setattr(launch, "forward_kernel", Checked(launch.forward_kernel))
        monkeypatch.setattr(launch, "backward_kernel", Checked(launch.backward_kernel))


@pytest.fixture
def fresh_compiler():
    """torch.compile forgets its graphs, and their number is 0."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def tables():
    """Cells that a test derives, or that a module of it brings, are no part of the tables that the
    tests of other files read."""
    from rnn import cells, dispatch

    tables = [cells.CELLS]
    if dispatch.kernels is not None:
        from rnn.kernels import cells as tiles

        tables.append(tiles.CELLS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def derived(tables, tmp_path_factory):
    """A test may derive cells: their files lie in a folder of their own. Returns that folder."""
    folder = tmp_path_factory.mktemp("derived")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        yield folder / "fused_rnn"


@pytest.fixture(scope="module")
def gallery(derived):
    """The module rnn.gallery, with its cells in the table."""
    from rnn import gallery
    from rnn.cells import CELLS

    CELLS.update((cell.name, cell) for cell in gallery.GALLERY)
    return gallery
