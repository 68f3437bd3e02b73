"""The fuzzer: a valid call with one or two of its arguments replaced, and the verdict on what it does.

A call must return, or raise a `MiniTransformerError`. A plain TypeError is right only where Python itself
refuses the call for its number or names of arguments. Nothing that was passed may be changed.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from material import Valid
from valid_calls import REFUSED, VALID
from wrong_values import LAYOUTS, WRONG, array_of, like

import minitransformer as mt
from minitransformer import random, threads
from minitransformer.errors import MiniTransformerError

PACKAGE = str(Path(mt.__file__).parent)
Place = tuple[Any, ...]  # ("args", 0), ("kwargs", "dim"), ("args", 1, 0): the first item of a tuple

# Legal requests that would take years: `max_new_tokens` is a promise to go on.
ENDLESS = {"max_new_tokens"}
HUGE = {"2**31", "2**63", "10**30", "10**400"}
ADDRESS_SPACE = 6 << 30


class Edit(NamedTuple):
    """`wrong` is a name in WRONG, "left out", or "one more" argument."""

    place: Place
    wrong: str


class Case(NamedTuple):
    """A call by its name in VALID, and what is done to it: shrinks towards one simple edit."""

    name: str
    edits: tuple[Edit, ...]


def places(valid: Valid) -> Iterator[tuple[Place, Any]]:
    """Every argument, and every item of an argument that holds items, with its value."""
    for kind, arguments in (("args", dict(enumerate(valid.args))), ("kwargs", valid.kwargs)):
        for key, value in arguments.items():
            yield (kind, key), value
            items = value if isinstance(value, dict) else dict(enumerate(value)) if type(value) in (tuple, list) else {}
            yield from (((kind, key, inner), item) for inner, item in items.items())


@cache
def edits_of(name: str) -> list[Edit]:
    """All single edits of a call."""
    found = [Edit(("args",), "one more"), Edit(("kwargs", "unheard_of"), "None")]
    for place, _ in places(VALID[name]()):
        endless = HUGE if place[-1] in ENDLESS else set()
        found.extend(Edit(place, wrong) for wrong in (*WRONG, "left out") if wrong not in endless)
    return found


@cache
def array_places(name: str) -> list[Place]:
    return [place for place, value in places(VALID[name]()) if isinstance(value, (np.ndarray, mt.Tensor))]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(VALID)))
    edits = draw(st.lists(st.sampled_from(edits_of(name)), min_size=1, max_size=2, unique_by=lambda edit: edit.place))
    return Case(name, tuple(edits))


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[str, Place, str]:
    """A call by name, one of its arrays, and how that lies in memory."""
    name = draw(st.sampled_from(sorted(n for n in VALID if array_places(n) and n not in REFUSED)))
    return name, draw(st.sampled_from(array_places(name))), draw(st.sampled_from(list(LAYOUTS)))


def replaced(valid: Valid, place: Place, change: Any) -> Valid:
    """`valid` with the value at `place` changed by a function; None leaves it out, with what comes behind it."""
    args, kwargs = list(valid.args), dict(valid.kwargs)
    holder: Any = args if place[0] == "args" else kwargs
    if len(place) == 3:
        inner = holder[place[1]]
        items = dict(inner) if isinstance(inner, dict) else list(inner)
        if change is None:
            del items[place[2]]
        else:
            items[place[2]] = change(items[place[2]])
        holder[place[1]] = tuple(items) if isinstance(inner, tuple) else items
    elif change is not None:
        holder[place[1]] = change(holder[place[1]] if place[0] == "args" else kwargs.get(place[1]))
    elif place[0] == "args":
        del args[place[1] :]
    else:
        del kwargs[place[1]]
    return valid._replace(args=tuple(args), kwargs=kwargs)


def edited(case: Case) -> Valid:
    """The call with all edits: the longest and last places first, so that no edit moves the place of another."""
    valid = VALID[case.name]()
    for place, wrong in sorted(case.edits, key=lambda edit: (len(edit.place), str(edit.place)), reverse=True):
        if wrong == "one more":
            valid = valid._replace(args=(*valid.args, None))
        else:
            valid = replaced(valid, place, WRONG.get(wrong))
    return valid


def arrays_in(value: Any, depth: int = 3) -> Iterator[np.ndarray]:
    """All arrays in arguments or results, also in Tensors, masks, tuples, lists and dicts."""
    if isinstance(value, mt.Tensor):
        yield value.data
    elif isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, mt.masks.Mask):
        yield value.dense(*(4 if n is None else n for n in value.sizes))
    elif isinstance(value, mt.ModelOutput):
        yield from arrays_in([value.loss, value.logits])
    elif isinstance(value, (tuple, list, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from arrays_in(item, depth - 1)


def tensors_in(result: Any) -> list[mt.Tensor]:
    if isinstance(result, mt.ModelOutput):
        result = [result.loss, result.logits]
    if isinstance(result, mt.Tensor):
        return [result]
    return [t for item in result for t in tensors_in(item)] if isinstance(result, (tuple, list)) else []


def perform(valid: Valid) -> Any:
    """Call, and differentiate what can be differentiated."""
    result = valid.function(*valid.args, **valid.kwargs)
    for t in tensors_in(result):
        if not t.is_leaf and t.requires_grad and t.data.size < 10**6:
            t.backward(np.ones(t.shape, t.dtype), retain_graph=True)
    return result


def outcome(valid: Valid) -> list[np.ndarray] | str:
    """All numbers that come out of a call: results, and gradients of what was passed. Or the refusal."""
    mt.manual_seed(0)
    try:
        result = perform(valid)
    except MiniTransformerError as error:
        return f"{type(error).__name__}: {error}"
    gradients = [t.grad for t in tensors_in([*valid.args, *valid.kwargs.values()]) if t.grad is not None]
    numbers = [np.asarray(x) for x in (result,) if isinstance(x, (float, int, str))]
    return [*arrays_in(result), *gradients, *numbers]


def difference(name: str, place: Place, layout: str) -> str | None:
    """What a call makes of an array that lies oddly in memory, if not the same as of a plain copy."""
    odd, plain = VALID[name](), VALID[name]()
    laid = LAYOUTS[layout](array_of(dict(places(odd))[place]))
    copy = np.array(laid, laid.dtype.newbyteorder("="), order="C", subok=False)
    odd = replaced(odd, place, lambda right: like(right, laid))
    plain = replaced(plain, place, lambda right: like(right, copy))
    expected, got = outcome(plain), outcome(odd)
    if isinstance(expected, str) or isinstance(got, str):
        # Flat buffers, and what is written to, must be memory of one kind: refused is right.
        asked = isinstance(got, str) and any(word in got for word in ("contiguous", "read-only", ">f4"))
        return None if expected == got or asked else f"{got} instead of {expected}"
    if not np.array_equal(np.asarray(laid), copy) and not odd.writes:
        return "changes its argument"
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return "other shapes"
    for a, b in zip(got, expected, strict=True):
        if a.dtype != b.dtype or not (np.array_equal(a, b) or np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)):
            return f"{a} instead of {b}"
    return None


def refused_by_python(error: TypeError) -> bool:
    """Whether Python refused the call itself: no code of the package ran but what passes arguments on."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    counted = re.search(r"\(\) (missing|got (an unexpected|multiple|some)|takes)|abstract class", str(error))
    return counted is not None and all(f.name in ("__call__", "__new__", "generate") for f in frames)


