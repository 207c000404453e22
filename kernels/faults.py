"""What the host hears of a launch whose blocks gave up waiting for each other.

A kernel writes the number of its launch into one word of host memory that the GPU can reach. The
host looks at it before the next sliced launch, which costs no synchronisation.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from .plan import Plan

REMEMBERED = 4096  # launches

_words: dict[torch.device, Tensor] = {}
_launches: OrderedDict[int, tuple[str, int, int, Plan]] = OrderedDict()  # pass, T, B, plan
_count = 0


def new_launch(what: str, T: int, B: int, plan: Plan, device: torch.device) -> tuple[Tensor, int]:
    """The word to report a fault in and the number to report; raises for an earlier launch."""
    global _count
    raise_reported(device)
    _count = _count % (2**31 - 1) + 1
    _launches[_count] = what, T, B, plan
    if len(_launches) > REMEMBERED:
        _launches.popitem(last=False)
    if device not in _words:
        word = torch.zeros(1, dtype=torch.int32)
        _words[device] = word.pin_memory() if device.type == "cuda" else word
    return _words[device], _count


def raise_reported(device: torch.device) -> None:
    """Raise RuntimeError, naming the launch, if one on this device has reported a fault."""
    word = _words.get(device)
    if word is None or (number := int(word)) == 0:
        return
    word.zero_()
    named = "an older launch"
    if number in _launches:
        what, T, B, plan = _launches[number]
        named = f"the {what} of T={T}, B={B}: {plan}"
    raise RuntimeError(
        f"launch {number} gave up waiting for one of its blocks, and its results are NaN: {named}"
    )
