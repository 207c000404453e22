"""Ends that come from outside: Ctrl-C, SIGTERM of a cluster or a service, SIGHUP of a terminal."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    SIGNALS.append(signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Handle SIGNALS so for a while. A SIGHUP that is ignored stays so: nohup asks for that."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if number is signal.SIGINT or old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Raising:
    """A handler that raises Interrupted. Five Ctrl-C in a row are one: those within a second of
    the first do nothing, and once `done` is set, none does anything."""

    def __init__(self) -> None:
        self.done = False
        self.at = -1.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.done and (self.at < 0 or time.monotonic() - self.at > 1):
            self.at = time.monotonic()
            raise Interrupted(number)


@contextmanager
def interrupts_held() -> Iterator[Event]:
    """Turn SIGNALS into an event, so that none cuts a training step or a save in two. The first to
    arrive is delivered at the end of the block, unless that ends with an exception."""
    interrupted, arrived = Event(), []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        interrupted.set()

    with handled_by(hold):
        yield interrupted
    if arrived:
        signal.raise_signal(arrived[0])