def not_ours(error: BaseException) -> bool:
    """Whether somebody else raised: Python or NumPy before the package was reached, or a function given to it.

    What users' functions raise, and what NumPy's do when they are called with Tensors, surfaces as it is.
    """
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename.startswith(PACKAGE)]
    users = "numpy" not in frames[-1].filename and not frames[-1].filename.startswith(PACKAGE)
    return not inside or users or any(f.name in ("_evaluate", "call_on_arrays", "__array__") for f in inside)


@contextmanager
def put_back() -> Iterator[None]:
    """Process-wide settings as they were: that a valid call changes them is no finding."""
    before, count = random._process, threads._num_threads
    try:
        yield
    finally:
        random._process, threads._num_threads = before, count


def verdict(case: Case) -> str | None:
    """What is wrong with how the package took the call; None if nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd to make
        valid = edited(case)
    passed = [] if valid.writes else [a for a in arrays_in((valid.args, valid.kwargs)) if not a.dtype.hasobject]
    before = [array.tobytes() for array in passed]
    with put_back(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "generate: past block_size", UserWarning)
        try:
            perform(valid)
        except MiniTransformerError as error:
            if not (error.problem and error.fix) or len(str(error)) > 2000:
                return f"raises an error without a way out, or too long to read: {str(error)[:300]}"
        except (Exception, SystemExit) as error:
            if not (not_ours(error) or (isinstance(error, TypeError) and refused_by_python(error))):
                where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)][-1]
                file = Path(where.filename).relative_to(PACKAGE)
                return f"raises {type(error).__name__} at {file}:{where.lineno}: {str(error)[:200]}"
    return "changes an argument" if [array.tobytes() for array in passed] != before else None


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocations beyond ADDRESS_SPACE fail, as on a machine that has no more."""
    if sys.platform != "linux":
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
