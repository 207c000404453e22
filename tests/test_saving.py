"""Saving: a training that was saved is whole, and no run takes the work of another."""

import errno
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from commands import ENVIRONMENT, TEXT, refusal

from rnn.__main__ import main
from rnn.jobs import checkpoint, files
from rnn.jobs.checkpoint import Saver
from rnn.jobs.cli import JobError

pytestmark = pytest.mark.usefixtures("one_thread")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    """A list: as long as it is empty the disk has room; its items are the folders that are full."""
    full = []
    fsync = os.fsync

    def fails(handle):
        if any(os.readlink(f"/proc/self/fd/{handle}").startswith(str(folder)) for folder in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)
    return full


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, full_disk):
    path = tmp_path / "file"
    files.replace_file(path, b"old")
    full_disk.append(tmp_path)
    with pytest.raises(OSError, match="No space"):
        files.replace_file(path, b"new", keep=tmp_path / "kept")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]
    full_disk.clear()
    files.replace_file(path, b"new", keep=tmp_path / "kept")
    assert path.read_bytes() == b"new" and (tmp_path / "kept").read_bytes() == b"old"
    assert names(tmp_path) == ["file", "kept"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_it_saves_after_the_first_step_then_every_so_many_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    path = tmp_path / "c.pt"
    saver, saved = Saver(path, every=10.0, overwrite=False), []
    for step in range(35):
        saver.after_step(lambda step=step: {"step": step})
        if not saved or torch.load(path)["step"] != saved[-1]:
            saved.append(torch.load(path)["step"])
        now[0] += 1
    assert saved == [0, 10, 20, 30]
    saver.at_end(lambda: {"step": 99})
    assert torch.load(path)["step"] == 99


def test_a_first_save_that_fails_ends_the_run_and_a_later_one_does_not(tmp_path, full_disk, capsys):
    full_disk.append(tmp_path)
    saver = Saver(tmp_path / "c.pt", every=1e-9, overwrite=False)
    with pytest.raises(JobError, match=r"cannot save .*c.pt: .*No space"):
        saver.after_step(lambda: {"step": 0})
    full_disk.clear()
    saver.after_step(lambda: {"step": 1})
    full_disk.append(tmp_path)
    saver.after_step(lambda: {"step": 2})
    assert "will try again: [Errno 28] No space left on device" in capsys.readouterr().err
    assert torch.load(tmp_path / "c.pt")["step"] == 1 and names(tmp_path) == ["c.pt"]
    full_disk.clear()
    saver.after_step(lambda: {"step": 3})
    assert torch.load(tmp_path / "c.pt")["step"] == 3


def test_a_last_save_that_fails_goes_to_the_temporary_files(tmp_path, full_disk, monkeypatch):
    (out := tmp_path / "out").mkdir()
    (spare := tmp_path / "spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    saver = Saver(out / "c.pt", every=10.0, overwrite=False)
    saver.after_step(lambda: {"step": 1})
    full_disk.append(out)
    with pytest.raises(
        JobError, match="No space left on device; it is 0 s old; saved as "
    ) as error:
        saver.at_end(lambda: {"step": 9})
    (elsewhere,) = spare.rglob("c.pt")
    assert str(error.value).endswith(f"saved as {elsewhere} instead")
    assert torch.load(elsewhere)["step"] == 9 and torch.load(out / "c.pt")["step"] == 1
    full_disk.append(spare)
    with pytest.raises(JobError, match=r"nor among the temporary files: .*No space"):
        saver.at_end(lambda: {"step": 10})


@pytest.mark.parametrize("job", [["--seconds", "0.2"], ["many-to-one", "--steps", "5"]])
def test_a_disk_without_room_is_one_line(job, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    text = ["--text", tmp_path / "text"] if len(job) == 2 and job[0] == "--seconds" else []
    command = [sys.executable, "-m", "rnn", *job, *text, "--out", tmp_path / "out"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command],
        env={**ENVIRONMENT, "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot save" in done.stderr.splitlines()[-1] and names(tmp_path / "out") == []


def test_a_checkpoint_of_an_earlier_run_is_kept(path, capsys):
    text = path.with_name("text.txt")
    text.write_text(TEXT)
    flags = ["--text", text, "--out", path.parent, "--hidden-size", 8, "--seconds", 1e-9]
    old = path.read_bytes()
    assert main([*map(str, flags)]) == 0
    assert "it will be kept as" in capsys.readouterr().out
    kept = [path.with_name(f"checkpoint-{n}.pt") for n in (1, 2)]
    assert kept[0].read_bytes() == old != path.read_bytes()
    assert main([*map(str, flags)]) == 0
    assert kept[0].read_bytes() == old and kept[1].exists()
    assert main([*map(str, flags), "--overwrite"]) == 0
    assert main(["--resume", "--out", str(path.parent)]) == 0
    assert names(path.parent) == [kept[0].name, kept[1].name, path.name, "loss.png", "text.txt"]


def test_a_pattern_keeps_an_earlier_checkpoint_too(tmp_path):
    command = ["many-to-one", "--steps", "2", "--hidden-size", "8", "--out", str(tmp_path)]
    for flags in ([], [], ["--overwrite"]):
        assert main(command + flags) == 0
    assert [name for name in names(tmp_path) if name.endswith(".pt")] == [
        "checkpoint-1.pt",
        "checkpoint.pt",
    ]


def test_a_run_that_fails_at_once_leaves_the_old_checkpoint_in_its_place(path, capsys):
    before = path.read_bytes()
    refusal(capsys, "--text", path.with_name("none"), "--out", path.parent)
    assert path.read_bytes() == before and names(path.parent) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on a folder")
def test_a_folder_has_one_run_at_a_time(path, capsys):
    (unfinished := path.with_name("unfinished-checkpoint.pt-0123abcd.tmp")).write_bytes(b"half")
    before = path.read_bytes()
    (path.parent / "text").write_text(TEXT)
    flags = ["--text", path.parent / "text", "--out", path.parent]
    with files.owned(path.parent):
        assert not unfinished.exists()  # of a run that was killed
        unfinished.write_bytes(b"half")
        for command in (flags, ["--resume", *flags], ["many-to-one", "--out", path.parent]):
            with pytest.raises(SystemExit):
                main([*map(str, command)])
            assert f"another run is using {path.parent}" in capsys.readouterr().err
        assert unfinished.exists() and path.read_bytes() == before
    assert main(["--resume", "--out", str(path.parent)]) == 0
