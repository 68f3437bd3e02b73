"""Single ops against PyTorch's, forward and backward, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minitransformer as mt
from minitransformer import functional as F

pytestmark = pytest.mark.peers

Parity = Callable[..., tuple[np.ndarray, ...]]

seeds = st.integers(0, 2**32 - 1)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


def normal(seed: int, *shapes: tuple[int, ...], spread: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) * spread for shape in shapes]


ELEMENTWISE = ["relu", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "swiglu"]
ELEMENTWISE += ["exp", "log", "sqrt", "sin", "cos", "abs"]


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(shape=shapes, seed=seeds, spread=st.sampled_from([1.0, 1e-4, 8.0]))
def test_elementwise(torch: Any, parity: Parity, name: str, shape: tuple[int, ...], seed: int, spread: float) -> None:
    functions = {
        "gelu_tanh": (lambda x: F.gelu(x, "tanh"), lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        "swiglu": (F.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up),
        "sin": (np.sin, torch.sin),
        "cos": (np.cos, torch.cos),
    }
    if name in ("exp", "log", "sqrt", "abs"):
        functions[name] = (getattr(mt.Tensor, name), getattr(torch, name))
    ours, theirs = functions.get(name) or (getattr(F, name), getattr(torch.nn.functional, name))
    arrays = normal(seed, *[shape] * (2 if name == "swiglu" else 1), spread=spread)
    if name in ("log", "sqrt"):
        arrays = [abs(a) + 0.01 for a in arrays]
    parity(ours, theirs, *arrays)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "where"])
@given(
    sizes=hnp.mutually_broadcastable_shapes(num_shapes=3, min_dims=0, max_dims=4, max_side=4),
    seed=seeds,
    ties=st.booleans(),
)
def test_two_operands_of_broadcast_shapes(
    torch: Any, parity: Parity, name: str, sizes: Any, seed: int, ties: bool
) -> None:
    a, b = normal(seed, *sizes.input_shapes[:2])
    if name == "power":
        a = abs(a) + 0.1
    if name == "divide":
        b = b + np.copysign(0.1, b)
    if name in ("maximum", "minimum") and ties:
        a, b = np.round(a), np.round(b)
    if name == "where":
        condition = np.asarray(np.random.default_rng(seed).random(sizes.input_shapes[2]) < 0.5)
        chosen = torch.from_numpy(condition)
        parity(lambda a, b: F.where(condition, a, b), lambda a, b: torch.where(chosen, a, b), a, b)
    elif name in ("maximum", "minimum"):
        parity(getattr(F, name), getattr(torch, name), a, b)
    else:
        parity(getattr(np, name), {"power": torch.pow}.get(name) or getattr(torch, name), a, b)


@st.composite
def reductions(draw: st.DrawFn) -> tuple[tuple[int, ...], Any, bool]:
    shape = draw(shapes)
    axis = st.integers(-len(shape), len(shape) - 1)
    axes = st.lists(axis, min_size=1, unique_by=lambda d: d % len(shape)).map(tuple)
    return shape, draw(st.none() | axis | axes), draw(st.booleans())


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
@given(case=reductions(), seed=seeds, ties=st.booleans())
def test_reductions(torch: Any, parity: Parity, name: str, case: Any, seed: int, ties: bool) -> None:
    """max and min share the gradient among ties as torch's amax and amin do."""
    shape, dim, keepdim = case
    (x,) = normal(seed, shape)
    axes = tuple(range(len(shape))) if dim is None else dim
    theirs = getattr(torch, {"max": "amax", "min": "amin"}.get(name, name))
    parity(
        lambda x: getattr(x, name)(dim=dim, keepdim=keepdim),
        lambda x: theirs(x, dim=axes, keepdim=keepdim),
        np.round(x) if ties else x,
    )


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@given(shape=shapes, seed=seeds, spread=st.sampled_from([1.0, 100.0]), data=st.data())
def test_softmax(
    torch: Any, parity: Parity, name: str, shape: tuple[int, ...], seed: int, spread: float, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    parity(lambda x: ours(x, dim), lambda x: theirs(x, dim), *normal(seed, shape, spread=spread))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@given(
    shape=shapes,
    seed=seeds,
    affine=st.integers(0, 2),
    shift=st.sampled_from([0.0, 100.0]),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    data=st.data(),
)
def test_norms(
    torch: Any,
    parity: Parity,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    affine: int,
    shift: float,
    eps: float,
    data: st.DataObject,
) -> None:
    trailing = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    x, *parameters = normal(seed, shape, *[trailing] * min(affine, 2 if name == "layer_norm" else 1))
    rest = [None] * ((2 if name == "layer_norm" else 1) - len(parameters))
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    # A large common shift amplifies the rounding of x - mean by |x| / deviation, at most shift / sqrt(eps).
    parity(
        lambda x, *p: ours(x, trailing, *p, *rest, eps),
        lambda x, *p: theirs(x, trailing, *p, *rest, eps),
        x + shift,
        *parameters,
        tolerance=1e-10 if shift else 1e-12,
    )


reduction_names = st.sampled_from(["mean", "sum", "none"])


@given(
    leading=hnp.array_shapes(min_dims=0, max_dims=2, max_side=5),
    V=st.integers(1, 9),
    seed=seeds,
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([-100, 0, -1]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=reduction_names,
    spread=st.sampled_from([1.0, 50.0]),
)
def test_cross_entropy(
    torch: Any,
    parity: Parity,
    leading: tuple[int, ...],
    V: int,
    seed: int,
    ignored: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    spread: float,
) -> None:
    """Our classes are on the last axis. Where all targets are ignored our mean is 0 and torch's NaN."""
    rng = np.random.default_rng(seed)
    (logits,) = normal(seed, (*leading, V), spread=spread)
    targets = np.where(rng.random(leading) < ignored, ignore_index, rng.integers(0, V, leading))
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    if reduction == "mean" and (targets == ignore_index).all():
        x = mt.tensor(logits, requires_grad=True)
        loss = F.cross_entropy(x, targets, **options)
        assert loss.item() == 0
        assert not mt.grad(loss, [x])[0].any()
        return

    def theirs(x: Any) -> Any:
        flat = torch.nn.functional.cross_entropy(x.reshape(-1, V), torch.from_numpy(targets.reshape(-1)), **options)
        return flat.reshape(leading) if reduction == "none" else flat

    parity(lambda x: F.cross_entropy(x, targets, **options), theirs, logits)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's advice on every call
@given(
    shape=shapes,
    seed=seeds,
    log_target=st.booleans(),
    reduction=reduction_names | st.just("batchmean"),
    zeros=st.booleans(),
)
def test_kl_div(
    torch: Any,
    parity: Parity,
    shape: tuple[int, ...],
    seed: int,
    log_target: bool,
    reduction: str,
    zeros: bool,
) -> None:
    """With respect to the input and the target. torch's target gradient at a target of 0 is -inf; ours is 0."""
    options = {"reduction": reduction, "log_target": log_target}
    x, y = normal(seed, shape, shape)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    y -= np.log(np.exp(y).sum(-1, keepdims=True))
    target = y if log_target else np.exp(y)
    ours, theirs = F.kl_div, torch.nn.functional.kl_div
    if zeros and not log_target:
        target[..., ::2] = 0
        fixed = torch.from_numpy(target)
        parity(lambda x: ours(x, target, **options), lambda x: theirs(x, fixed, **options), x)
    else:
        parity(lambda x, t: ours(x, t, **options), lambda x, t: theirs(x, t, **options), x, target)


@given(shape=shapes, seed=seeds, reduction=reduction_names)
def test_mse_loss(torch: Any, parity: Parity, shape: tuple[int, ...], seed: int, reduction: str) -> None:
    parity(
        lambda x, y: F.mse_loss(x, y, reduction=reduction),
        lambda x, y: torch.nn.functional.mse_loss(x, y, reduction=reduction),
        *normal(seed, shape, shape),
    )


@given(shape=hnp.array_shapes(min_dims=0, max_dims=3, max_side=6), V=st.integers(1, 5), seed=seeds)
def test_embedding_with_repeated_ids(torch: Any, parity: Parity, shape: tuple[int, ...], V: int, seed: int) -> None:
    ids = np.asarray(np.random.default_rng(seed).integers(0, V, shape))
    chosen = torch.from_numpy(ids)
    parity(
        lambda w: F.embedding(ids, w),
        lambda w: torch.nn.functional.embedding(chosen, w),
        *normal(seed, (V, 3)),
    )


@given(
    sizes=hnp.mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=2, max_side=4),
    seed=seeds,
)
def test_matmul(torch: Any, parity: Parity, sizes: Any, seed: int) -> None:
    parity(F.matmul, torch.matmul, *normal(seed, *sizes.input_shapes))


@given(leading=hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), seed=seeds, bias=st.booleans())
def test_linear(torch: Any, parity: Parity, leading: tuple[int, ...], seed: int, bias: bool) -> None:
    parity(F.linear, torch.nn.functional.linear, *normal(seed, (*leading, 3), (5, 3), (5,))[: 2 + bias])


