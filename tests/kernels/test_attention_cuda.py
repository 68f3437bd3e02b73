"""Attention for a GPU against its reference, in the simulator: every option, every size, bits without an order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_cpu import KEY, ZERO, arrays, assert_close, normal

from minitransformer import functional as F
from minitransformer import tensor
from minitransformer.errors import DeviceError, ShapeError
from minitransformer.kernels.attention import cuda, reference
from minitransformer.kernels.attention.cuda_tiles import FEW, Tile, backward_tile, forward_tile
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.gpu.arrays import SimulatedArray, move, to_host
from minitransformer.kernels.gpu.simulator import thread_order
from minitransformer.testing import strategies
from minitransformer.testing.attention_problem import AttentionProblem

B, H, K, T, S = 2, 2, 1, 5, 5
SIZES = B, H, K, T, S, 5, 6
RANDOM = np.random.default_rng(1)
ALL = {
    "dropout_p": 0.6,
    "dropout_key": KEY,
    "causal": True,
    "window": (4, None),
    "offset": np.array([0, 1]),
    "mask": RANDOM.random((T, S)) < 0.8,
    "softcap": 3.0,
    "alibi_slopes": np.array([0.5, 0.03]),
    "bias": normal(H, 1, S),
    "key_lengths": np.array([4, 5]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (1, None), "causal": True},
    "first keys": {"sparse": Sparse(range(2), left=1), "causal": True},
    "strided and all around": {"sparse": Sparse(range(1, 60, 2), left=1, block=2), "window": (4, 1)},
    "strided from origins on": {
        "sparse": Sparse(range(1, 2**48, 2), block=2, origin=np.array([-3, 1])),
        "causal": True,
        "key_lengths": np.array([3, 5]),
    },
    "every key is far": {"sparse": Sparse(range(0, 2**48, 1), block=1), "causal": True},
    "no key is far": {"sparse": Sparse(range(0), left=2), "offset": np.array([-3, 1])},
    "lengths, one of them 0": {"key_lengths": np.array([0, 3])},
    "offsets": {"offset": np.array([-3, 2]), "causal": True},
    "documents": {"documents": np.repeat([0, 1, 2], [1, 3, 1])},
    "documents in pieces": {"documents": np.arange(T) % 2, "causal": True},
    "mask and documents in pieces": {"documents": np.arange(T) % 2, "mask": RANDOM.random((B, H, T, S)) < 0.7},
    "mask of few": {"mask": RANDOM.random((H, T, S)) < 0.1, "window": (None, 3)},
    "key mask": {"mask": RANDOM.random((B, 1, 1, S)) < 0.5, "causal": True},
    "broadcast mask": {"mask": np.broadcast_to(RANDOM.random((1, H, T, 1)) < 0.5, (B, H, T, S))[:, ::-1]},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": np.array([0.5, 1.0]), "causal": True, "offset": np.array([3, 0])},
    "bias": {"bias": normal(B, H, T, S)},
    "bias of keys": {"bias": np.where(RANDOM.random((B, 1, 1, S)) < 0.5, -np.inf, 0.5)},
    "bias of queries": {"bias": normal(T, 1), "softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "dropout_key": KEY},
    "all": ALL,
    "sparse and all": {**ALL, "sparse": Sparse(range(1, 2**48, 2), left=1, block=2, origin=np.array([1, -2]))},
}


def option(name: str, dtype: Any) -> tuple[np.ndarray | None, Problem]:
    settings_ = {"scale": 0.4, "offset": ZERO, **OPTIONS[name]}
    bias = settings_.pop("bias", None)
    return None if bias is None else bias.astype(dtype), Problem(**settings_)


def there(x: np.ndarray | None) -> Any:
    return None if x is None else SimulatedArray(x.copy())


def both(module: Any, given_: tuple[np.ndarray, ...], bias: np.ndarray | None, problem: Problem) -> list[np.ndarray]:
    """out, lse, dq, dk, dv and dbias, all by one implementation."""
    put = there if module is cuda else lambda x: x
    dout, dlse, q, k, v = map(put, given_)
    out, lse = module.forward(q, k, v, put(bias), None, problem)
    gradients = module.backward(dout, dlse, q, k, v, put(bias), out, lse, None, None, None, problem)
    return [to_host(x) for x in (out, lse, *gradients) if x is not None]


def bits(results: list[np.ndarray]) -> list[bytes]:
    return [x.tobytes() for x in results]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees(name: str) -> None:
    for dtype in (np.float32, np.float64) if name in ("causal", "sparse and all") else (np.float32,):
        given_ = arrays(*SIZES, dtype)
        bias, problem = option(name, dtype)
        assert_close(both(cuda, given_, bias, problem), both(reference, given_, bias, problem))


@given(strategies.attention_problems(max_len=4, max_dim=4))
@settings(deadline=None, max_examples=5)
def test_drawn_problems_by_the_2x_rule(problem: AttentionProblem) -> None:
    def run(device: str, dtype: Any) -> list[np.ndarray]:
        def put(x: np.ndarray) -> Any:
            return tensor(x.astype(np.float32).astype(dtype), requires_grad=True, device=device)

        options = dict(problem.options)
        added = isinstance(mask := options.get("attn_mask"), np.ndarray) and mask.dtype.kind == "f"
        if added:
            options["attn_mask"] = put(mask)
        q, k, v = map(put, (problem.q, problem.k, problem.v))
        out, lse = F.scaled_dot_product_attention(q, k, v, **options, need_lse=True)
        (out * put(problem.dout)).sum().backward()
        leaves = (q, k, v, options["attn_mask"]) if added else (q, k, v)
        return [to_host(x) for x in (out.data, lse.data, *(leaf.grad for leaf in leaves))]

    results = (run(*where) for where in (("simulator", np.float32), ("cpu", np.float32), ("cpu", np.float64)))
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.dtype == np.float32
        finite = np.isfinite(exact)
        assert np.array_equal(np.isfinite(ours), finite)
        ours, plain, exact = ours[finite], plain[finite], exact[finite]
        floor = 32 * np.finfo(np.float32).eps * max(1, abs(exact).max(initial=0))
        assert abs(ours - exact).max(initial=0) <= 2 * abs(plain - exact).max(initial=0) + floor


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 4, 2, 9, 4, 4, 8),
        (1, 3, 1, 3, 9, 9, 1),
        (0, 2, 1, 3, 3, 4, 4),
        (2, 2, 1, 0, 3, 4, 4),
        (2, 2, 1, 3, 0, 4, 4),
        (1, 2, 2, 3, 3, 4, 0),
    ],
    ids=str,
)
def test_sizes_below_at_and_above_tiles(sizes: tuple[int, ...]) -> None:
    given_ = arrays(*sizes)
    bias = normal(*sizes[:2], *sizes[3:5])
    for problem, added in ((Problem(0.5, ZERO, causal=True), None), (Problem(0.5, ZERO, softcap=2.0), bias)):
        assert_close(both(cuda, given_, added, problem), both(reference, given_, added, problem))


def test_no_batch_rows_with_an_offset_each() -> None:
    given_ = arrays(0, 2, 1, 3, 3, 4, 4)
    problem = Problem(0.5, np.zeros(0, np.int64), causal=True)
    assert_close(both(cuda, given_, None, problem), both(reference, given_, None, problem))


def heads_of(rows: np.ndarray, first: int, count: int) -> SimulatedArray:
    """Heads (B, count, T, D) of an array (B, T, heads, D), in its memory."""
    return SimulatedArray(rows[:, :, first : first + count].transpose(0, 2, 1, 3))


def test_heads_that_are_parts_of_a_wider_array() -> None:
    """Read and written where they lie, with the bits of arrays of their own, and nothing beside them is touched."""
    packed = normal(B, T, H + 2 * K, 5, dtype=np.float32)
    q, k, v = heads_of(packed, 0, H), heads_of(packed, H, K), heads_of(packed, H + K, K)
    merged, dpacked = np.full((B, T, H + 1, 5), 7, np.float32), np.full((B, T, H + 2 * K + 1, 5), 7, np.float32)
    dout, dlse = normal(B, H, T, 5, dtype=np.float32), normal(B, H, T, dtype=np.float32)
    problem = Problem(0.4, ZERO, causal=True)
    out, lse = cuda.forward(q, k, v, None, heads_of(merged, 0, H), problem)
    targets = heads_of(dpacked, 0, H), heads_of(dpacked, H, K), heads_of(dpacked, H + K, K)
    found = cuda.backward(there(dout), there(dlse), q, k, v, None, out, lse, *targets, problem)
    own = both(cuda, (dout, dlse, *(np.ascontiguousarray(x.host) for x in (q, k, v))), None, problem)
    assert bits(own) == bits([to_host(x) for x in (out, lse, found.dq, found.dk, found.dv)])
    for target, gradient in zip(targets, found, strict=False):
        assert gradient is target
    assert (merged[:, :, H:] == 7).all() and (dpacked[:, :, H + 2 * K :] == 7).all()


def test_arrays_of_the_problem_may_be_on_the_device() -> None:
    given_ = arrays(*SIZES, np.float32)
    bias, problem = option("sparse and all", np.float32)
    names = "offset", "mask", "alibi_slopes", "key_lengths"
    moved = problem._replace(**{name: move(getattr(problem, name), "simulator") for name in names})
    assert bits(both(cuda, given_, bias, moved)) == bits(both(cuda, given_, bias, problem))


def test_a_problem_of_the_host_reads_nothing_from_the_device() -> None:
    given_ = arrays(*SIZES, np.float32)
    bias, problem = option("sparse and all", np.float32)
    before = SimulatedArray.synchronisations
    dout, dlse, q, k, v, added = map(there, (*given_, bias))
    out, lse = cuda.forward(q, k, v, added, None, problem)
    cuda.backward(dout, dlse, q, k, v, added, out, lse, None, None, None, problem)
    assert SimulatedArray.synchronisations == before


@pytest.mark.parametrize("name", ["causal", "sparse and all"])
def test_the_bits_do_not_depend_on_the_order_of_threads(name: str) -> None:
    given_ = arrays(*SIZES, np.float32)
    bias, problem = option(name, np.float32)
    in_order = bits(both(cuda, given_, bias, problem))
    with thread_order(1):
        assert bits(both(cuda, given_, bias, problem)) == in_order


@pytest.mark.parametrize("name", ["nothing", "window to the left", "lengths, one of them 0", "all", "sparse and all"])
def test_keys_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What few queries attend to is divided; some pieces have no key that is allowed."""
    monkeypatch.setattr(cuda, "_PIECE", 2)
    merges, merge_kernel = [], cuda.merge_kernel
    monkeypatch.setattr(cuda, "merge_kernel", lambda *args: merges.append(args) or merge_kernel(*args))
    _, _, q, k, v = arrays(*SIZES, np.float32)
    bias, problem = option(name, np.float32)
    found = cuda.forward(*map(there, (q, k, v, bias)), None, problem)
    assert_close([x.host for x in found], list(reference.forward(q, k, v, bias, None, problem)))
    assert len(merges) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_and_infinity_go_where_they_go_in_the_reference(where: str, value: float) -> None:
    given_ = arrays(1, 2, 1, 5, 7, 3, 3, np.float32)
    given_[{"dout": 0, "q": 2, "k": 3, "v": 4}[where]][0, 0, 4, 2] = value
    problem = Problem(1.0, ZERO)
    with np.errstate(all="ignore"):
        expected = both(reference, given_, None, problem)
    for x, y in zip(both(cuda, given_, None, problem), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))


