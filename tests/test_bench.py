"""python -m bench: who is wrong is not timed, errors are one line."""

import os
import re
from pathlib import Path

import pytest
import torch
import twins

from bench import __main__ as command
from bench import report
from bench.cases import DTYPES, Case, sets
from bench.measure import CANNOT, CRASHED, FIGURES, MEASURED, WRONG, Row, Time, measure
from bench.providers import DEFAULT, PROVIDERS, Model
from bench.store import ROOT, Results
from rnn.cells import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case("rnn_tanh", T=4, B=3, I=5, H=6)
A, B = "rnn_tanh-T2-B1-I4-H4", "rnn_tanh-T3-B1-I4-H4"


def measured(case=CASE, providers=DEFAULT):
    return {row.provider: row for row in measure(case, providers, torch.device("cpu"), 1e-6)}


def bench(*arguments):
    return command.main(["--out", "out", "--seconds", "1e-6", *map(str, arguments)])


def one_line(capsys, *arguments):
    """What a command says that is refused before anything is measured, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        command.main(list(map(str, arguments)))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.err.count("\n") == 1 and "[1/" not in shown.out
    return shown.err


@pytest.mark.parametrize("gpu", [False, True])
def test_every_cell_is_measured_and_every_case_is_read_from_its_name(gpu):
    cases = [case for chosen in sets(gpu).values() for case in chosen]
    assert {case.cell for case in cases} == set(CELLS) - {"rnn_relu"}
    assert {case.cell for case in command.choose_cases(None, gpu, ["mgu"])} == {"mgu"}
    assert [Case.parse(str(case)) for case in cases] == cases
    assert Case.parse("rnn_tanh-T4-B3-H2") == Case("rnn_tanh", 4, 3, 2, 2)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "tf32"])
@pytest.mark.parametrize("kind", [(), (2, True, True)], ids=["plain", "deep"])
@pytest.mark.parametrize("cell", CELLS)
def test_who_is_right_is_timed(cell, kind, dtype):
    providers = ["auto", "torch-path", "loop", *(["torch.nn"] if cell in twins.CELLS else [])]
    rows = measured(Case(cell, 4, 3, 5, 6, *kind)._replace(dtype=dtype), providers)
    for row in rows.values():
        assert (row.status, row.reason) == (MEASURED, "") and row.error <= 10 * DTYPES[dtype].floor
        assert set(row.times) == set(FIGURES)
        assert all(0 < time.low <= time.median <= time.high for time in row.times.values())
    assert rows["auto"].ran


def test_a_cell_of_the_gallery_is_held_to_the_equation(gallery):
    case = Case("peephole_lstm", 16, 4, 16, 16, 2, True, True, "bfloat16")  # beyond the floor
    rows = measured(case, [*DEFAULT, "loop"])
    assert rows["auto"].status == rows["loop"].status == MEASURED
    assert (rows["torch.nn"].status, rows["torch.nn"].reason) == (
        CANNOT,
        "torch.nn has no peephole_lstm",
    )


def one_wrong_number(output, h_n, x):
    return output.index_put([torch.tensor(i) for i in (1, 0, 2)], output.new_tensor(0.5)), h_n


def crash_at(call):
    calls = []

    def crash(output, h_n, x):
        calls.append(x)
        if len(calls) == call:
            raise ZeroDivisionError("of the test")
        return output, h_n

    return crash


def spoiled(spoil):
    build_right = PROVIDERS["auto"]

    def build(case, weights):
        model = build_right(case, weights)
        return Model(lambda x: spoil(*model.forward(x), x), model.parameters)

    return build


@pytest.mark.parametrize(
    "spoil, status, reason",
    [
        (one_wrong_number, WRONG, "output is off by"),
        (lambda output, h_n, x: (output, h_n * torch.nan), WRONG, "state 0 is off by inf"),
        (lambda output, h_n, x: (output + (x - x.detach()).sum(), h_n), WRONG, "d_x is off by"),
        (crash_at(1), CRASHED, "ZeroDivisionError: of the test"),  # in the check
        (crash_at(5), CRASHED, "ZeroDivisionError: of the test"),  # when timed
    ],
)
def test_who_is_wrong_or_crashes_has_no_times_and_stops_nobody(spoil, status, reason, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "loop", spoiled(spoil))
    # In bfloat16, since there one wrong number among many is lost in the mean of all errors.
    rows = measured(Case("rnn_tanh", 64, 16, 16, 16, dtype="bfloat16"), ["loop", *DEFAULT])
    assert (rows["loop"].status, rows["loop"].times) == (status, {})
    assert rows["loop"].reason.startswith(reason)
    assert rows["auto"].status == rows["torch.nn"].status == MEASURED


@pytest.mark.parametrize("provider, status", [("auto", 1), ("loop", 0)])
def test_the_exit_status_is_that_of_ours(provider, status, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROVIDERS, provider, spoiled(lambda output, h_n, x: (2 * output, h_n)))
    assert bench("--cases", A, "--providers", "torch.nn", provider) == status
    assert f"{A} {provider}: wrong: output is off by" in capsys.readouterr().err


def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("above\n<!-- bench -->\nold\n<!-- /bench -->\nbelow\n")
    assert bench("--cases", A, B, "--into", "notes.md") == 0
    results = Results.read(Path("out/results.json"))
    assert list(results.rows) == [(case, provider) for case in (A, B) for provider in DEFAULT]
    page, notes = Path("out/README.md").read_text(), Path("notes.md").read_text()
    assert page.count(f"| `{A}` |") == len(DEFAULT)
    assert re.fullmatch(r"above\n<!-- bench -->\n.*<!-- /bench -->\nbelow\n", notes, re.DOTALL)
    assert "old" not in notes and "[out](out/README.md)" in notes
    assert report.in_short(results) in notes and report.in_short(results) in page


def test_the_readme_quotes_what_was_measured():
    """No figure of the summary is typed in by hand."""
    readme = (ROOT / "README.md").read_text()
    quoted = readme.split(report.MARKS[0])[1].split(report.MARKS[1])[0]
    (folder,) = re.findall(r"\((\S*)/README.md\)", quoted)
    results = Results.read(ROOT / folder / "results.json")
    assert quoted == report.summary(results, folder)
    assert report.in_short(results) in (ROOT / folder / "README.md").read_text()


def results_of(median, spread=0.01, status=MEASURED):
    times = dict.fromkeys(FIGURES, Time(median, median * (1 - spread), median * (1 + spread)))
    row = Row(A, "auto", status, "for a reason", "", 0.0, times if status == MEASURED else {})
    header = dict.fromkeys(("device", "threads", "versions", "commit", "load"), "of the test")
    return Results(header, [row])


@pytest.mark.parametrize(
    "after, status, line",
    [
        (results_of(1.3e-3), 1, f"1.30 x the time  {A} auto step"),
        (results_of(0.7e-3), 0, f"0.70 x the time  {A} auto step"),
        (results_of(1.05e-3), 0, "0 slower, 0 faster"),
        (results_of(1.3e-3, spread=0.5), 0, "0 slower, 0 faster"),  # noise
        (results_of(1e-3, status=WRONG), 1, f"{A} auto: wrong: for a reason"),
    ],
)
def test_compare_tells_what_got_slower(after, status, line, tmp_path, capsys):
    results_of(1e-3).write(tmp_path / "a")
    after.write(tmp_path / "b")
    assert (
        command.main(["--compare", *(str(tmp_path / x / "results.json") for x in "ab")]) == status
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["--cases", "rnn_tanh-T4"], "got 'rnn_tanh-T4'"),
        (["--cases", "rnn_tanh-T0-B3-H2"], "a set is one of shapes"),
        (["--cases", f"{A}-tf32"], "tf32 is a mode of NVIDIA GPUs"),
        (["--providers", "nobody"], "invalid choice: 'nobody'"),
        (["--into", os.devnull], "<!-- bench --> and <!-- /bench --> once each"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
        (["--cases", A, "--out", "/proc/x"], "/proc/x"),
        (["--accept"], "--accept needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tf32 and --accept are right on a GPU")
def test_an_error_is_one_line(arguments, fault, capsys):
    assert fault in one_line(capsys, *arguments)


@pytest.mark.parametrize("lacking", ["header", "rows", "device"])
def test_what_is_no_file_of_results_is_not_read_and_not_replaced(lacking, tmp_path, capsys):
    results_of(1e-3).write(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(other := path.read_text().replace(f'"{lacking}"', '"other"'))
    for arguments in (["--compare", path, path], ["--quick", "--out", tmp_path]):
        assert f"is not a file of results: '{lacking}'" in one_line(capsys, *arguments)
    assert path.read_text() == other
