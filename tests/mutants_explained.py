"""Mutants that no test can kill, because they change nothing that is promised: (file, before, after) -> why."""

from __future__ import annotations

ROWS = "rows are (N, C), whose last axis is axis 1"
EVIDENCE = "how far apart differences may be to count as evidence is no promise"
ANY_NEGATIVE = "NumPy takes any negative size for -1"
NOTHING_CUT = "it begins with registers of which all lanes stay"

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "kernels/attention/mods.py",
        "flat = flat[np.argsort(scores.reshape(-1)[flat], kind='stable')]",
        "flat = flat[np.argsort(scores.reshape(-2)[flat], kind='stable')]",
    ): ANY_NEGATIVE,
    (
        "kernels/attention/mods.py",
        "result = np.array(mod(*(x.reshape(-1)[0] if x.size == 1 else x.copy() for x in arguments), *buffers))",
        "result = np.array(mod(*(x.reshape(-2)[0] if x.size == 1 else x.copy() for x in arguments), *buffers))",
    ): ANY_NEGATIVE,
    (
        "kernels/attention/mods.py",
        "flat = flat[np.linspace(0, flat.size - 1, min(flat.size, _SAMPLES)).astype(np.int64)]",
        "flat = flat[np.linspace(0, flat.size - 2, min(flat.size, _SAMPLES)).astype(np.int64)]",
    ): "which cells are looked at is no promise",
    (
        "kernels/attention/mods.py",
        "noise = 64 * np.finfo(np.float64).eps * np.maximum(abs(low), abs(high)) / h",
        "noise = 65 * np.finfo(np.float64).eps * np.maximum(abs(low), abs(high)) / h",
    ): "a bound on rounding with room to spare",
    (
        "kernels/attention/reference.py",
        "weights = scores - np.where(np.isneginf(lse.real), lse.dtype.type(0), lse)[..., None]",
        "weights = scores - np.where(np.isneginf(lse.real), lse.dtype.type(1), lse)[..., None]",
    ): "in a row without keys every score is -inf or masked, and so is -inf - 1",
    (
        "kernels/linear_attention/cpu.py",
        "flat = (a.reshape(-1) for a in (dout, out, den, h))",
        "flat = (a.reshape(-2) for a in (dout, out, den, h))",
    ): ANY_NEGATIVE,
    (
        "kernels/linear_attention/sweep.py",
        "for c in range((n + 1) // L * L, registers * L, L):",
        "for c in range(1 // L * L, registers * L, L):",
    ): NOTHING_CUT,
    (
        "kernels/linear_attention/sweep.py",
        "for c in range((n + 1) // L * L, registers * L, L):",
        "for c in range(n // L * L, registers * L, L):",
    ): NOTHING_CUT,
    (
        "kernels/linear_attention/sweep.py",
        "for c in range((n + 1) // L * L, registers * L, L):",
        "for c in range((n - 1) // L * L, registers * L, L):",
    ): NOTHING_CUT,
    (
        "kernels/optimizer/cpu.py",
        "if factor < 1:",
        "if factor <= 1:",
    ): "multiplying by 1 changes no bit",
    (
        "kernels/pointwise/reference.py",
        "far = (size > 4) & (size <= 6)",
        "far = (size > 4) & (size < 6)",
    ): "erf(6) rounds to 1, which is what stands beyond",
    (
        "kernels/rowwise/reference.py",
        "out = x - x.real.max(axis=-1, keepdims=True, initial=-np.inf)",
        "out = x - x.real.max(axis=1, keepdims=True, initial=-np.inf)",
    ): ROWS,
    (
        "kernels/rowwise/reference.py",
        "rrms = 1 / np.sqrt(np.einsum('nc,nc->n', x, x) / x.shape[-1] + eps)",
        "rrms = 1 / np.sqrt(np.einsum('nc,nc->n', x, x) / x.shape[1] + eps)",
    ): ROWS,
    (
        "kernels/rowwise/reference.py",
        "slope = np.einsum('nc,nc->n', dnormed, normed) / x.shape[-1]",
        "slope = np.einsum('nc,nc->n', dnormed, normed) / x.shape[1]",
    ): ROWS,
    (
        "ops/attention.py",
        "if array.dtype == np.uint64 and array.size and (array.max() >= 2 ** 63):",
        "if array.size and array.max() >= 2 ** 63:",
    ): "no other integer type holds such a number",
    (
        "ops/loss.py",
        "losses = np.where(positive, target * (np.log(np.where(positive, target, 1)) - input), 0 * target)",
        "losses = np.where(positive, target * (np.log(np.where(positive, target, 2)) - input), 0 * target)",
    ): "where the target is not positive the logarithm is not used",
    (
        "ops/shape.py",
        "if sum(lengths) != length or min(lengths, default=0) < 0:",
        "if sum(lengths) != length or min(lengths, default=1) < 0:",
    ): "of no lengths, neither 0 nor 1 is negative",
    (
        "ops/shape.py",
        "lengths = list(check_shape('split', sizes, least=-2 ** 63))",
        "lengths = list(check_shape('split', sizes, least=-2 ** 64))",
    ): "a negative length is refused in the next line",
    (
        "ops/loss.py",
        "rows, flat, valid = (as_rows(logits), targets.reshape(-1), valid.reshape(-1))",
        "rows, flat, valid = (as_rows(logits), targets.reshape(-2), valid.reshape(-1))",
    ): ANY_NEGATIVE,
    (
        "ops/loss.py",
        "slope = np.where(positive, np.log(np.where(positive, target, 1)) + 1 - input, 0)",
        "slope = np.where(positive, np.log(np.where(positive, target, 2)) + 1 - input, 0)",
    ): "where the target is not positive the logarithm is not used",
    (
        "kernels/pointwise/reference.py",
        "far = (size > 4) & (size <= 6)",
        "far = (size > 4) & (size <= 7)",
    ): "erf is 1 to rounding between 6 and 7 too",
    (
        "kernels/pointwise/reference.py",
        "far = (size > 4) & (size <= 6)",
        "far = (size >= 4) & (size <= 6)",
    ): "both formulas hold at 4",
    (
        "kernels/pointwise/reference.py",
        "out = sign * np.where(np.isnan(size), y, 1)",
        "out = sign / np.where(np.isnan(size), y, 1)",
    ): "the sign by 1, or by NaN, is the same either way",
    (
        "kernels/attention/reference.py",
        "top = np.where(np.isneginf(top), top.dtype.type(0), top)",
        "top = np.where(np.isneginf(top), top.dtype.type(1), top)",
    ): "in a row without keys every score is -inf, and so is -inf - 1",
    (
        "kernels/optimizer/cpu.py",
        "if factor < 1:",
        "if factor < 2:",
    ): "the factor is at most 1, and multiplying by 1 changes no bit",
    (
        "kernels/attention/mods.py",
        "smooth = abs(right - left) <= 0.01 * np.maximum(abs(left), abs(right)) + noise",
        "smooth = abs(right - left) <= 0.01 / np.maximum(abs(left), abs(right)) + noise",
    ): EVIDENCE,
    (
        "kernels/attention/mods.py",
        "smooth = abs(right - left) <= 0.01 * np.maximum(abs(left), abs(right)) + noise",
        "smooth = abs(right - left) <= 0.01 + noise",
    ): EVIDENCE,
    (
        "kernels/attention/mods.py",
        "h = 1e-06 * np.maximum(1, abs(x))",
        "h = 1e-06",
    ): EVIDENCE,
    (
        "kernels/optimizer/reference.py",
        "if factor < 1:",
        "if factor <= 1:",
    ): "multiplying by 1 changes no bit",
    (
        "kernels/optimizer/reference.py",
        "for part, _ in _parts(flat.size, 0):",
        "for part, _ in _parts(flat.size, 1):",
    ): "a sum in other parts is the same to rounding",
    (
        "kernels/optimizer/cpu.py",
        "loops.adam(*arrays, 1.0 - lr * weight_decay if decays else 1.0, 0.0, False, *numbers)",
        "loops.adam(*arrays, 1.0 - lr * weight_decay if decays else 1.0, 1.0, False, *numbers)",
    ): "the number is not used where decays is False",
    (
        "kernels/rowwise/reference.py",
        "rstd = 1 / np.sqrt(np.einsum('nc,nc->n', out, out) / x.shape[-1] + eps)",
        "rstd = 1 / np.sqrt(np.einsum('nc,nc->n', out, out) / x.shape[1] + eps)",
    ): ROWS,
}
