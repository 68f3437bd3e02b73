"""Functions of other frameworks under our checks: right ones pass, wrong ones are found, the rest is refused."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import children
import numpy as np
import pytest
from testing.plain_attention import Plain

from minitransformer import functional as F
from minitransformer.errors import ConfigError, DTypeError, GradientError, MissingExtraError, ShapeError
from minitransformer.gradients import gradcheck
from minitransformer.testing import adapters, check_laws, laws

RNG = np.random.default_rng(0)
X, W, IDS = RNG.standard_normal((3, 4)), RNG.standard_normal((4, 2)), np.array([0, 2, 2])


def framework(request: pytest.FixtureRequest, name: str) -> None:
    """Skip where a framework is missing; with --require-peers that is an error."""
    if importlib.util.find_spec(name) is None:
        reason = f'{name} is not installed: pip install "minitransformer[peers]"'
        if request.config.getoption("--require-peers"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


# ---- functions for gradcheck ----------------------------------------------------------------------


def torch_functions() -> dict[str, Callable[..., Any]]:
    import torch

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return 2 * dout * ctx.saved_tensors[0].cos()

    return {
        "right": lambda x, w, ids: (torch.tanh(x @ w)[ids], x.sum()),
        "wrong": lambda x: Wrong.apply(x),
        "integers": lambda x: x.argmax(),
        "numpy": lambda x: x.detach().numpy(),
        "detached": lambda x: x.detach() * 2,
        "unused": lambda x, w: (x * x).sum(),
    }


def autograd_functions() -> dict[str, Callable[..., Any]]:
    import autograd.numpy as anp
    from autograd.extend import defvjp, primitive

    wrong = primitive(lambda x: np.sin(x))
    defvjp(wrong, lambda out, x: lambda dout: 2 * dout * np.cos(x))
    return {
        "right": lambda x, w, ids: (anp.tanh(anp.dot(x, w))[ids], anp.sum(x)),
        "wrong": lambda x: wrong(x),
        "integers": lambda x: anp.argmax(x),
        "numpy": lambda x: "text",
        "detached": lambda x: np.ones(3),
        "unused": lambda x, w: anp.sum(x * x),
    }


def mygrad_functions() -> dict[str, Callable[..., Any]]:
    import mygrad as mg
    from mygrad.operation_base import UnaryUfunc

    class Wrong(UnaryUfunc):
        numpy_ufunc = np.sin

        def backward_var(self, grad: Any, index: int, **kwargs: Any) -> Any:
            return 2 * grad * np.cos(self.variables[0].data)

    return {
        "right": lambda x, w, ids: (mg.tanh(x @ w)[ids], x.sum()),
        "wrong": lambda x: mg.Tensor._op(Wrong, x),
        "integers": lambda x: mg.tensor([1, 2]),
        "numpy": lambda x: x.data,
        "detached": lambda x: mg.tensor(x.data) * 2.0,
        "unused": lambda x, w: (x * x).sum(),
    }


FRAMEWORKS = {"torch": torch_functions, "autograd": autograd_functions, "mygrad": mygrad_functions}


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.peers] if name == "torch" else []) for name in FRAMEWORKS]
)
def foreign(request: pytest.FixtureRequest) -> dict[str, Any]:
    framework(request, request.param)
    functions = FRAMEWORKS[request.param]()
    return {name: getattr(adapters, request.param)(fn) for name, fn in functions.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_right_function_passes_and_a_wrong_one_is_found(foreign: dict[str, Any], dtype: str) -> None:
    x, w = X.astype(dtype), W.astype(dtype)
    report = gradcheck(foreign["right"], (x, w, IDS))
    assert report and report.compared > 50
    found = str(gradcheck(foreign["wrong"], (x,), raise_exception=False))
    assert "the gradient of x is wrong" in found and "ratio 2" in found


def test_dtype_names_and_repetition(foreign: dict[str, Any]) -> None:
    function = foreign["right"]
    assert function.names[:3] == ("x", "w", "ids")
    inputs = X.astype(np.float32), W.astype(np.float32), IDS
    outs, back = function.pull(*inputs)
    douts = [np.ones_like(out) for out in outs]
    first, second = back(douts), back(douts)
    assert first[2] is None
    for a, b, x in zip(first[:2], second[:2], inputs, strict=False):
        assert a.dtype == np.float32 and a.shape == x.shape
        np.testing.assert_array_equal(a, b)


def test_an_unused_input_has_zeros(foreign: dict[str, Any]) -> None:
    assert gradcheck(foreign["unused"], (X, W))
    assert not foreign["unused"].pull(X, W)[1]([np.array(1.0)])[1].any()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("integers", DTypeError, "returned (torch.)?int64, expected floats"),
        ("numpy", DTypeError, "returned a (ndarray|memoryview|str), expected tensors of its framework"),
        ("detached", GradientError, "depends on a float input"),
    ],
)
def test_what_has_no_gradient_is_refused(
    foreign: dict[str, Any], kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gradcheck(foreign[kind], (X,))


@pytest.mark.peers
def test_torch_dropout_and_its_generator() -> None:
    import torch

    before = torch.get_rng_state()
    dropout = adapters.torch(lambda x: torch.nn.functional.dropout(x, 0.5))
    assert gradcheck(dropout, (X,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.peers
def test_a_module_of_torch() -> None:
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()).double()
    assert gradcheck(adapters.torch(module), (X,))


@pytest.mark.parametrize("name", ["torch", "jax", "autograd", "mygrad"])
def test_a_missing_framework_names_the_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "minitransformer\[peers\]"'):
        getattr(adapters, name)(lambda x: x)


# ---- attention ------------------------------------------------------------------------------------


def written_out(xp: Any) -> Callable[..., Any]:
    """Attention in the functions that NumPy, autograd and MyGrad share."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        weights = xp.exp(xp.matmul(q, xp.swapaxes(k, 2, 3)) / float(q.shape[3]) ** 0.5)
        return xp.matmul(weights / xp.sum(weights, axis=-1, keepdims=True), v)

    return attend


