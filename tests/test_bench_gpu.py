"""`bench gpu` on the simulated device, without PyTorch: what it reports, also of a part that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitransformer.bench import attention, gpu, gpu_attention, peer
from minitransformer.bench.attention_case import Case
from minitransformer.errors import ConfigError, DeviceError, MissingExtraError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PyTorch, and of the kernels those of one family."""
    monkeypatch.setattr(peer, "installed", lambda: False)
    monkeypatch.setattr(gpu, "FAMILIES", {"linear_attention": ("cpu", "cuda", "reference")})


def test_it_reports_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = gpu.run(device="simulator", json_path=tmp_path / "gpu.json")
    assert figures["kernels"] == {"families": ["linear_attention"], "wrong": {}}
    assert figures["launch"]["host_us"] > 0 and figures["rates"]["copy_gb_per_s"] > 0
    assert figures["step"]["sides"]["minitransformer"]["median"] > 0
    assert list(figures["attention"]["cases"]) == ["B1 T5 H1 D4 causal"]
    assert json.loads((tmp_path / "gpu.json").read_text())["step"] == figures["step"]
    out = capsys.readouterr().out
    assert "no figure below says anything of a GPU" in out
    assert "kernels   agree with the reference: linear_attention" in out and "B1 T5 H1 D4 causal, forward: " in out


def test_a_part_that_fails_keeps_no_other_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OfADriver(Exception):
        """As those of numba.cuda, which are no RuntimeError."""

    def fail(*args: Any) -> None:
        raise OfADriver("the device fell off the bus")

    monkeypatch.setattr(gpu_attention, "measure", fail)
    monkeypatch.setattr(gpu, "agrees", fail)
    figures = gpu.run(device="simulator")
    assert figures["attention"] == {"failed": "OfADriver: the device fell off the bus"}
    assert figures["kernels"]["wrong"] == {"linear_attention": "OfADriver: the device fell off the bus"}
    assert figures["step"]["sides"]
    out = capsys.readouterr().out
    assert "attention FAILED: OfADriver: the device fell off the bus" in out and "WRONG: linear_attention: " in out


def test_what_it_cannot_run_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="bench gpu: device is 'cpu', expected one of"):
        gpu.run(device="cpu")
    with pytest.raises((DeviceError, MissingExtraError), match="device cuda: "):
        gpu.run()


def test_attention_alone(capsys: pytest.CaptureFixture[str]) -> None:
    figures = attention.run(rounds=1, device="simulator", cases=(Case(1, 3, 1, 4, causal=False),))
    assert figures["device"] == "simulator" and figures["unit"] == "TFLOP/s"
    assert "B1 T3 H1 D4 key mask, forward and backward: minitransformer" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="backend is 'cpu', and on 'simulator' there is only one"):
        attention.run(rounds=1, device="simulator", backend="cpu")
