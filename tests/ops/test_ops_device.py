"""Every op where its arrays are: on the simulated GPU it computes what it does on the host, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.autograd import OPS
from minitransformer.kernels.gpu.arrays import SimulatedArray, to_host
from minitransformer.testing.calls import CALLS


def run(name: str, arrays: list[Any], static: dict[str, Any], device: str) -> list[np.ndarray]:
    """The outputs of an op and the gradients of its float inputs, each from an upstream gradient that is drawn."""
    inputs = [
        mt.tensor(x, requires_grad=True, device=device) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
        for x in arrays
    ]
    out = OPS[name](*inputs, **static)
    outs = out if OPS[name].many else (out,)
    rng = np.random.default_rng(5)
    upstream = [rng.standard_normal(o.shape) for o in outs]
    total = sum((o * mt.tensor(g, device=device)).sum() for o, g in zip(outs, upstream, strict=True))
    total.backward()
    leaves = [t for t in inputs if isinstance(t, mt.Tensor)]
    found = [o.data for o in outs] + [t.grad for t in leaves if t.grad is not None]
    assert all(isinstance(x, SimulatedArray) == (device == "simulator") for x in found)
    return [to_host(x) for x in found]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"cast", "move"}))
def test_an_op_computes_on_the_device_what_it_does_on_the_host(name: str, seed: int) -> None:
    arrays, static = CALLS[name](np.random.default_rng([seed, *name.encode()]))
    host, device = (run(name, arrays, static, where) for where in ("cpu", "simulator"))
    assert len(host) == len(device)
    for expected, got in zip(host, device, strict=True):
        assert expected.shape == got.shape and expected.dtype == got.dtype
        finite = np.isfinite(expected)
        assert np.array_equal(finite, np.isfinite(got))
        assert np.array_equal(expected[~finite], got[~finite], equal_nan=True)
        scale = 1 + abs(expected[finite]).max(initial=0)
        assert abs(got[finite] - expected[finite]).max(initial=0) <= 1e-10 * scale


def test_a_gradient_goes_back_to_where_its_tensor_is() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    y = (x.to("simulator") * 3).to("cpu")
    y.sum().backward()
    assert y.device == "cpu" and isinstance(x.grad, np.ndarray) and x.grad.tolist() == [3, 3]