def test_masks_are_true_infinities() -> None:
    """A finite minimum would not exclude beside scores that are as low."""
    q = np.full((1, 1, 1, 1), -3e38, np.float32)
    k, v = np.ones((1, 1, 2, 1), np.float32), np.array([[[[1.0], [2.0]]]], np.float32)
    out, lse = cuda.forward(*map(there, (q, k, v)), None, None, Problem(1.0, ZERO, mask=np.array([True, False])))
    assert out.item() == 1 and lse.item() == np.float32(-3e38)


@pytest.mark.parametrize("name", ["nothing", "sparse and all", "softcap", "lengths, one of them 0"])
def test_weights_and_their_gradients(name: str) -> None:
    for dtype in (np.float32, np.float64):
        _, _, q, k, v = arrays(*SIZES, dtype)
        bias, problem = option(name, dtype)
        _, lse = reference.forward(q, k, v, bias, None, problem)
        dweights = normal(B, H, T, S, dtype=dtype)
        found, expected = (
            [
                weights := module.weights_forward(*map(put, (q, k, bias, lse)), problem),
                *module.weights_backward(put(dweights), weights, *map(put, (q, k, bias)), problem),
            ]
            for module, put in ((cuda, there), (reference, lambda x: x))
        )
        assert (found[3] is None) == (bias is None)
        assert_close([to_host(x) for x in found if x is not None], [x for x in expected if x is not None])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = (there(normal(1, 2, 3, 4, seed=n)) for n in range(3))
    with pytest.raises(ShapeError, match=r"^kernels\.forward: got arrays of shapes"):
        cuda.forward(q, k, v[:, :, :2], None, None, Problem(1.0, ZERO))
    with pytest.raises(DeviceError, match=r"^kernels\.forward: got arrays on cpu and simulator"):
        cuda.forward(q, k.host, v, None, None, Problem(1.0, ZERO))


