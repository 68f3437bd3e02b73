"""Every op where its arrays are: on the simulated GPU it computes what it does on the host, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer import functional as F
from minitransformer.autograd import OPS
from minitransformer.errors import AllocationError, DeviceError
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


@pytest.mark.parametrize("seed", range(2))
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


def test_too_little_memory_on_a_gpu_says_how_much_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitransformer.autograd.base.free_memory", lambda arrays: 1234567)

    def fail(*arrays: Any) -> None:
        raise MemoryError("Out of memory allocating 8,000,000 bytes")

    monkeypatch.setattr(OPS["add"], "forward", fail)
    problem = r"add: there is too little memory: .*allocating 8,000,000 bytes; free on the GPU: 1,234,567 bytes; shapes"
    with pytest.raises(AllocationError, match=rf"{problem} given: \(2,\)\. Make the batch, the sequence or the model"):
        mt.tensor([1.0, 2.0], device="simulator") + 1


def test_arrays_of_two_devices_are_refused_by_name() -> None:
    here, there = mt.tensor([1.0, 2.0]), mt.tensor([1.0, 2.0], device="simulator")
    fix = r"Move one of them: t\.to\(device\)\."
    for op, a, b in (("add", here, there), ("matmul", there, here)):
        with pytest.raises(DeviceError, match=f"{op}: got arrays on 'cpu' and 'simulator', expected one device. {fix}"):
            OPS[op](a, b)
    with pytest.raises(
        DeviceError, match=r"kernels\.layer_norm_forward: got arrays on cpu and simulator, expected all"
    ):
        OPS["layer_norm"](there, mt.tensor([1.0, 1.0]), None, normalized_shape=(2,))
    with pytest.raises(
        DeviceError, match=r"numpy: the tensor is on 'simulator', expected it on 'cpu'\. Copy it to the"
    ):
        there.numpy()
    with pytest.raises(DeviceError, match=r"backward: gradient is on 'cpu', the other arrays on 'simulator'\. Move it"):
        mt.tensor([1.0, 2.0], requires_grad=True, device="simulator").backward(np.ones(2))
    with pytest.raises(DeviceError, match="data: the new data is on 'simulator', the other arrays on 'cpu'"):
        here.data = there
    with pytest.raises(DeviceError, match="setitem: the value is on 'cpu', the other arrays on 'simulator'"):
        there[:1] = here[:1]


def test_gradients_of_arrays_without_axes() -> None:
    """CuPy takes an empty shape for none given: a gradient made that way would have the shape of another array."""
    x = mt.tensor(np.array(3.0), requires_grad=True, device="simulator")
    (x[None] * 2.0).sum().backward()
    assert x.grad is not None and x.grad.shape == () and float(x.grad) == 2


def test_masks_follow_the_queries_from_the_host() -> None:
    rng = np.random.default_rng(0)
    q, mask = rng.standard_normal((1, 1, 3, 4)), np.tri(3, dtype=bool)
    there = mt.tensor(q, device="simulator")
    expected = F.scaled_dot_product_attention(q, q, q, mask).numpy()
    for given in (mask, np.where(mask, 0, -np.inf)):
        out = F.scaled_dot_product_attention(there, there, there, given)
        np.testing.assert_allclose(to_host(out.data), expected, atol=1e-12)
    with pytest.raises(DeviceError, match=r"kernels\.forward: got arrays on cpu and simulator, expected all of them"):
        F.scaled_dot_product_attention(there, there, there, mt.tensor(np.zeros((3, 3)), requires_grad=True))