EQUATIONS = ["bthd,bshd->bhts", "ij,jk", "ij,kj->ik", "bij->bji", "bij->b", "ij->", "i,i->", "i,j->ij"]
EQUATIONS += ["bhts,bshd->bthd", "ij,jk,kl->il", "bij,i->j", "bi,bj->bij"]


@pytest.mark.parametrize("equation", EQUATIONS)
@given(seed=seeds, sizes=st.lists(st.integers(1, 4), min_size=26, max_size=26))
def test_einsum(torch: Any, parity: Parity, equation: str, seed: int, sizes: list[int]) -> None:
    terms = equation.split("->")[0].split(",")
    arrays = normal(seed, *[tuple(sizes[ord(letter) - ord("a")] for letter in term) for term in terms])
    parity(lambda *x: F.einsum(equation, *x), lambda *x: torch.einsum(equation, *x), *arrays)


@st.composite
def indexed(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    """A shape and what to index it with: integers, slices, new axes, and at most one list of ids or bools."""
    shape = draw(shapes)
    gathers = draw(st.integers(-1, len(shape) - 1))
    parts: list[Any] = []
    for axis, n in enumerate(shape):
        if axis == gathers:
            ids = hnp.arrays(np.int64, draw(hnp.array_shapes(max_dims=2)), elements=st.integers(-n, n - 1))
            parts.append(draw(ids | hnp.arrays(bool, n)))
        else:
            bounds = st.none() | st.integers(-n - 1, n + 1)
            steps = st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))
            parts.append(draw(steps if gathers >= 0 else steps | st.integers(-n, n - 1)))
        if gathers < 0 and draw(st.integers(0, 4)) == 0:
            parts.append(None)
    parts = parts[: draw(st.integers(gathers + 1, len(parts)))]
    if draw(st.booleans()):
        parts.append(Ellipsis)
    return shape, tuple(parts)


