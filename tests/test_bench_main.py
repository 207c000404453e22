"""The command python -m bench: what it writes, how it resumes, compares and fails."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import measure as measuring
from bench import results as results_file
from bench.cases import Case, Set
from bench.measure import MEASURED
from bench.providers import PROVIDERS
from bench.report import MARKS, quote
from bench.results import Results, compare, summary
from bench.timing import FIGURES, MIN_TURNS

pytestmark = pytest.mark.usefixtures("one_thread")
A, B, C = (Case("rnn_tanh", T, 2, 3, 4) for T in (2, 3, 5))
NAMES = [name for name in PROVIDERS if name != "compiled"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Small sets with every axis, in the place of those of --quick; no rate is measured."""
    known = {"T": Set("Time steps", [A, B, C], "T"), "both": Set("B and H", [A], "grid")}
    monkeypatch.setattr(command, "quick", lambda: known)
    monkeypatch.setattr(command, "gemm_rate", lambda dtype, device: 1e9)
    monkeypatch.chdir(tmp_path)


def bench(*arguments):
    return command.main(["--quick", "--out", "out", "--seconds", "1e-6", *map(str, arguments)])


def read(name="results.json"):
    return json.loads(Path("out", name).read_text())


def test_a_run_from_end_to_end(capsys):
    assert bench() == 0
    data = read()
    header, rows = data["header"], data["rows"]
    assert {(row["case"], row["provider"]) for row in rows} == {
        (str(case), provider) for case in (A, B, C) for provider in PROVIDERS
    }
    assert header["versions"]["torch"] == torch.__version__ and header["threads"] == 1
    for row in rows:
        if row["provider"] in ("torch-path", "torch.nn", "eager"):
            assert row["status"] == MEASURED
            assert all(len(row["samples"][name]) == MIN_TURNS for name in FIGURES)
        else:
            assert row["status"] == "cannot" and row["reason"]
    page, shown = Path("out/README.md").read_text(), capsys.readouterr().out
    for row in rows:
        lines = [x for x in page.splitlines() if f"`{row['case']}` | {row['provider']} |" in x]
        assert lines and all(row.get("reason", "us") in x or row["samples"] for x in lines)
    for word in [str(A), *PROVIDERS, "flashrnn is not installed", "left out of --quick"]:
        assert word in shown
    for name in ("steps.png", "grid.png", "memory.png", "error.png"):
        assert Path("out", name).read_bytes()[1:4] == b"PNG" and f"({name})" in page
    assert "hidden_size.png" not in page  # no set sweeps H here
    assert "saves B x D x H x itemsize bytes a step: 32 here" in page
    with Path("out/results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * (3 * len(FIGURES) + len(PROVIDERS) - 3)
    timed = [line for line in table if line["figure"]]
    assert all(len(line["samples us"].split()) == MIN_TURNS for line in timed)
    assert {line["device"] for line in table} == {header["device"]}


def stop_at(monkeypatch, call):
    """Interrupt the run at that turn, as Ctrl-C does."""
    calls, turn = [], measuring.turn

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return turn(*arguments)

    monkeypatch.setattr(measuring, "turn", interrupted)
    return lambda: monkeypatch.setattr(measuring, "turn", turn)


def test_an_interrupt_loses_nothing_and_nothing_is_repeated(monkeypatch, capsys):
    providers = ("torch-path", "torch.nn")
    chosen = ("--providers", *providers, "--cases", A, B)
    # A: two warm-ups and two for memory, then five turns of two; B: as many before, then 3 more.
    restore = stop_at(monkeypatch, 14 + 4 + 4)
    assert bench(*chosen) == 130
    assert "goes on from out" in capsys.readouterr().err
    first = {(row["case"], row["provider"]): row for row in read()["rows"]}
    assert all(first[str(A), name]["complete"] for name in providers)
    partial = {name: first[str(B), name]["samples"]["step"] for name in providers}
    assert {name: len(s) for name, s in partial.items()} == {"torch.nn": 1, "torch-path": 2}
    assert Path("out/README.md").exists()
    restore()
    assert bench(*chosen) == 0
    second = {(row["case"], row["provider"]): row for row in read()["rows"]}
    for name in providers:
        assert second[str(A), name] == first[str(A), name]
        samples = second[str(B), name]["samples"]["step"]
        assert samples[: len(partial[name])] == partial[name]
        assert len(samples) == len(partial[name]) + MIN_TURNS
    monkeypatch.setattr(command, "measure", None)  # nothing calls it any more
    assert bench(*chosen) == 0
    assert {(row["case"], row["provider"]): row for row in read()["rows"]} == second


def test_what_ends_a_run_leaves_the_cases_before(monkeypatch):
    measure, cases = command.measure, []

    def ends(case, *arguments):
        cases.append(case)
        if len(cases) == 2:
            raise ZeroDivisionError
        measure(case, *arguments)

    monkeypatch.setattr(command, "measure", ends)
    with pytest.raises(ZeroDivisionError):
        bench("--providers", "torch.nn", "--cases", A, B)
    assert [row["case"] for row in read()["rows"] if row["complete"]] == [str(A)]


def test_a_provider_that_joins_later_is_timed_beside_torch_nn():
    assert bench("--providers", "torch.nn", "--cases", A) == 0
    assert bench("--providers", "torch.nn", "eager", "--cases", A) == 0
    counts = {row["provider"]: len(row["samples"]["step"]) for row in read()["rows"]}
    assert counts == {"torch.nn": 2 * MIN_TURNS, "eager": MIN_TURNS}


def test_results_of_another_commit_are_not_mixed(monkeypatch, capsys):
    chosen = ("--providers", "torch.nn", "--cases")
    assert bench(*chosen, A) == 0
    capsys.readouterr()
    monkeypatch.setattr(results_file, "commit", lambda: "another")
    with pytest.raises(SystemExit) as stopped:
        bench(*chosen, B)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "of another commit" in error and "--mix" in error and "--fresh" in error
    assert [row["case"] for row in read()["rows"]] == [str(A)]
    assert bench(*chosen, A) == 0  # nothing to measure: only the page is written anew
    assert read()["header"]["mixed_with"] == []
    assert bench(*chosen, B, "--mix") == 0
    assert [row["case"] for row in read()["rows"]] == [str(A), str(B)]
    assert read()["header"]["mixed_with"][0]["commit"] == "another"
    assert "of another run" in Path("out/README.md").read_text()
    assert bench(*chosen, B, "--fresh") == 0
    assert [row["case"] for row in read()["rows"]] == [str(B)]


def test_a_wrong_provider_ends_with_status_1(monkeypatch, capsys):
    eager = PROVIDERS["eager"]

    def build(case, weights, device):
        model = eager.build(case, weights, device)
        return model._replace(forward=lambda x: tuple(2 * y for y in model.forward(x)))

    monkeypatch.setitem(PROVIDERS, "eager", eager._replace(build=build))
    assert bench("--cases", A) == 1
    assert f"{A} eager: wrong: output is off by" in capsys.readouterr().err
    assert "wrong: output is off by" in Path("out/README.md").read_text()


def test_a_file_quotes_the_results(capsys):
    Path("notes.md").write_text("above\n<!-- bench -->\nold\n<!-- /bench -->\nbelow\n")
    assert bench("--into", "notes.md") == 0
    notes = Path("notes.md").read_text()
    assert notes.startswith("above\n<!-- bench -->\n") and notes.endswith(
        "<!-- /bench -->\nbelow\n"
    )
    assert "old" not in notes and "[out](out/README.md)" in notes
    table = [line for line in notes.splitlines() if line.startswith("| Time steps | torch-path |")]
    assert len(table) == 1 and table[0] in Path("out/README.md").read_text()
    Path("notes.md").write_text("no marks")
    with pytest.raises(SystemExit):
        bench("--into", "notes.md")
    assert "must hold <!-- bench --> and <!-- /bench --> once" in capsys.readouterr().err


def test_the_readme_quotes_what_was_measured():
    """No figure of the table is typed in by hand."""
    root = Path(command.__file__).parent.parent
    readme = (root / "README.md").read_text()
    quoted = readme.split(MARKS[0])[1].split(MARKS[1])[0]
    folders = re.findall(r"\(([^)]*)/README.md\)", quoted)
    if not folders:
        assert "Not measured yet" in quoted and not list(root.glob("bench/results/*/results.json"))
    for folder in folders:
        assert quoted == quote(Results.read(root / folder / "results.json"), folder)


# ------------------------------------------------------------------------------------ compare


def results_of(seconds, provider="torch-path", case=A, threads=1):
    row = {"status": MEASURED, "complete": True, "samples": {"step": seconds}}
    header = {"format": results_file.FORMAT, "threads": threads}
    return Results(header, {str(case): {provider: row}})


def shown(tmp_path, before, after, *more):
    for name, results in {"a": before, "b": after}.items():
        results.write(tmp_path / name)
    paths = [str(tmp_path / name / results_file.JSON) for name in "ab"]
    return command.main(["--compare", *paths, *more])


STEADY = [1.0e-3, 1.01e-3, 0.99e-3, 1.0e-3, 1.02e-3]


def test_compare_finds_what_got_slower(tmp_path, capsys):
    slower = [1.3 * s for s in STEADY]
    assert shown(tmp_path, results_of(STEADY), results_of(slower)) == 1
    assert f"slower 1.30  {A} torch-path step" in capsys.readouterr().out
    assert shown(tmp_path, results_of(STEADY), results_of(slower), "--threshold", "1.5") == 0
    assert "differs" not in capsys.readouterr().out
    assert shown(tmp_path, results_of(slower), results_of(STEADY, threads=2)) == 0
    faster = capsys.readouterr().out
    assert "faster 0.77" in faster and "the threads differs: 1, then 2" in faster


def test_compare_is_not_taken_in_by_noise(tmp_path):
    noisy = [0.9e-3, 2.0e-3, 1.2e-3, 0.95e-3, 1.9e-3]
    changes, lost = compare(results_of(STEADY), results_of(noisy), 1.1)
    assert changes[0].factor > 1.1 and not changes[0].slower and not lost
    assert shown(tmp_path, results_of(STEADY), results_of(noisy)) == 0


def test_compare_tells_what_can_no_longer_be_measured(tmp_path, capsys):
    after = results_of([])
    after.rows[str(A)]["torch-path"] |= {"status": "wrong", "reason": "d_x is off by 1"}
    assert shown(tmp_path, results_of(STEADY), after) == 1
    assert "measured before, now wrong: d_x is off by 1" in capsys.readouterr().out


def test_quantiles():
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0, 6)
    assert summary([2.0]) == (2.0, 2.0, 2.0, 1)


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["--cases", "rnn_tanh-T4"], "lacks B, H"),
        (["--cases", "nothing"], "is no set (T, both)"),
        (["--providers", "nobody"], "invalid choice: 'nobody'"),
        (["--seconds", "-1"], "must be above 0"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
        (["--compare", "broken.json", "broken.json"], "is not a file of results"),
    ],
)
def test_an_error_is_one_line(arguments, fault, capsys):
    Path("broken.json").write_text("[1")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--quick", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and fault in error


