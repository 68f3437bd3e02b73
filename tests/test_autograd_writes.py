"""What backward needs and finds changed: second passes, writes, saved arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.errors import GradientError


def leaf(*shape: int, seed: int = 0) -> mt.Tensor:
    return mt.tensor(np.asarray(np.random.default_rng(seed).standard_normal(shape)), requires_grad=True)


# ---- second backward, writes ----------------------------------------------------------------------


def test_a_second_backward_is_refused_and_says_how() -> None:
    x = leaf(2)
    y = x * x
    y.sum().backward()
    before = x.grad.copy()
    with pytest.raises(GradientError, match=r"multiply was already differentiated .* retain_graph=True"):
        y.sum().backward()
    np.testing.assert_array_equal(x.grad, before)


def test_retain_graph_allows_a_second_backward() -> None:
    x = leaf(2)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(x.grad, 4 * x.data)
    assert mt.grad((z := x.exp().sum()), [x], retain_graph=True)[0].tobytes() == mt.grad(z, [x])[0].tobytes()


def set_item(t: mt.Tensor) -> None:
    with mt.no_grad():
        t[0] = 5.0


def set_data(t: mt.Tensor) -> None:
    t.data = np.full(t.shape, 5.0)


def set_view(t: mt.Tensor) -> None:
    with mt.no_grad():
        view = t.reshape(2, 2)[1:]
        view[0] = 5.0


def set_detached(t: mt.Tensor) -> None:
    t.detach()[...] = 5.0


def set_base(t: mt.Tensor) -> None:
    t.data[...] = 5.0
    assert isinstance(t, mt.Parameter)
    t.mark_written()


WRITES = [set_item, set_data, set_view, set_detached, set_base]
NEEDING: dict[str, Callable[[mt.Tensor], mt.Tensor]] = {
    "multiply": lambda x: x * x,
    "divide": lambda x: 1.0 / x,
    "matmul": lambda x: x @ np.ones(4),
    "log": lambda x: (x * x.detach()).log(),
    "gelu": F.gelu,
    "layer_norm": lambda x: F.layer_norm(x, 4),
    "max": lambda x: x.max(),
    "linear": lambda x: F.linear(x, np.ones((2, 4))),
}
NOT_NEEDING: dict[str, Callable[[mt.Tensor], mt.Tensor]] = {
    "add": lambda x: x + x,
    "subtract": lambda x: x - 1.0,
    "multiply": lambda x: x * 3.0,
    "divide": lambda x: x / 3.0,
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "getitem": lambda x: x[np.array([0, 0])],
    "reshape": lambda x: x.reshape(4, 1).transpose(0, 1),
    "exp": lambda x: x.exp(),
    "softmax": F.softmax,
    "where": lambda x: mt.where(np.array([True, False, True, True]), x, x),
    "concat": lambda x: mt.concat([x, x]),
    "embedding": lambda x: F.embedding(np.array([0, 0]), x.reshape(2, 2)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "rope": lambda x: F.apply_rope(x.reshape(1, 1, 2, 2), [0, 1]),
}


def make_parameter() -> mt.Parameter:
    return mt.Parameter(np.array([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NEEDING)
def test_a_write_to_what_backward_needs_is_found(name: str, write: Callable[[mt.Tensor], None]) -> None:
    x = make_parameter()
    loss = NEEDING[name](x).sum()
    write(x)
    with pytest.raises(GradientError, match=r"needs was written to after the forward pass\. Write before"):
        loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NOT_NEEDING)
def test_a_write_to_what_no_backward_needs_is_allowed(name: str, write: Callable[[mt.Tensor], None]) -> None:
    x, twin = make_parameter(), make_parameter()
    loss, other = NOT_NEEDING[name](x).sum(), NOT_NEEDING[name](twin).sum()
    if name == "dropout":  # its mask is a draw
        loss.backward(retain_graph=True)
        twin.grad, x.grad = x.grad, None
    else:
        other.backward()
    write(x)
    loss.backward()
    np.testing.assert_array_equal(x.grad, twin.grad)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "sqrt"])
def test_a_write_to_a_needed_output_is_found(name: str) -> None:
    x = make_parameter()
    y = getattr(x, name)()
    loss = y.sum()
    y.data = np.zeros(4)
    with pytest.raises(GradientError, match=f"an array that {name} needs was written to"):
        loss.backward()


def test_a_write_before_the_forward_pass_or_after_backward_is_fine() -> None:
    x = make_parameter()
    x.data = np.ones(4)
    (x * x).sum().backward()
    x.data = np.zeros(4)
    np.testing.assert_array_equal(x.grad, [2, 2, 2, 2])


def test_a_write_to_an_index_changes_no_gradient() -> None:
    x, index = make_parameter(), mt.tensor([0, 1])
    loss = x[index].sum()
    index[0] = 3
    loss.backward()
    np.testing.assert_array_equal(x.grad, [1, 1, 0, 0])


def test_a_write_to_a_mask_changes_no_gradient() -> None:
    x, mask = leaf(1, 1, 3, 2), mt.tensor(np.tril(np.ones((3, 3), bool)))
    loss = F.scaled_dot_product_attention(x, x, x, mask).sum()
    (expected,) = mt.grad(loss, [x], retain_graph=True)
    mask[...] = True
    np.testing.assert_array_equal(mt.grad(loss, [x])[0], expected)


def test_check_saved_arrays_finds_writes_behind_the_tensor() -> None:
    x = make_parameter()
    with mt.check_saved_arrays():
        loss = (x * x).sum()
        harmless = (x + 1.0).sum()
    x.data[1] = 5.0
    with pytest.raises(GradientError, match=r"multiply saved was changed behind the Tensor API.*t\.data"):
        loss.backward()
    assert x.grad is None
    harmless.backward()
    np.testing.assert_array_equal(x.grad, [1, 1, 1, 1])


def test_check_saved_arrays_is_silent_on_honest_graphs() -> None:
    x = leaf(3, 4)
    with mt.check_saved_arrays():
        loss = F.layer_norm(F.gelu(x @ x.transpose(0, 1)), 3)[:, ::2].sum()
    loss.backward()
    assert x.grad is not None


def test_writes_through_the_api_are_refused_where_they_lose_history() -> None:
    x, plain = leaf(3), mt.tensor(np.zeros(3))
    with pytest.raises(GradientError, match=r"writing into a tensor with a gradient history.*mt\.where"):
        x[0] = 1.0
    with pytest.raises(GradientError, match=r"writing into a tensor with a gradient history"):
        (x * 2.0)[0] = 1.0
    with pytest.raises(GradientError, match=r"the assigned tensor requires a gradient.*value\.detach"):
        plain[0] = x[0]
    plain[0] = x[0].detach()
    assert plain[0].item() == x[0].item()


# ---- parameters -----------------------------------------------------------------------------------


def test_rebind_keeps_values_and_moves_memory() -> None:
    buffer = np.array([9.0, 1.0, 2.0, 3.0, 4.0])
    x = make_parameter()
    x.grad = np.ones(4)
    x.rebind(buffer[1:])
    assert np.shares_memory(x.data, buffer) and x.grad is None and x.requires_grad and x.is_leaf
    loss = (x * x).sum()
    x.mark_written()
    with pytest.raises(GradientError, match="written to"):
        loss.backward()
