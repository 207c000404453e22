"""Triton's interpreter with all programs of a grid at once, each in a process of its own.

The interpreter runs the programs of a grid one after the other, so that one that waits for
another waits for ever. Here the tensors lie in shared memory, every program is a forked process
that is told its own place in the grid, and the interpreter's atomics work on that memory.
"""

import multiprocessing
import random
import time

import numpy as np
import torch
import triton.language as tl
from interpreted import tensors_in
from triton.runtime.interpreter import TensorHandle, interpreter_builder


class Concurrent:
    """Stands where a kernel stood: concurrent[grid](**arguments) runs its programs side by side.

    delays: seconds, at most, that a program sleeps before each atomic operation, drawn anew.
    without: places in the grid of programs that never start.
    pauses: for a place in the grid, seconds to sleep before the n-th atomic operation, by n.
    patiences: for a place in the grid, its own patience.

    `operations` counts the atomic operations of all programs of the last launch.
    """

    def __init__(
        self,
        kernel,
        delays: float = 0.0,
        without: tuple = (),
        pauses: dict | None = None,
        patiences: dict | None = None,
        seconds: float = 120.0,
    ):
        self.kernel, self.delays, self.without, self.seconds = kernel, delays, without, seconds
        self.pauses, self.patiences = pauses or {}, patiences or {}
        self.operations = multiprocessing.Value("q", 0)

    def __getitem__(self, grid):
        def run(launch_cooperative_grid=False, **arguments):
            for tensor in tensors_in(tuple(arguments.values())):
                tensor.share_memory_()
            self.operations.value = 0
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a forked process has none of its parent's threads
            try:
                context = multiprocessing.get_context("fork")
                processes = [
                    context.Process(target=self.program, args=(grid, place, arguments))
                    for place in np.ndindex(*grid)
                    if place not in self.without
                ]
                for process in processes:
                    process.start()
                end = time.monotonic() + self.seconds
                for process in processes:
                    process.join(max(0.0, end - time.monotonic()))
                late = [process for process in processes if process.is_alive()]
                for process in late:
                    process.kill()
                assert not late, f"{len(late)} of {len(processes)} programs did not end"
                assert all(process.exitcode == 0 for process in processes)
            finally:
                torch.set_num_threads(threads)

        return run

    def program(self, grid, place, arguments) -> None:
        def handle(value):
            return TensorHandle(np.array([value], dtype=np.int32), tl.int32)

        interpreter_builder.create_get_program_id = lambda axis: handle(place[axis])
        interpreter_builder.create_get_num_programs = lambda axis: handle(grid[axis])
        atomic = interpreter_builder.create_atomic_rmw
        random_pause = random.Random(hash(place) ^ time.monotonic_ns())
        pauses, done = self.pauses.get(place, {}), 0

        def counted(*args):
            nonlocal done
            done += 1
            time.sleep(pauses.get(done, 0.0) + random_pause.uniform(0.0, self.delays))
            return atomic(*args)

        interpreter_builder.create_atomic_rmw = counted
        patience = self.patiences.get(place, arguments["patience"])
        self.kernel[(1, 1, 1)](**{**arguments, "patience": patience})
        with self.operations.get_lock():
            self.operations.value += done