@pytest.mark.parametrize("name", ["autograd", "mygrad"])
def test_the_laws_over_other_frameworks(request: pytest.FixtureRequest, name: str) -> None:
    framework(request, name)
    module = importlib.import_module({"autograd": "autograd.numpy", "mygrad": "mygrad"}[name])
    report = check_laws(adapters.attention(written_out(module), name), max_examples=5)
    assert report.held == ["L6", "L7", "L8", "L11", "L12", "L13", "L19"], report


def test_the_laws_over_a_function_of_our_tensors() -> None:
    def attend(q: Any, k: Any, v: Any, *, scale: float = 1.0) -> Any:
        return F.softmax(q @ k.transpose(-1, -2) * scale) @ v

    report = check_laws(adapters.attention(attend, "minitransformer"), ["L7", "L10", "L11"], max_examples=10)
    assert report.held == ["L7", "L11"]
    assert "scale=" in report["L10"].code  # its default is 1, not 1 / sqrt(D)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_laws_over_torch(dtype: str) -> None:
    """All that apply, but for scores scaled by 0 or less under is_causal: -inf is scaled too."""
    import torch

    before, threads = torch.get_rng_state(), torch.get_num_threads()
    attention = adapters.torch_sdpa(dtype=dtype)
    report = check_laws(attention, [law for law in laws.ALL if law.name != "L13"], max_examples=4)
    assert report, report
    assert report.not_applicable == ["L14", "L17", "L21"]
    found = check_laws(attention, ["L13"], max_examples=50)["L13"]
    assert "is nan" in found.reason
    options = found.calls[-1][0].options
    assert options["is_causal"] and options["scale"] <= 0
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


@pytest.mark.peers
def test_torch_is_causal_is_that_of_the_upper_left_corner() -> None:
    q, k, v = (RNG.standard_normal((1, 2, n, 3)) for n in (2, 5, 5))
    got = adapters.torch_sdpa()(q, k, v, is_causal=True)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, causal_align="upper_left").data
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    mask = RNG.standard_normal((1, 1, 2, 5))
    for m in (mask, mask > 0):
        got = adapters.torch_sdpa()(q, k, v, is_causal=True, attn_mask=m)
        expected = F.scaled_dot_product_attention(q, k, v, m, is_causal=True, causal_align="upper_left").data
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.peers
def test_an_attention_of_torch_without_a_mask_is_found_out() -> None:
    def attend(q: Any, k: Any, v: Any, *, is_causal: bool = False) -> Any:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v

    assert check_laws(adapters.attention(attend, "torch"), ["L1", "L7"], max_examples=10).failed == ["L1"]


