"""A fault that a launch reports is raised once, whatever threads and kernels do meanwhile."""

import os
import sys
import threading
import traceback
from collections import Counter

import pytest
import torch

from rnn.kernels.chips import CHIPS
from rnn.kernels.limits import Layer
from rnn.kernels.plan import plan

pytest.importorskip("triton")
from rnn.kernels import faults

CPU = torch.device("cpu")
PLAN = plan(Layer(1, 1, 0, 0, 512, 16, 1, torch.bfloat16, True), CHIPS["sm_80"].limits())


def forget():
    for table in (faults._words, faults._raised, faults._launches):
        table.clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No launch before, and none left behind; threads change as often as they can."""
    monkeypatch.setattr(faults, "_count", 0)
    forget()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    forget()


def launch(pass_name="forward pass", T=3, device=CPU):
    return faults.new_launch(pass_name, T, 2, PLAN, device)


def give_up(words, number):
    """What every block does that gives up: the kernels' atomic_max."""
    word = words[number % faults.WORDS]
    word.fill_(max(int(word), number))


def raised(device=CPU) -> int:
    """The number of the launch that is raised next, or 0."""
    try:
        faults.raise_reported(device)
    except RuntimeError as error:
        return int(str(error).split()[1])
    return 0


def in_threads(work, count):
    start = threading.Barrier(count)

    def run(i):
        start.wait()
        work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_error_names_the_launch():
    launch("forward pass of rnn_tanh", 7)
    words, number = launch("backward pass of rnn_tanh", 8)
    launch("forward pass of rnn_tanh", 9)
    give_up(words, number)
    with pytest.raises(RuntimeError, match=r"^launch 2 gave up.*NaN: the backward.*T=8, B=2: W_hh"):
        launch()


def test_a_number_belongs_to_one_launch():
    given = []

    def work(i):
        for T in range(3000):
            _, number = launch(f"pass {i}", T)
            given.append(number)
            if faults._launches[number][:2] != (f"pass {i}", T):
                given.append("recorded for another launch")

    in_threads(work, 8)
    assert sorted(given) == list(range(1, 24001))


def test_first_launches_at_once():
    reports = []
    for _ in range(1000):
        faults._words.clear()
        reports.clear()
        in_threads(lambda i: reports.append(launch()), 2)
        for words, number in reports:
            give_up(words, number)
        assert sorted(number for _, number in reports) == [raised(), raised()]
        assert raised() == 0


def test_every_fault_is_raised_once():
    """Two threads launch, look and hear of faults, while the blocks of every third launch give
    up in a third, two blocks each."""
    reports, heard, gave_up, done = [], [], [], threading.Event()

    def work(i):
        if i < 2:
            for _ in range(1000):
                try:
                    reports.append(launch())
                except RuntimeError as error:
                    heard.append(int(str(error).split()[1]))
            done.set()
            return
        while reports or not done.is_set():
            if reports and (report := reports.pop(0))[1] % 3 == 0:
                give_up(*report)
                give_up(*report)
                gave_up.append(report[1])

    in_threads(work, 3)
    while number := raised():
        heard.append(number)
    assert len(gave_up) > 100
    assert Counter(heard) == Counter(gave_up)


def test_faults_of_several_launches():
    """Neither the later one nor the one that was raised hides another."""
    launches = [launch() for _ in range(3)]
    for words, number in launches[1:]:
        give_up(words, number)
    assert raised() == 2
    give_up(*launches[0])
    assert (raised(), raised(), raised()) == (1, 3, 0)


def test_blocks_that_give_up_late():
    words, number = launch()
    give_up(words, number)
    assert raised() == number
    give_up(words, number)
    assert raised() == 0


def test_a_thread_hears_of_its_own_launches_first():
    everyone = threading.Barrier(2)
    heard = {}

    def work(_):
        words, number = launch()
        everyone.wait()
        give_up(words, number)
        everyone.wait()
        heard[number] = raised()

    for _ in range(100):
        in_threads(work, 2)
    assert len(heard) == 200
    assert all(number == own for own, number in heard.items())


def test_devices_are_apart():
    meta = torch.device("meta")  # any other: words lie on the host
    words, number = launch(device=meta)
    launch()
    give_up(words, number)
    assert raised() == 0
    assert (raised(meta), raised(meta)) == (number, 0)


def test_a_launch_that_is_no_longer_remembered():
    words, number = launch()
    for _ in range(faults.WORDS):
        launch()
    give_up(words, number)
    with pytest.raises(RuntimeError, match=r"launch 1 gave up.*an older launch"):
        launch()


def test_numbers_begin_anew(monkeypatch):
    monkeypatch.setattr(faults, "_count", faults.LAST - 1)
    words, number = launch()
    assert number == faults.LAST
    give_up(words, number)
    assert raised() == number
    for want in range(1, faults.WORDS):  # the last of them has the word of LAST
        words, number = launch()
        assert number == want
    give_up(words, number)
    assert (raised(), raised()) == (number, 0)


def test_the_first_launch_in_inference_mode():
    with torch.inference_mode():
        words, number = launch()
    give_up(words, number)
    assert (raised(), raised()) == (number, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_begins_anew():
    """It hears nothing of its parent's launches, and is not stopped by a thread of the parent."""
    words, number = launch()
    give_up(words, number)
    with faults._lock:
        child = os.fork()
        if child == 0:
            try:
                assert faults._lock.acquire(timeout=10)
                faults._lock.release()
                assert raised() == 0
                own = launch()
                give_up(*own)
                assert raised() == own[1]
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert (raised(), raised()) == (number, 0)
