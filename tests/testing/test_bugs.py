"""The bug zoo: every bug shows, is told in full, and is taken out again whatever happens."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradient_table import TABLE
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, fresh_gpt, gpt, token_ids, train_config
from zoo import MARK, PAGE, exercises

import minitransformer as mt
from minitransformer import functional as F
from minitransformer import nn
from minitransformer.autograd import Op
from minitransformer.errors import ConfigError
from minitransformer.testing import bugs
from minitransformer.threads import Workers, single_threaded_blas
from minitransformer.training import TrainStep, make_optimizer

ROOT = Path(__file__).parents[2]
NAMES = bugs.names()
Place = tuple[int, str]  # the owner's id, and the attribute


def places(*names: str) -> dict[Place, Any]:
    """Where these bugs go to, and what stands there now."""
    return {(id(p.owner), p.attribute): getattr(p.owner, p.attribute) for n in names for p in bugs.get(n).patches}


RIGHT = places(*NAMES)


def changed() -> set[Place]:
    """The places where something else stands than when this module was imported."""
    return {place for place, now in places(*NAMES).items() if now is not RIGHT[place]}


# --- every bug shows -------------------------------------------------------------------------------------


def numbers_of(op: Op) -> list[Any]:
    """All numbers that forward and backward make at the gradient table's calls, and what becomes of their inputs."""
    numbers: list[Any] = []
    for case in TABLE[op.name]:
        inputs = [x.copy() if isinstance(x, np.ndarray) else x for x in case.inputs]
        with np.errstate(all="ignore"):
            out, saved = op.forward(*inputs, **case.static)
            outs = tuple(np.asarray(o).copy() for o in (out if op.many else (out,)))
            rng = np.random.default_rng(0)
            douts = tuple(np.asarray(rng.standard_normal(o.shape)).astype(o.dtype) for o in outs)
            gradients = op.backward(douts if op.many else douts[0], saved)
        numbers += [outs, douts, inputs, gradients, out]
    return numbers


def of_layers() -> list[Any]:
    q, k, v = (mt.tensor(np.random.default_rng(i).standard_normal((1, 2, 3, 4))) for i in range(3))
    maps = F.scaled_dot_product_attention(q, k, v, is_causal=True, need_weights=True)
    mt.manual_seed(3)
    layer = nn.MultiHeadAttention(4, 2)
    x, memory = (mt.tensor(np.ones((1, n, 4), np.float32) * n, requires_grad=True) for n in (2, 3))
    memory.data = memory.data + np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    (layer(x, memory) ** 2).sum().backward()
    dropped = nn.Dropout(0.5).eval()(mt.tensor(np.ones(64)))
    return [*(m.data for m in maps), x.grad, memory.grad, layer.qkv.weight.grad, dropped.data]


