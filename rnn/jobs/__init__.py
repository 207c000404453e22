"""The commands of `python -m rnn`: a language model, the five patterns, and a look inside.

Only this file is read before a command is chosen: the others need matplotlib and more.
"""

from typing import NamedTuple


class Command(NamedTuple):
    module: str  # of this folder; its main(name, argv) runs the command
    about: str
    trains: bool = True  # and leaves a checkpoint; else it reads one


COMMANDS = {
    "charlm": Command("charlm", "learn to write, character by character (the default)"),
    "one-to-one": Command("digits", "an image of a digit -> which digit it is"),
    "one-to-many": Command("digits", "an image of a digit -> its name, spelled letter by letter"),
    "many-to-one": Command("digits", "the rows of an image, one by one -> which digit it is"),
    "many-to-many": Command("digits", "a video of digits -> at each frame, the largest so far"),
    "encoder-decoder": Command("numbers", "a number in words -> the same in digits"),
    "sample": Command("sampling", "a checkpoint of charlm -> a text that it writes", trains=False),
    "inspect": Command("inspection", "a checkpoint -> pictures of what its units do", trains=False),
}
