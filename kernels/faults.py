"""What the host hears of a launch whose blocks gave up waiting for each other.

Each device has a row of words in host memory that the GPU can reach. A launch has the word
`number % WORDS` to itself, until WORDS launches later; a kernel that gives up raises it to the
number of its launch. The host looks at the words before the next sliced launch, which costs no
synchronisation. It never resets one: it keeps a copy of what it has raised, and a word that
differs is news. So nothing is lost, whenever the kernel writes.
"""

import os
import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan

WORDS = 4096  # of a device; as many launches are remembered
LAST = 2**31 - 1  # the largest number of a launch, an int32


class Launch(NamedTuple):
    """What an error says of a launch, and who made it."""

    pass_name: str
    T: int
    B: int
    plan: Plan
    thread: int

    def __str__(self) -> str:
        return f"the {self.pass_name} of T={self.T}, B={self.B}: {self.plan}"


_lock = threading.Lock()  # over all of the following
_words: dict[torch.device, Tensor] = {}  # (WORDS,) int32, written by kernels
_raised: dict[torch.device, Tensor] = {}  # (WORDS,) int32, what was raised of it
_launches: OrderedDict[int, Launch] = OrderedDict()
_count = 0


def new_launch(
    pass_name: str, T: int, B: int, plan: Plan, device: torch.device
) -> tuple[Tensor, int]:
    """The words of the device and the number to report; raises for an earlier launch."""
    global _count
    with _lock:
        _raise_reported(device)
        number = _count = _count % LAST + 1
        _launches[number] = Launch(pass_name, T, B, plan, threading.get_ident())
        if len(_launches) > WORDS:
            _launches.popitem(last=False)
        if device not in _words:
            with torch.inference_mode(False):  # tensors made in it cannot be changed outside
                words, _raised[device] = torch.zeros(2, WORDS, dtype=torch.int32, device="cpu")
                _words[device] = words.pin_memory() if device.type == "cuda" else words
        words, raised = _words[device], _raised[device]
        if number <= WORDS and raised[number % WORDS] > number:  # they began anew
            words[number % WORDS] = raised[number % WORDS] = 0
        return words, number


def raise_reported(device: torch.device) -> None:
    """Raise RuntimeError, naming the launch, if one on this device has reported a fault.

    Each fault is raised once. Of several, a caller gets one, first those of its own thread.
    """
    with _lock:
        _raise_reported(device)


def _raise_reported(device: torch.device) -> None:
    words = _words.get(device)
    if words is None or torch.equal(words, _raised[device]):
        return
    news = words[words != _raised[device]].tolist()
    thread = threading.get_ident()
    launches = {number: _launches.get(number) for number in news}
    number = min(launches, key=lambda n: (getattr(launches[n], "thread", None) != thread, n))
    error = RuntimeError(
        f"launch {number} gave up waiting for one of its blocks, and its results are NaN: "
        f"{launches[number] or 'an older launch'}"
    )
    _raised[device][words == number] = number
    raise error


def _forget() -> None:
    """In a forked process: the launches are the parent's, and a thread there may hold the lock."""
    global _lock
    _lock = threading.Lock()
    _words.clear()
    _raised.clear()
    _launches.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