def of_models() -> list[Any]:
    model, ids = gpt(), token_ids(2, 5)
    cache = model.make_cache(2)
    cached = [model(piece, cache=cache).logits.data for piece in (ids[:, :2], ids[:, 2:])]
    padded = model(ids, attention_mask=[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).logits.data
    loss = model(ids, targets=ids).loss
    return [*cached, padded, loss.data, *mt.grad(loss, model.parameters())]


def of_training() -> list[Any]:
    """Two steps from step 3 on, of two batches of unequal numbers of targets each, with a saved state between them."""
    model, config = fresh_gpt(), train_config(grad_clip=0.01, weight_decay=0.5)
    optimizer, ids = make_optimizer(model, config), token_ids(6, BLOCK)
    few = np.where(np.arange(BLOCK) < 6, -100, ids)
    batches = [{"input_ids": ids, "targets": ids}, {"input_ids": ids, "targets": few}]
    losses = []
    with single_threaded_blas(), Workers(1) as workers:
        step = TrainStep(model, optimizer, config, workers)
        for index in (3, 4):
            losses.append(step(batches, index).loss)
            optimizer.load_state(*optimizer.state())
    return [losses, optimizer.flat.data.copy(), optimizer.lr]


def bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return tuple(map(bits, value)) if isinstance(value, list | tuple) else value


PROBES = (of_layers, of_models, of_training)
right_bits = cache(lambda probe: bits(probe()))
of_op = cache(lambda op: partial(numbers_of, op))


@pytest.mark.parametrize("name", NAMES)
def test_every_bug_changes_a_number(name: str) -> None:
    ops = {p.owner: None for p in bugs.get(name).patches if isinstance(p.owner, Op)}
    for probe in (*map(of_op, ops), *PROBES):
        right = right_bits(probe)
        with bugs.install(name):
            wrong = bits(probe())
        if wrong != right:
            break
    assert wrong != right
    assert bits(probe()) == right


@pytest.mark.parametrize("name", NAMES)
def test_every_bug_is_told_in_full(name: str) -> None:
    bug = bugs.get(name)
    assert bug.name == name
    for text in (bug.story, bug.exercise, bug.solution):
        assert text.endswith((".", "?")), text
        assert len(text) > 20
    assert bug.exercise != bug.solution
    assert bug.caught_by
    for test in bug.caught_by:
        file, _, case = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert case.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_page_has_the_exercises_as_they_are() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2] == "\n" + exercises(), "Run: python tests/zoo.py --page"


# --- install ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_bug_is_in_its_places_only_while_installed(name: str) -> None:
    assert changed() == set()
    with pytest.raises(ZeroDivisionError), bugs.install(name) as bug:
        assert bug is bugs.get(name)
        assert changed() == places(name).keys()
        raise ZeroDivisionError
    assert changed() == set()


@given(st.lists(st.sampled_from(NAMES), max_size=5), st.randoms(use_true_random=False))
def test_bugs_overlap_in_any_order(names: list[str], random: Any) -> None:
    installed = []
    for name in names:
        stack = ExitStack()
        stack.enter_context(bugs.install(name))
        installed.append((name, stack))
    random.shuffle(installed)
    while installed:
        assert changed() == places(*(name for name, _ in installed)).keys()
        installed.pop()[1].close()
    assert changed() == set()


def test_two_bugs_of_one_function_are_both_there() -> None:
    q = np.random.default_rng(0).standard_normal((1, 1, 4, 3))
    with bugs.install("attention_without_scale"):
        with bugs.install("causal_sees_one_ahead"):
            both = F.scaled_dot_product_attention(q, q, q, is_causal=True).data
        one = F.scaled_dot_product_attention(q, q, q, is_causal=True).data
    np.testing.assert_array_equal(both, F.scaled_dot_product_attention(q, q, q, np.tri(4, k=1) > 0, scale=1).data)
    np.testing.assert_array_equal(one, F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1).data)


def test_threads_see_the_bug_of_the_process() -> None:
    out: list[np.ndarray] = []
    q = np.random.default_rng(0).standard_normal((1, 1, 3, 4))

    def attend() -> None:
        out.append(F.scaled_dot_product_attention(q, q, q).data)

    attend()
    with bugs.install("attention_without_scale"):
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
    assert (out[0] != out[1]).any()


def test_threads_that_install_and_remove_at_once_leave_nothing() -> None:
    def use(name: str) -> None:
        for _ in range(20):
            with bugs.install(name):
                pass

    threads = [threading.Thread(target=use, args=(name,)) for name in NAMES[:8]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert changed() == set()


def test_nothing_loads_the_zoo_unasked() -> None:
    program = (
        "import sys, minitransformer, minitransformer.testing, minitransformer.training, minitransformer.cli;"
        "assert not [m for m in sys.modules if m.startswith('minitransformer.testing.bugs')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("use", [bugs.get, bugs.install, lambda name: bugs.mutation_score(print, [name])])
def test_an_unknown_bug_gets_the_nearest(use: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match=r"no bug 'dk_without_scal'\. Did you mean 'dk_without_scale'"):
        use("dk_without_scal")
    with pytest.raises(ConfigError, match="there is no bug 3"):
        use(3)