# --- the tiles of a real GPU -----------------------------------------------------------------------------

widths = st.integers(0, 300)


@given(st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)]), st.integers(1, 99), widths, widths, st.booleans())
def test_tiles_are_divided_evenly_and_fit_into_shared_memory(
    dtype: np.dtype, rows: int, heads: int, width: int, plain: bool
) -> None:
    tiles = forward_tile(dtype, rows, heads, width, plain, False), backward_tile(dtype, width, plain, False)
    for tile in tiles:
        for size in (tile.rows * tile.depth, tile.columns * tile.depth, tile.columns * tile.width):
            assert size % tile.threads == 0
        assert tile.own[0] * tile.threads == tile.rows * tile.across
        assert tile.own[1] * tile.across == tile.columns and tile.own[2] * tile.across == tile.width
        assert 32 % tile.across == 0 and tile.threads % 32 == 0
        assert sum(tile.shared(dtype.itemsize)) * dtype.itemsize + 8 * 8 * tile.rows <= 47 * 1024
    assert tiles[0].rows >= min(rows, FEW)


@pytest.mark.parametrize("across", [1, 2, 4])
def test_other_tiles(across: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many columns, widths and shuffles for a thread as they make."""
    tile = Tile(rows=4, columns=8, depth=2, width=8, threads=4, across=across)
    for function in ("forward_tile", "backward_tile"):
        monkeypatch.setattr(cuda, function, lambda *_, **__: tile)
    given_ = arrays(1, 1, 1, 5, 9, 3, 9, np.float32)
    problem = Problem(0.4, np.array([4]), causal=True)
    assert_close(both(cuda, given_, None, problem), both(reference, given_, None, problem))
