"""The deliberate mistakes of mutants.py: each one text of one file, and the tests that notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # found exactly once in the file
    new: str
    tests: str  # the arguments of pytest that should notice


LOOPS = "tests/test_kernels.py -k 'each_cell or packed or padding or several_steps'"
FAR = "tests/test_offsets.py"
TF32 = "tests/test_kernels.py tests/test_kernel_numbers.py -k 'tf32 or rounding or nan'"
LAYOUTS = "tests/test_kernels.py -k 'one_piece or layout'"
SLICES = "tests/test_slices.py"
REGULARISED = "tests/test_regularisers.py -k 'results_and and triton'"
TORCH = "tests/test_recurrence.py -k test_torch_backend"
TRITON = "tests/test_recurrence.py -k test_kernels"
GRADIENTS = "tests/test_gradients.py"
AUTOGRAD = "tests/test_autograd.py tests/test_changed_in_place.py"
PRECISION = "tests/test_precision.py"
GENERIC = "tests/test_generic.py -k 'module or without or places'"

CHANGES: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("kernels/portable_forward.py", LOOPS): {
        "row-mask-forward": (
            """rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    x_gates_offsets""",
            """rows >= 0)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    x_gates_offsets""",
        ),
        "padding-of-x-read": (
            "wanted = mask & active_at(i + 1, steps, backwards, lengths)",
            "wanted = mask & active_at(i + 1, steps, backwards, None)",
        ),
        "packed-rows-that-do-not-exist-written": (
            """
    within = lengths if offsets_ptr is not None else None  # where zeros are no part of memory

    # W_hh is""",
            """
    within = None

    # W_hh is""",
        ),
        "padding-left-unwritten": (
            "(output,), written, H, DIRECT)",
            "(output,), present, H, DIRECT)",
        ),
        "steps-beyond-the-end-taken": (
            "            if lengths is None and k == 0:\n                state = ",
            "            if lengths is None:\n                state = ",
        ),
        "steps-beyond-the-end-written": (
            """mask & active_at(i, steps, backwards, within)
            taken""",
            """mask
            taken""",
        ),
    },
    ("kernels/portable_backward.py", LOOPS): {
        "row-mask-backward": (
            """rows < B)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    output_offsets""",
            """rows >= 0)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    output_offsets""",
        ),
        "d_h_gates-for-d_x_gates": (
            "store_tiles(d_x_gates_ptr + d_gates_at, d_x_gates, written, H, DIRECT)",
            "store_tiles(d_x_gates_ptr + d_gates_at, d_h_gates, written, H, DIRECT)",
        ),
        "gradient-of-c-dropped": (
            "d_before = with_first(d_h, d_prev)",
            "d_before = with_first(d_h, d_state)",
        ),
        "gradient-past-w_hh-dropped": ("d_h += d_prev[0]", "d_h += 0.0"),
        "inactive-gradient-not-handed-on": (
            "d_state = where_active(active, d_before, d_state)",
            "d_state = d_before",
        ),
        "steps-beyond-the-end-taken-backward": (
            "            if lengths is None and k == 0:\n                d_state = ",
            "            if lengths is None:\n                d_state = ",
        ),
        "param-gradient-of-padding": (
            "d_params_step = zero_where_not(active, d_params_step)",
            "d_params_step = d_params_step",
        ),
    },
    ("kernels/steps.py", LOOPS): {
        "prefetch-past-the-end": (
            "tl.zeros((1, 1), tl.int32) + i < steps",
            "tl.zeros((1, 1), tl.int32) + i <= steps",
        ),
        "offsets-past-the-end": (
            "tl.load(offsets_ptr + place, mask=i < steps, other=0)",
            "tl.load(offsets_ptr + place)",
        ),
        "first-state-of-a-row-not-its-own": (
            "ptrs = tl.where(active, ptrs, state0_ptrs[s] + state0_offsets)",
            "ptrs = ptrs",
        ),
    },
    ("kernels/portable_forward.py", FAR): {
        "32-bit-rows-forward": (
            """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    first_unit""",
            """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    first_unit""",
        ),
        "32-bit-steps": ("x_gates_stride_t.to(tl.int64) * UNIT,", "x_gates_stride_t * UNIT,"),
    },
    ("kernels/portable_backward.py", FAR): {
        "32-bit-rows-backward": (
            """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    units""",
            """    rows = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    units""",
        ),
        "32-bit-steps-backward": ("d_output_stride_t.to(tl.int64)", "d_output_stride_t"),
    },
    ("kernels/exchange.py", SLICES): {
        "no-wait": (
            "    while (arrived < SLICES) & (polls < patience):",
            """    arrived = SLICES + 0 * arrived
    while (arrived < SLICES) & (polls < patience):""",
        ),
    },
    ("kernels/portable_forward.py", SLICES): {
        "alive-forgotten-forward": (
            """SLICES) & alive
                h = gather""",
            """SLICES)
                h = gather""",
        ),
        "patience-paid-again-forward": (
            """tl.where(alive, patience, 0), SLICES) & alive
                h = gather""",
            """patience, SLICES) & alive
                h = gather""",
        ),
        "one-slot": (
            """                slot_ptr = exchange_ptr + (i % 2) * exchange_size
                tl.store(""",
            """                slot_ptr = exchange_ptr
                tl.store(""",
        ),
    },
    ("kernels/portable_backward.py", SLICES): {
        "alive-forgotten-backward": (
            """SLICES) & alive
            d_h = zero""",
            """SLICES)
            d_h = zero""",
        ),
        "patience-paid-again-backward": (
            """tl.where(alive, patience, 0), SLICES) & alive
            d_h = zero""",
            """patience, SLICES) & alive
            d_h = zero""",
        ),
    },
    ("kernels/products.py", TF32): {
        "tf32-cut-off": ("    bits += tl.where(tl.abs(x) < 3.401992901712019e38, 0x1000, 0)\n", ""),
        "tf32-swallows-nan": ("    bits = (x + 0.0).to(", "    bits = x.to("),
    },
    ("kernels/launch.py", TF32): {
        "tf32-cut-off-in-weights": ("bits + 0x1000", "bits"),
    },
    ("kernels/launch.py", LAYOUTS): {
        "weights-not-contiguous": (
            "    weight = weight.contiguous()\n",
            "    weight = weight.contiguous() if weight.dtype == torch.float32 else weight\n",
        ),
        "saved-layout-believed": ("    output = dense(output)\n", ""),
    },
    ("kernels/cells.py", LOOPS): {
        "tanh-vjp-sign": ("(1.0 - state[0] * state[0])", "(1.0 + state[0] * state[0])"),
        "relu-vjp-sign": (
            "tl.where(state[0] <= 0.0, 0.0, d_state[0])",
            "tl.where(state[0] >= 0.0, 0.0, d_state[0])",
        ),
        "gru-vjp-sign": ("d_h * (state_prev[0] - n) * z", "d_h * (n - state_prev[0]) * z"),
        "lstm-vjp-sign": ("d_c * g * i * (1.0 - i)", "-d_c * g * i * (1.0 - i)"),
    },
    ("rnn/cells.py", GRADIENTS): {
        "tanh-vjp-sign-torch": ("(1 - state[0] * state[0])", "(1 + state[0] * state[0])"),
        "relu-vjp-sign-torch": ("torch.where(state[0] <= 0, ", "torch.where(state[0] > 0, "),
        "gru-vjp-sign-torch": ("d_h * (state_prev[0] - n) * z", "d_h * (n - state_prev[0]) * z"),
        "lstm-vjp-sign-torch": ("    d_i = d_c * g", "    d_i = -d_c * g"),
    },
    ("rnn/in_place.py", TORCH): {
        "tanh-vjp-sign-in-place": (
            "torch.mul(states[0], states[0], out=d[0]).neg_().add_(1)",
            "torch.mul(states[0], states[0], out=d[0]).add_(1)",
        ),
        "relu-vjp-sign-in-place": ("return [states[0] <= 0]", "return [states[0] > 0]"),
        "gru-vjp-sign-in-place": (
            "torch.sub(prev[0], n, out=d_z)",
            "torch.sub(n, prev[0], out=d_z)",
        ),
        "lstm-vjp-sign-in-place": (
            "torch.mul(g, i, out=d_i).mul_(1 - i)",
            "torch.mul(g, i, out=d_i).mul_(i - 1)",
        ),
        "gradient-of-c-dropped-torch": ("    d_c.mul_(f)\n", "    d_c.mul_(0)\n"),
        "gradient-past-w_hh-dropped-torch": ("        past=True,\n", ""),
    },
    ("rnn/engines.py", TORCH): {
        "d_h_gates-for-d_x_gates-torch": (
            "result.d_x_gates.append(d_x_gates)",
            "result.d_x_gates.append(d_h_gates)",
        ),
    },
    ("rnn/torch_path.py", TORCH): {
        "last-gradient-of-ended-rows-dropped": (
            "d_h_steps[t][begun:].add_(d_state0[0][begun:n])",
            "d_h_steps[t][begun:].add_(0)",
        ),
        "rows-begin-with-zero": (
            "torch.cat((s[:rows], s0[rows:n]))",
            "torch.cat((s[:rows], s0[rows:n] * 0))",
        ),
        "first-state-in-the-weight-gradient-torch": (
            "parts += (step, first[fewer:n])",
            "parts += (step, first[fewer:n] * 0)",
        ),
    },
    ("rnn/engines.py", TRITON): {
        "first-state-in-the-weight-gradient": (
            """        if backwards:
            last =""",
            """        if False:
            last =""",
        ),
    },
    ("rnn/torch_path.py", "tests/test_precision.py -k large"): {
        "float64-packed": ("        and weight.dtype == torch.float32\n", ""),
    },
    ("rnn/functional.py", AUTOGRAD): {
        "lengths-not-copied": (
            "    return lengths.detach().to(device, non_blocking=True).clamp(0, T)",
            "    return lengths.to(device)",
        ),
    },
    ("rnn/autograd.py", AUTOGRAD): {
        "biases-share-a-gradient": (
            "found.d_h_gates[d].sum(0) if mine[3] else None",
            "found.d_h_gates[d].sum(0) if cell.split else d_weights[-1]",
        ),
    },
    ("rnn/engines.py", AUTOGRAD): {
        "padding-in-the-weight-gradient": (
            "x = torch.where(time_major(self.spec, active), x, torch.zeros_like(x))",
            "x = x",
        ),
        "output-not-copied": (
            "return parts[0].clone() if copy else own(parts[0])",
            "return own(parts[0])",
        ),
    },
    ("rnn/autograd.py", PRECISION): {
        "backward-inside-autocast": (
            """        needs = ctx.needs_input_grad
        with without_autocast(x.device):""",
            """        needs = ctx.needs_input_grad
        with nullcontext():""",
        ),
        "no-second-derivative-of-large-layers": (
            "            torch.is_grad_enabled()  # create_graph",
            "            torch.is_grad_enabled() and tensors[0].size(-1) < 512  # create_graph",
        ),
    },
    ("kernels/portable_forward.py", REGULARISED): {
        "first-h-not-dropped": (
            "h = ((state[0] * h_mask).to(dtype),)",
            "h = (state[0].to(dtype),)",
        ),
        "h-not-dropped": ("taken = taken * h_mask", "taken = taken"),
    },
    ("kernels/portable_backward.py", REGULARISED): {
        "gradient-of-dropped-h-passes": ("d_h = d_h * h_mask + d_prev[0]", "d_h = d_h + d_prev[0]"),
        "gradient-past-w_hh-dropped-too": (
            "d_h = d_h * h_mask + d_prev[0]",
            "d_h = (d_h + d_prev[0]) * h_mask",
        ),
        "mixed-states-for-the-steps-own": ("after = last_of(saved, STATES)", "after = state"),
        "gradient-of-what-was-kept-lost": ("d_prev = add(kept, d_prev)", "d_prev = d_prev"),
        "gradient-of-h-not-clamped": ("d_h = clamp(d_h, grad_clip)", "d_h = d_h"),
    },
    ("kernels/portable_forward.py", "tests/test_slices.py -k regularisers"): {
        "first-h-of-others-not-dropped": (
            "h = scale(h, gather(h_mask_ptr",
            "scale(h, gather(h_mask_ptr",
        ),
    },
    ("rnn/torch_path.py", "tests/test_regularisers.py -k 'results_and and float64'"): {
        "gradient-of-dropped-h-passes-in-torch": ("handed.mul_(h_mask[rows])", "pass"),
        "gradient-of-kept-h-lost-in-torch": ("handed.add_(kept[0][rows])", "pass"),
        "gradient-of-kept-c-lost-in-torch": ("x.add_(past)", "pass"),
        "gradient-of-h-not-clamped-in-torch": ("handed.clamp_(-grad_clip, grad_clip)", "pass"),
    },
    ("rnn/engines.py", "tests/test_regularisers.py -k 'results_and'"): {
        "weights-see-all-of-h-in-torch": (
            "taken = taken * mask_of_rows(mine.h_mask, rows.sizes)",
            "taken = taken",
        ),
        "weights-see-all-of-h": ("h, h0 = h * h_mask, h0 * h_mask", "pass"),
    },
    ("rnn/autograd.py", GRADIENTS): {
        "no-second-derivative": (
            "            torch.is_grad_enabled()  # create_graph",
            "            False  # create_graph",
        ),
    },
    ("rnn/autograd.py", "tests/test_changed_in_place.py"): {
        "input-always-saved": ("x if read else None, lengths", "x, lengths"),
        "version-of-the-input-ignored": ("x._version != ctx.version", "False"),
    },
    ("rnn/run.py", "tests/test_graphs.py -k transforms"): {
        "an-op-under-transforms": ("is_compiling() and not transformed()", "is_compiling()"),
    },
    (
        "rnn/ops.py",
        "tests/test_ops.py tests/test_graphs.py -k 'replaced or derivatives or lengths_in'",
    ): {
        "another-engines-numbers": (" or dispatch.given_up(plan)", ""),
        "no-second-derivative-of-the-op": ("if torch.is_grad_enabled() or any(", "if any("),
        "no-batched-gradient-of-the-op": (" or any(is_batched(d) for d in d_outputs)", ""),
        "nothing-runs-again": ("if run_again and layer.cell.stored:", "if False:"),
    },
    ("rnn/layer.py", GENERIC): {
        "inner-biases-after-own-params": ("(*inner, *each[d][own:])", "(*each[d][own:], *inner)"),
    },
    ("rnn/autograd.py", GENERIC): {
        "first-own-param-without-a-gradient": ("% per_direction >= own", "% per_direction > own"),
    },
    ("rnn/in_place.py", GENERIC): {
        "gradients-written-over": ("if S > 1:  # one may", "if False:  # one may"),
    },
    ("rnn/checked.py", "tests/test_generic_module.py -k initial"): {
        "own-params-as-they-are-drawn": (" else weight.fill_(initial)", " else None"),
    },
    ("rnn/checked.py", "tests/test_explain.py"): {
        "explain-takes-steps-for-rows": ("x.size(0 if self.batch_first else 1)\n", "x.size(1)\n"),
    },
}
MUTANTS = [
    Mutant(name, file, *texts, tests)
    for (file, tests), changes in CHANGES.items()
    for name, texts in changes.items()
]
