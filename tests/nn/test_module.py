"""Module: names, sharing, modes, casts, saved states and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minitransformer as mt
from minitransformer import nn
from minitransformer.errors import CheckpointError, DeviceError, DTypeError, ShapeError


class Nested(nn.Module):
    """Parameters in every kind of container, one of them shared."""

    def __init__(self) -> None:
        self.width = 3
        self.first = nn.Linear(3, 2)
        self.blocks = [nn.Linear(2, 2, bias=False), (nn.LayerNorm(2, bias=False), "not a layer", None)]
        self.heads = {"small": nn.Embedding(4, 2), "deep": {"scale": nn.Parameter(np.zeros(5, np.float32))}}
        self.tied = self.first.weight
        self.again = self.blocks[0]


NAMES = {
    "first.weight": (2, 3),
    "first.bias": (2,),
    "blocks.0.weight": (2, 2),
    "blocks.1.0.weight": (2,),
    "heads.small.weight": (4, 2),
    "heads.deep.scale": (5,),
}


def test_names_of_nested_and_shared_parameters() -> None:
    model = Nested()
    assert {name: p.shape for name, p in model.named_parameters()} == NAMES
    assert list(model.state_dict()) == list(NAMES)
    assert [id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters()]
    assert model.num_parameters() == sum(int(np.prod(shape)) for shape in NAMES.values())
    modules = [name for name, _ in model.named_modules()]
    assert modules == ["", "first", "blocks.0", "blocks.1.0", "heads.small"]


def test_call_sites_are_paths() -> None:
    model = Nested()
    assert model.first.path is None
    model.name_call_sites()
    assert (model.first.path, model.again.path, model.heads["small"].path) == ("first", "blocks.0", "heads.small")


def test_modes_reach_every_module() -> None:
    model = Nested()
    assert model.eval() is model
    assert not any(module.training for _, module in model.named_modules())
    model.train()
    assert all(module.training for _, module in model.named_modules())
    assert Nested().training


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"]))
def test_state_dict_round_trip(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    model, copy = Nested().to(dtype), Nested().to(dtype)
    for parameter in model.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    state = model.state_dict()
    copy.load_state_dict(state)
    for name, parameter in copy.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), state[name])
        assert parameter.dtype == dtype
        assert not np.shares_memory(parameter.numpy(), state[name])
    assert copy.tied is copy.first.weight  # sharing survives
    for array in state.values():
        array[...] = np.nan  # a state is a copy
    assert all(np.isfinite(p.numpy()).all() for p in (*model.parameters(), *copy.parameters()))


def test_to_casts_in_place_and_moves() -> None:
    model = Nested()
    before = model.state_dict()
    parameters = model.parameters()
    assert model.to("float64") is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, array in model.state_dict().items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, before[name])
    assert model.to(np.float32).first.weight.dtype == np.float32
    assert model.to("cpu") is model
    assert model.to("simulator") is model and {p.device for p in model.parameters()} == {"simulator"}
    for name, array in model.state_dict().items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, before[name])
    assert model.to("cpu").first.weight.device == "cpu"
    with pytest.raises(DeviceError, match="to: device is 'cuda:1', expected one of 'cpu', 'cuda', 'simulator'"):
        model.to("cuda:1")
    for target in ("float16", "int64", "nonsense"):
        refusal = f"'{target}' is n(o dtype for parameters|either a device nor a dtype)|dtype float16 is not supported"
        with pytest.raises(DTypeError, match=f"to: ({refusal})"):
            model.to(target)


def refused(model: nn.Module, state: dict[str, Any], error: type[Exception], message: str) -> None:
    """`load_state_dict` raises and writes nothing, not even what would have fitted."""
    before = model.state_dict()
    with pytest.raises(error, match=message):
        model.load_state_dict({name: np.asarray(array) + 1 for name, array in state.items()})
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_load_state_dict_refuses_names_and_shapes() -> None:
    model = Nested()
    state = model.state_dict()
    last = "heads.deep.scale"
    without = {name: array for name, array in state.items() if name != last}
    refused(model, without, CheckpointError, f"missing {last}, unexpected none. Is it the same config")
    refused(model, {**state, "more": np.ones(1)}, CheckpointError, "missing none, unexpected more")
    renamed = {**without, "heads.deep.scales": state[last]}
    refused(model, renamed, CheckpointError, "unexpected heads.deep.scales. Did you mean 'heads.deep.scales'")
    many = {f"extra{i}": np.ones(1) for i in range(5)}
    refused(model, {**state, **many}, CheckpointError, "unexpected extra0, extra1, extra2 and 2 more")
    refused(model, {**state, last: np.ones(6)}, ShapeError, rf"{last} has shape \(6,\), expected \(5,\)")
    turned = {**state, "heads.small.weight": state["heads.small.weight"].T}
    refused(model, turned, ShapeError, "heads.small.weight .* It is the transpose: pass array.T")


@given(kept=st.sets(st.sampled_from(sorted(NAMES))))
def test_load_state_dict_not_strict_loads_what_is_there(kept: set[str]) -> None:
    model = Nested()
    before = model.state_dict()
    model.load_state_dict({**{name: before[name] + 1 for name in kept}, "more": np.ones(1)}, strict=False)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name] + (name in kept))


@given(arrays=st.lists(hnp.array_shapes(max_dims=3), min_size=1, max_size=3))
def test_lists_of_parameters_are_numbered(arrays: list[tuple[int, ...]]) -> None:
    model = nn.Module()
    model.weights = [nn.Parameter(np.zeros(shape, np.float32)) for shape in arrays]
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (f"weights.{i}", shape) for i, shape in enumerate(arrays)
    ]


def test_repr_shows_the_tree() -> None:
    assert repr(Nested()).splitlines() == [
        "Nested(",
        "  (first): Linear(",
        "    (weight): Parameter(2, 3)",
        "    (bias): Parameter(2,)",
        "  )",
        "  (blocks.0): Linear(",
        "    (weight): Parameter(2, 2)",
        "  )",
        "  (blocks.1.0): LayerNorm(",
        "    (weight): Parameter(2,)",
        "  )",
        "  (heads.small): Embedding(",
        "    (weight): Parameter(4, 2)",
        "  )",
        "  (heads.deep.scale): Parameter(5,)",
        "  (tied): Parameter(2, 3)",
        "  (again): Linear(",
        "    (weight): Parameter(2, 2)",
        "  )",
        ")",
    ]
    assert repr(nn.Dropout(0.1)) == "Dropout()"


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Nested has no forward"):
        Nested()(mt.tensor([1.0]))
