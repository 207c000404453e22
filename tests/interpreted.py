"""Every address that an interpreted kernel touches, checked against the tensors it was given.

The interpreter reads and writes wherever a pointer points. Here a load or store of anything that is
no element of an argument fails, even where the value would be thrown away.
"""

import numpy as np
import torch
from triton.runtime.interpreter import interpreter_builder


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