def test_list_shows_sets_cases_and_providers(capsys):
    assert command.main(["--quick", "--list"]) == 0
    listed = capsys.readouterr().out
    for word in ("both: B and H", str(C), *PROVIDERS):
        assert word in listed


def test_accept_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--accept"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "needs a GPU" in error


@pytest.mark.parametrize("failed", [0, 1])
def test_accept_tests_first_and_then_tells_where_we_are_behind(failed, monkeypatch, capsys):
    asked = []

    def benchmark(job, mix, fresh):
        asked.append(job)
        results = results_of([2e-3] * 5, "fused")
        torchs = {"status": MEASURED, "samples": {"step": [1e-3] * 5}}
        results.rows[str(A)]["torch.nn"] = torchs
        return results, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        command.subprocess, "run", lambda line, cwd: SimpleNamespace(returncode=failed)
    )
    monkeypatch.setattr(command, "prepare", lambda args: args)
    monkeypatch.setattr(command, "benchmark", benchmark)
    assert command.main(["--accept"]) == failed
    if failed:
        assert not asked
    else:
        assert asked[0].providers == ["fused", "torch.nn"]
        assert f"behind cuDNN: 0.50  {A} step" in capsys.readouterr().out


WITHOUT_MATPLOTLIB = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
sys.meta_path.insert(0, Absent())
runpy.run_module("bench", run_name="__main__")
"""


def test_without_matplotlib_it_says_what_to_install():
    root = Path(command.__file__).parent.parent
    line = [sys.executable, "-c", WITHOUT_MATPLOTLIB]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "python -m bench needs matplotlib: pip install -e '.[bench]'\n"
