"""`gradcheck` and `verify` on the command line: a table, JSON, and status 1 for whatever fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitransformer.autograd import OPS
from minitransformer.cli import main
from minitransformer.testing.calls import CALLS


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    return status, *capsys.readouterr()


def test_every_op_has_calls() -> None:
    assert CALLS.keys() == OPS.keys()


def test_some_ops(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_file = tmp_path / "out.json"
    status, out, err = run(capsys, "gradcheck", "softmax", "attention", "--calls", "3", "--json", str(out_file))
    assert status == 0
    lines = out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:6]] == ["gradient of softmax"] * 2 + [
        "gradient of attention"
    ] * 2
    assert all(line.endswith(" ok") for line in lines[2:6])
    assert lines[-1] == "4 of 4 checks passed"
    assert err.splitlines()[-1] == "gradcheck: check 4/4"
    found = json.loads(out_file.read_text(encoding="utf-8"))
    assert (found["what"], found["passed"], len(found["outcomes"])) == ("gradcheck", True, 4)


def test_the_seed_decides_the_calls(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [run(capsys, "gradcheck", "linear", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_wrong_gradient_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["tanh"].backward
    monkeypatch.setattr(OPS["tanh"], "backward", lambda dout, saved: tuple(-g for g in right(dout, saved)))
    status, out, _ = run(capsys, "gradcheck", "tanh", "exp")
    assert status == 1
    assert "it is -1 times the numeric one everywhere: the sign" in out
    assert out.splitlines()[-1] == "2 of 4 checks passed"


def test_an_op_of_which_nothing_can_be_compared_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLS, "relu", lambda rng: ([np.full(3, np.nan)], {}))
    status, out, _ = run(capsys, "gradcheck", "relu", "--calls", "2")
    assert status == 1
    assert "relu is NaN at these inputs" in out


def test_a_call_with_nothing_to_compare_is_drawn_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLS, "sin", lambda rng: ([rng.choice([np.nan, 0.5], 1)], {}))
    status, out, _ = run(capsys, "gradcheck", "sin", "--calls", "40")
    assert status == 0
    assert " drawn again" in out


@pytest.mark.thorough
def test_no_false_alarm_in_ten_thousand_calls(capsys: pytest.CaptureFixture[str]) -> None:
    calls = -(-10_000 // (2 * len(CALLS)))
    status, out, _ = run(capsys, "gradcheck", "--calls", str(calls), "--seed", "7")
    print(out)
    assert status == 0


def test_all_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    status, out, _ = run(capsys, "verify", "--examples", "2", "--json", str(file))
    assert status == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    names = [outcome["what"] for outcome in found["outcomes"]]
    assert {f"gradient of {name}" for name in OPS} <= set(names)
    assert "kernels optimizer, cpu" in names
    laws = [name for name in names if name.startswith("L")]
    assert len(laws) >= 2 * 21
    assert all(outcome["problem"] is None for outcome in found["outcomes"])
    assert f"{len(names)} of {len(names)} checks passed" in out


def test_a_broken_law_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from minitransformer.kernels.attention import reference

    right = reference.forward

    def leaks(*args: Any) -> Any:
        out, lse = right(*args)
        out += out.dtype.type(0.01)
        return out, lse

    monkeypatch.setattr(reference, "forward", leaks)
    status, out, _ = run(capsys, "verify", "--examples", "2")
    assert status == 1
    assert "L13" in out.partition("checks passed")[0].rpartition("laws of attention")[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gradcheck", "sofmax"], "gradcheck: there is no op 'sofmax'. Did you mean 'softmax'?"),
        (["gradcheck", "--calls", "0"], "gradcheck: calls is 0, expected an integer from 1. Change calls."),
        (["verify", "--examples", "-1"], "verify: examples is -1, expected an integer from 1. Change examples."),
        (["verify", "softmax"], "verify: unknown argument 'softmax'. See `minitransformer verify --help`."),
    ],
)
def test_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *argv) == (2, "", f"minitransformer: {message}\n")