# JAX warns of every fork after it was imported, and other tests fork: it gets a process of its own.
JAX = """
import jax, jax.numpy as jnp, numpy as np
from minitransformer.errors import DTypeError
from minitransformer.gradients import gradcheck
from minitransformer.testing import adapters, check_laws

rng = np.random.default_rng(0)
x, w, ids = rng.standard_normal((3, 4)), rng.standard_normal((4, 2)), np.array([0, 2, 2])

@jax.custom_vjp
def wrong(x):
    return jnp.sin(x)

wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, dout: (2 * dout * jnp.cos(x),))

right = adapters.jax(lambda x, w, ids: (jnp.tanh(x @ w)[ids], x.sum()))
for dtype in (np.float64, np.float32):
    report = gradcheck(right, (x.astype(dtype), w.astype(dtype), ids))
    print("right", report.compared > 50)
    print("wrong", "ratio 2" in str(gradcheck(adapters.jax(wrong), (x.astype(dtype),), raise_exception=False)))
print("float32", right.pull(x.astype(np.float32), w.astype(np.float32), ids)[0][0].dtype)
for fn in (lambda x: x.argmax(), lambda x: 3.0):
    try:
        gradcheck(adapters.jax(fn), (x,))
    except DTypeError as error:
        print(error)

report = check_laws(adapters.jax_sdpa(), ["L1", "L14", "L20"], max_examples=2)
print(report.held, report.not_applicable)

q, k, v = (rng.standard_normal((1, 1, 2, 3)).astype(np.float32) for _ in range(3))
empty = np.array([[False, False], [True, True]])
out = adapters.jax_sdpa()(q, k, v, attn_mask=empty)
print("empty row", np.allclose(out[0, 0, 0], v[0, 0].mean(0), rtol=1e-6))
double = [a.astype(np.float64) for a in (q, k, v)]
error = abs(adapters.jax_sdpa(dtype=np.float64)(*double) - adapters.ours()(*double)).max()
print("float64", 1e-10 < error < 1e-6)
print("x64 left as it was", jnp.ones(1).dtype)
"""


def test_jax(request: pytest.FixtureRequest) -> None:
    framework(request, "jax")
    assert children.python(JAX).splitlines() == [
        "right True",
        "wrong True",
        "right True",
        "wrong True",
        "float32 float32",
        "gradcheck: <lambda> returned int64, expected floats. Return what has a gradient.",
        "gradcheck: <lambda> returned a float, expected tensors of its framework. "
        "Return the output, or a tuple of outputs, unconverted.",
        "['L1'] ['L14', 'L20']",
        "empty row True",  # the mean of the values
        "float64 True",  # its softmax is float32 all the same
        "x64 left as it was float32",
    ]


# ---- the record -----------------------------------------------------------------------------------


def test_abilities_are_read_off_the_parameters() -> None:
    plain = Plain()
    everything = adapters.numpy_function(plain.forward, plain.backward)
    assert everything.supports == adapters.ABILITIES.keys()

    def few(q: Any, k: Any, v: Any, *, attn_mask: Any = None, dropout_p: float = 0.0, tuning: int = 3) -> Any: ...

    assert adapters.numpy_function(few).supports == {"cross", "value_width", "attn_mask", "additive_mask"}
    assert adapters.numpy_function(few, supports=["attn_mask"]).supports == {"attn_mask"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda f: adapters.numpy_function(f, supports=["causal"]),
            ConfigError,
            "'causal' is no ability of an attention. Did you mean 'is_causal'",
        ),
        (lambda f: adapters.numpy_function(f, dtype="float16"), DTypeError, "dtype is float16, expected float32 or fl"),
        (lambda f: adapters.numpy_function(f, dtype=int), DTypeError, "dtype is int64"),
        (lambda f: adapters.attention(f, "keras"), ConfigError, "framework is 'keras', expected one of"),
        (lambda f: adapters.numpy_function(f).gradients(X, X, X, X), ConfigError, "has no backward"),
    ],
)
def test_adapters_refuse(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(lambda q, k, v: q)


def test_ours_takes_a_backend_and_leaves_everything_as_it_was() -> None:
    q, k, v = (RNG.standard_normal((1, 2, 3, 4)) for _ in range(3))
    plain = adapters.ours()(q, k, v)
    np.testing.assert_allclose(adapters.ours("reference")(q, k, v), plain, rtol=1e-13)
    with pytest.raises(ConfigError, match="'gpu' is no implementation"):
        adapters.ours("gpu")(q, k, v)
    out, dq, *_ = adapters.ours().gradients(np.ones_like(v), q, k, v, threads=3)
    np.testing.assert_array_equal(out, plain)
    assert dq.shape == q.shape
    out, weights, lse = adapters.ours()(q, k, v, need_weights=True, need_lse=True)
    assert weights.shape == (1, 2, 3, 3) and lse.shape == (1, 2, 3)
    with pytest.raises(ShapeError, match="returned 1 arrays, expected 2: output, log-sum-exp"):
        adapters.numpy_function(lambda q, k, v, need_lse=False: q)(q, k, v, need_lse=True)
