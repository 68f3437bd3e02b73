"""The laws hold for our attention, and each of them can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from testing.plain_attention import Plain
from testing.wrong_attention import WRONG

import minitransformer as mt
from minitransformer import functional as F
from minitransformer import testing
from minitransformer.errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from minitransformer.testing import adapters, laws
from minitransformer.testing.laws import ALL, Law, LawError, check_laws
from minitransformer.testing.laws.trial import Trial

NAMES = [law.name for law in ALL]
DTYPES = ["float64", "float32"]
# Those that hold to the last bit for us.
BITS = {"L1", "L6", "L8", "L16", "L19", "L20"}


def made(kind: type[Plain], **options: Any) -> adapters.Attention:
    return adapters.numpy_function(kind().forward, kind().backward, name=kind.__name__, **options)


def formula(q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
    """As a user would write it."""
    scores = q @ k.swapaxes(2, 3) / q.shape[3] ** 0.5
    if is_causal:
        scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


# ---- they hold ------------------------------------------------------------------------------------


def test_the_laws_are_those_that_were_promised() -> None:
    assert [f"L{n}" for n in range(1, 22)] == NAMES
    assert all(law.statement and law.title for law in ALL)
    assert testing.check_laws is check_laws and testing.laws is laws and testing.adapters is adapters


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_hold_for_our_attention(dtype: str) -> None:
    report = check_laws(adapters.ours(dtype=dtype), max_examples=10)
    assert report, report
    assert report.held == NAMES
    assert {v.law.name for v in report.verdicts if v.sense == "bits"} == BITS


@pytest.mark.thorough
def test_all_hold_on_a_gpu() -> None:
    report = check_laws(adapters.ours(device="simulator"), max_examples=2)
    assert report.held == NAMES, report


def test_the_gradients_of_a_gpu_are_its_slopes() -> None:
    def layer(x: Any, weight: Any, bias: Any) -> Any:
        x, weight, bias = (t.to("simulator") for t in (x, weight, bias))
        heads = F.layer_norm(x, (4,), weight, bias).reshape(1, 3, 1, 4).transpose(1, 2)
        return F.gelu(F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)).to("cpu")

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((1, 3, 4), (4,), (4,))]
    assert mt.gradcheck(layer, arrays, method="central", mode="directional", directions=2)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_all_hold_on_many_problems(dtype: str, backend: str | None) -> None:
    report = check_laws(adapters.ours(backend, dtype=dtype), max_examples=400)
    assert report.held == NAMES, report
    assert all(v.examples >= 300 for v in report.verdicts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_hold_for_the_formulas_in_numpy(dtype: str) -> None:
    report = check_laws(made(Plain, dtype=dtype), max_examples=5)
    assert report.held == NAMES, report


def test_a_plain_function_is_held_to_what_it_can_do() -> None:
    report = check_laws(formula, max_examples=10)
    assert report, report
    assert report.held == ["L1", "L6", "L7", "L8", "L11", "L12", "L13"]
    assert report["L9"].reason == "needs enable_gqa"
    assert report["L2"].reason == "needs lower_right, or attn_mask"
    assert report["L19"].reason == "needs gradient, or dropout_p"
    assert "L9   not applicable  shared key heads are repeated key heads (needs enable_gqa)" in str(report)


def test_our_function_itself_can_be_passed() -> None:
    assert check_laws(F.scaled_dot_product_attention, ["L11"], max_examples=3).held == ["L11"]
    assert check_laws(adapters.ours, [ALL[0]], max_examples=3).held == ["L1"]


def test_the_same_report_every_time() -> None:
    assert str(check_laws(formula, max_examples=5)) == str(check_laws(formula, max_examples=5))


# ---- they can fail --------------------------------------------------------------------------------


def test_every_law_has_a_wrong_attention() -> None:
    assert {name for name, _ in WRONG} == set(NAMES)


@pytest.mark.parametrize(("name", "kind"), WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_attention_is_caught_with_a_small_counterexample(name: str, kind: type[Plain]) -> None:
    attention = made(kind)
    report = check_laws(attention, [name], max_examples=100)
    assert not report and report.failed == [name]
    verdict = report[name]
    # Dropping too much only shows in many weights.
    most = 200 if kind.__name__ == "DropsTooMuch" else 8
    assert max(x.size for problem, _ in verdict.calls for x in (problem.q, problem.k, problem.v)) <= most
    assert f"{name:4} FAILED" in str(report)
    assert verdict.reason in str(report)
    assert verdict.law.statement.partition("\n")[0] in str(report)

    seen: list[dict[str, Any]] = []

    class Recorder:
        def __call__(self, q: Any, k: Any, v: Any, **options: Any) -> None:
            seen.append({"q": q, "k": k, "v": v, **options})

        def gradients(self, dout: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
            seen.append({"dout": dout, "q": q, "k": k, "v": v, **options})

    exec(verdict.code, {"attention": Recorder()})  # our own text
    assert len(seen) == len(verdict.calls)
    for call, (problem, differentiated) in zip(seen, verdict.calls, strict=True):
        expected = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.options}
        if differentiated:
            expected["dout"] = problem.dout
        assert call.keys() == expected.keys()
        for option, value in expected.items():
            np.testing.assert_equal(np.asarray(call[option]), np.asarray(value))
            assert np.asarray(call[option]).dtype == np.asarray(value).dtype


def test_a_wrong_attention_breaks_only_what_it_breaks() -> None:
    """An attention that is wrong with a window alone leaves all other laws standing."""

    def wide(q: Any, k: Any, v: Any, *, is_causal: bool = False, window_size: Any = (None, None)) -> Any:
        return formula(q, k, v, is_causal=is_causal) * (1.0 if window_size == (None, None) else 1.5)

    report = check_laws(wide, max_examples=30)
    assert report.failed == ["L10", "L13"], report
    assert "window_size=" in report["L13"].code


def test_what_is_raised_within_a_law_fails_it() -> None:
    def refusing(q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
        if is_causal and q.shape[2] == 4:
            raise ValueError("four is too much")
        return formula(q, k, v, is_causal=is_causal)

    report = check_laws(refusing, ["L1", "L12"], max_examples=50)
    assert report["L1"].reason == "ValueError: four is too much"
    assert report["L1"].calls[-1][0].q.shape == (1, 1, 4, 1)


def test_another_shape_dtype_or_nan_within_a_law_fails_it() -> None:
    def spoiled(spoil: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
            return spoil(formula(q, k, v, is_causal=is_causal)) if is_causal else formula(q, k, v)

        return attend

    for spoil, reason in (
        (lambda out: out[..., None], "ShapeError: attend: the output has shape"),
        (lambda out: out.astype(np.float32), "DTypeError: attend: the output is float32, the inputs are float64"),
        (lambda out: out * np.nan, "out[b=0, h=0, t=0, d=0] is nan"),
    ):
        report = check_laws(spoiled(spoil), ["L1"], max_examples=20)
        assert report["L1"].reason.startswith(reason)


def test_a_law_that_compared_nothing_fails() -> None:
    def idle(trial: Trial) -> None:
        """Nothing."""
        trial.run(trial.problem())

    report = check_laws(formula, [Law("L0", "idle", ("",), idle)], max_examples=5)
    assert not report
    assert report["L0"].reason == "nothing was compared in 5 examples"


def test_nothing_that_applies_is_not_a_pass() -> None:
    report = check_laws(lambda q, k, v: formula(q, k, v), ["L5", "L9"], max_examples=5)
    assert not report and not report.failed and report.not_applicable == ["L5", "L9"]


# ---- bad input ------------------------------------------------------------------------------------


def states() -> Any:
    calls = iter(range(100))
    return lambda q, k, v: formula(q, k, v) + next(calls)


def writes(q: Any, k: Any, v: Any) -> Any:
    k *= 1
    v += 1
    return formula(q, k, v)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (
            lambda q, k, v: formula(q, k, v).swapaxes(1, 2),
            ShapeError,
            r"output has shape \(2, 3, 6, 7\), expected \(2, 6, 3, 7\)\. That is \(B, T, H, D\): swap axes 1 and 2",
        ),
        (lambda q, k, v: formula(q, k, v)[0], ShapeError, "Keep the layout"),
        (lambda q, k, v: formula(q, k, v).astype(int), DTypeError, "the output is int64, the inputs are float64"),
        (lambda q, k, v: formula(q, k, v).astype(np.float32), DTypeError, "the output is float32"),
        (lambda q, k, v: formula(q, k, v) * np.nan, NonFiniteError, "the output holds NaN or infinity"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), DTypeError, "the output is a Tensor, expected a Num"),
        (lambda q, k, v: None, DTypeError, "the output is a NoneType"),
        (lambda q, k, v: (formula(q, k, v), 1), ShapeError, "returned 2 arrays, expected 1: output"),
        (states(), LawError, "two calls with the same inputs give different results"),
        (lambda q, k, v: formula(q, k, v) + np.random.default_rng().random(), LawError, "different results"),
        (writes, LawError, "it writes into its input v|different results"),
        (3, DTypeError, "got a int, expected an attention function"),
    ],
)
def test_functions_that_no_law_can_be_held_against(fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_laws(fn, max_examples=5)


@pytest.mark.parametrize(
    ("backward", "error", "message"),
    [
        (lambda dout, saved: saved[:2], ShapeError, "backward returned no three gradients"),
        (lambda dout, saved: (dout, dout, dout), ShapeError, r"the dq has shape \(2, 6, 3, 7\), expected"),
        (lambda dout, saved: (*(np.zeros(s.shape, int) for s in saved),), DTypeError, "the dq is int64"),
        (lambda dout, saved: (*(s * np.inf for s in saved),), NonFiniteError, "the dq holds NaN or infinity"),
    ],
)
def test_backwards_that_no_law_can_be_held_against(backward: Any, error: type[Exception], message: str) -> None:
    attention = adapters.numpy_function(lambda q, k, v: (formula(q, k, v), (q, k, v)), backward)
    with pytest.raises(error, match=message):
        check_laws(attention, max_examples=5)


def test_what_the_function_raises_at_first_is_passed_on() -> None:
    def broken(q: Any, k: Any, v: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        check_laws(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"laws": []}, "there is no law to check"),
        ({"laws": ["L22"]}, "there is no law 'L22'. Did you mean 'L2"),
        ({"max_examples": 0}, "max_examples is 0, expected an integer from 1"),
    ],
)
def test_settings_that_would_check_nothing(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_laws(formula, **options)
