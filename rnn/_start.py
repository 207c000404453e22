"""Ctrl-C between the start of `python -m rnn` and its command ends the process without a traceback.

Python imports the package before its __main__, and torch takes seconds. While it looks for the
module of `-m`, sys.argv[0] is "-m": in every other program this file does nothing.
"""

import os
import signal
import sys


def end(*_: object) -> None:
    os._exit(128 + signal.SIGINT)  # nothing is to be saved, and an import may swallow an exception


if getattr(sys, "argv", None) and sys.argv[0] == "-m":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
