"""Addresses in tensors of more elements than 32 bits count.

No machine has that memory. So the kernels run on numbers of steps and rows that are not there:
loads and stores are noted and not done, and every address must be that of an element.
"""

import numpy as np
import pytest
import torch
from cases import Case, problem

from rnn.cells import CELLS

pytest.importorskip("triton")

from launched import planned
from test_slices import sliced
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from rnn.kernels import launch
from rnn.kernels.layout import Inputs

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter")

PASSES = ["forward", "backward"]
T, B = 18, 2**31 - 1000  # the tiles of a batch times T, too, are more than 2^31
STRIDES = {  # in units of 16 elements: of a step and of a row
    "time_major": (2**33, 2**29),
    "batch_major": (2**29, 2**33),
}


class Noted:
    """Stands where a kernel stood: runs its last batch tile, with T, B and strides as above."""

    def __init__(self, kernel, strides):
        self.kernel, self.strides = kernel, strides
        self.arguments, self.read, self.written, self.polled = {}, [], [], []

    def __getitem__(self, grid):
        def run(launch_cooperative_grid=False, **arguments):
            arguments |= {"T": T, "B": B, "UNIT": 16}
            arguments["first_tile"] = -(-B // arguments["BLOCK_B"]) - 1
            for name in arguments:
                if "_stride_" in name:
                    arguments[name] = self.strides["tb".index(name[-1])]
            self.arguments, self.grid = arguments, grid
            self.kernel[(1, *grid[1:])](**arguments)

        return run

    def note(self, addresses, pointers, mask):
        mask = True if mask is None else np.broadcast_to(mask.data, pointers.data.shape)
        addresses.append(np.ravel(pointers.data[mask]).astype(np.int64))

    def load(self, pointers, mask, other, *rest):
        self.note(self.read, pointers, mask)
        element = pointers.get_element_ty()
        value = T if element.primitive_bitwidth == 64 else 0  # of lengths, or of all else
        dtype = np.int64 if element.primitive_bitwidth == 64 else np.float16
        return TensorHandle(np.full(pointers.data.shape, value, dtype), element)

    def store(self, pointers, value, mask, *rest):
        self.note(self.written, pointers, mask)

    def atomic(self, op, pointers, value, mask, *rest):
        self.note(self.polled, pointers, mask)
        all_there = np.full(pointers.data.shape, self.arguments["SLICES"], np.int32)
        return TensorHandle(all_there, value.dtype)

    def elements(self, tensor, *offsets):
        """Addresses of elements, whose offsets are sums of all of these."""
        total = np.zeros((), np.int64)
        for offset in offsets:
            total = np.add.outer(total, np.asarray(offset, np.int64))
        return tensor.data_ptr() + tensor.element_size() * total.ravel()

    def expected(self, name):
        """Of the argument of this name: the elements of the last tile of rows."""
        tensor = self.arguments[name]
        if isinstance(tensor, tuple):
            return [s for part in tensor for s in self.of(name, part)]
        return self.of(name, tensor)

    def of(self, name, tensor):
        a = self.arguments
        if tensor is None:
            return []
        D, (H, G, K, tile) = self.grid[2], (a[n] for n in ("H", "GATES", "STORED", "first_tile"))
        tiles, width = tile + 1, H if "STEP" in a else G * H
        rows = np.arange(tile * a["BLOCK_B"], B)
        directions = np.arange(D)
        steps = np.arange(T)[:, None] * 16 * self.strides[0] + rows * 16 * self.strides[1]
        match name:
            case "x_gates_ptr" | "d_x_gates_ptr" | "d_h_gates_ptr":
                return [self.elements(tensor, steps.ravel(), np.arange(D * G * H))]
            case "output_ptr" | "d_output_ptr":
                return [self.elements(tensor, steps.ravel(), np.arange(D * H))]
            case "stored_ptr":
                return [self.elements(tensor, steps.ravel(), np.arange(D * K * H))]
            case "state0_ptrs" | "state_n_ptrs" | "d_state_n_ptrs" | "d_state0_ptrs":
                return [self.elements(tensor, directions * B * H, rows * H, np.arange(H))]
            case "exchange_ptr":
                slots = np.arange(2) * D * B * width
                each = directions * B * width, rows * width, np.arange(width)
                return [self.elements(tensor, slots, *each)]
            case "flags_ptr":
                return [self.elements(tensor, (directions * tiles + tile) * T, np.arange(T))]
            case "d_params_ptr":
                parts = np.arange(tensor.size(0)) * tiles * D * H + tile * D * H
                return [self.elements(tensor, parts, directions * H, np.arange(H))]
            case "lengths_ptr":
                return [self.elements(tensor, rows)]
            case "weight_hh_ptr" | "param_ptrs":
                return [self.elements(tensor, np.arange(tensor.numel()))]
        raise AssertionError(name)

    def check(self):
        touched = {"read": self.read, "written": self.written, "polled": self.polled}
        names = {
            "read": [
                *("x_gates_ptr", "state0_ptrs", "weight_hh_ptr", "param_ptrs", "lengths_ptr"),
                *("exchange_ptr", "d_output_ptr", "d_state_n_ptrs"),
            ],
            "written": [
                *("output_ptr", "stored_ptr", "state_n_ptrs", "exchange_ptr", "d_x_gates_ptr"),
                *("d_h_gates_ptr", "d_state0_ptrs", "d_params_ptr"),
            ],
            "polled": ["flags_ptr"],
        }
        if "STEP" not in self.arguments:  # the backward pass reads what the forward pass wrote
            names["written"] = [
                n for n in names["written"] if n not in ("output_ptr", "stored_ptr")
            ]
            names["read"] += ["output_ptr", "stored_ptr"]
        for verb, parts in touched.items():
            each = [s for n in names[verb] if n in self.arguments for s in self.expected(n)]
            got = np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
            want = np.unique(np.concatenate([np.empty(0, np.int64), *each]))
            assert np.isin(got, want).all(), f"{verb}: {(~np.isin(got, want)).sum()} elsewhere"
            if verb != "read":  # a cell need not read all that is there
                assert np.isin(want, got).all(), f"{verb}: {(~np.isin(want, got)).sum()} missing"


@interpreted
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_offset_is_64_bits_wide(cell, layout, ragged, slices, monkeypatch):
    case = Case(cell, T=2, B=5, H=32, directions=2, ragged=ragged)
    p = problem(case).to(torch.float16)
    plan = planned(case, torch.float16) if slices == 1 else sliced(case, 16, torch.float16)
    assert plan.slices == slices
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params, p.lengths)
    kernels = [Noted(getattr(launch, f"{name}_kernel"), STRIDES[layout]) for name in PASSES]
    output, stored = inputs.x_gates.new_zeros(2, 5, 64), None
    if CELLS[cell].stored:
        stored = inputs.x_gates.new_zeros(2, 5, 64 * CELLS[cell].stored)
    for name, kernel in zip(PASSES, kernels):
        monkeypatch.setattr(launch, f"{name}_kernel", kernel)
        with monkeypatch.context() as m:
            m.setattr(interpreter_builder, "create_masked_load", kernel.load, raising=False)
            m.setattr(interpreter_builder, "create_masked_store", kernel.store, raising=False)
            m.setattr(interpreter_builder, "create_atomic_rmw", kernel.atomic, raising=False)
            if name == "forward":
                launch.forward(plan, CELLS[cell], inputs, True)
            else:
                each = p.d_output, p.d_state_n, True, True, True
                launch.backward(plan, CELLS[cell], inputs, output, stored, *each)
        kernel.check()