@given(case=indexed(), seed=seeds)
def test_indexing(torch: Any, parity: Parity, case: Any, seed: int) -> None:
    shape, index = case
    theirs = tuple(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in index)
    parity(lambda x: x[index], lambda x: x[theirs], *normal(seed, shape))


@st.composite
def joined(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], int]:
    """Shapes that differ along one axis at most, and that axis."""
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    return [(*shape[:axis], n, *shape[axis + 1 :]) for n in sizes], axis


@given(case=joined(), seed=seeds, negative=st.booleans())
def test_concat_and_split(torch: Any, parity: Parity, case: Any, seed: int, negative: bool) -> None:
    pieces, axis = case
    dim = axis - len(pieces[0]) if negative else axis
    lengths = [piece[axis] for piece in pieces]
    parity(lambda *x: F.concat(x, dim), lambda *x: torch.cat(x, dim), *normal(seed, *pieces))
    whole = (*pieces[0][:axis], sum(lengths), *pieces[0][axis + 1 :])
    parity(lambda x: F.split(x, lengths, dim), lambda x: x.split(lengths, dim), *normal(seed, whole))


@given(shape=shapes, size=st.integers(1, 6), count=st.integers(1, 3), seed=seeds, data=st.data())
def test_stack_and_equal_pieces(
    torch: Any, parity: Parity, shape: tuple[int, ...], size: int, count: int, seed: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    parity(lambda *x: F.stack(x, dim), lambda *x: torch.stack(x, dim), *normal(seed, *[shape] * count))
    parity(lambda x: F.split(x, size, dim), lambda x: x.split(size, dim), *normal(seed, shape))


@given(shape=shapes, seed=seeds, data=st.data())
def test_moving_axes(torch: Any, parity: Parity, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    dims = data.draw(st.permutations(range(len(shape))))
    wide = (data.draw(st.integers(1, 3)), *shape)
    (x,) = normal(seed, shape)
    parity(
        lambda x: F.expand(x.permute(*dims).transpose(0, -1).reshape(1, *shape), wide),
        lambda x: x.permute(*dims).transpose(0, -1).reshape(1, *shape).expand(wide),
        x,
    )
