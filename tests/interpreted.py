"""Triton's interpreter, with every address checked, and without half of its work.

The interpreter reads and writes wherever a pointer points. In a `Checked` kernel a load or store of
anything that is no element of an argument fails, even where the value would be thrown away.
"""

import numpy as np
import torch
from triton import language
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder


def patch_language_once_a_launch():
    """For a launch the interpreter puts its own functions into triton.language. It goes through all
    of that module again at each call from one function of a kernel to another, finds nothing left
    to be replaced, and takes half of its time for it. From here on only the first call goes."""
    patch_language, done = interpreter._patch_lang, set()

    def patch(fn):
        seen = fn.__globals__.values()
        modules = tuple(any(m is value for value in seen) for m in (language, language.core))
        if modules in done:
            return None  # a function that is called has no use for the scope
        done.add(modules)
        scope = patch_language(fn)
        restore = scope.restore

        def restore_all():
            done.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def addresses(tensor: torch.Tensor) -> np.ndarray:
    """Of all elements, whatever the strides."""
    total = np.zeros(tuple(tensor.shape), dtype=np.int64)
    for dim, stride in enumerate(tensor.stride()):
        index = np.arange(tensor.size(dim)).reshape(
            [-1 if d == dim else 1 for d in range(tensor.dim())]
        )
        total = total + index * stride
    return total.ravel() * tensor.element_size() + tensor.data_ptr()


class Checked:
    """Stands where a kernel stood: Checked(kernel)[grid](**arguments) checks each access."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(**arguments):
            allowed = [addresses(x) for x in tensors_in(tuple(arguments.values()))]
            allowed = np.unique(np.concatenate(allowed))
            load, store = (
                interpreter_builder.create_masked_load,
                interpreter_builder.create_masked_store,
            )

            def check(pointers, mask, verb):
                touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
                outside = ~np.isin(touched.astype(np.int64), allowed)
                assert not outside.any(), f"{outside.sum()} {verb} outside of every tensor"

            def checked_load(pointers, mask, *rest):
                check(pointers, mask, "elements read")
                return load(pointers, mask, *rest)

            def checked_store(pointers, value, mask, *rest):
                check(pointers, mask, "elements written")
                return store(pointers, value, mask, *rest)

            interpreter_builder.create_masked_load = checked_load
            interpreter_builder.create_masked_store = checked_store
            try:
                self.kernel[grid](**arguments)
            finally:
                del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

        return run
