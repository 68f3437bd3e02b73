"""Finding the first bad op: watch a computation, then walk back from what is not finite to where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from minitransformer.autograd import Tensor, grad, watching
from minitransformer.diagnose.bad_op import BadOp, is_finite
from minitransformer.errors import DTypeError
from minitransformer.nn.module import Module


def first_bad_op(
    compute: Callable[[], Tensor],
    parameters: Sequence[Tensor] = (),
    gradient: Any = None,
) -> BadOp | None:
    """The op at which NaN or infinity began in `compute()`, a loss, or in its gradients; None if there is none.

    Runs `compute` once and, if its value is finite, differentiates it with respect to `parameters`
    (`gradient` is the upstream gradient, 1 for a scalar). Nothing is written, no `.grad` either. Of what is
    not finite only what reached the loss or a gradient counts: -inf in a mask does no harm. Ops inside are
    slower than otherwise, and their arrays stay in memory until the call returns.

        bad = first_bad_op(lambda: model(ids, targets=targets).loss, model.parameters())
    """
    watch = _Watch()
    token = watching.set(watch)
    try:
        loss = compute()
        if not isinstance(loss, Tensor):
            problem = f"compute returned a {type(loss).__name__}, expected a Tensor"
            raise DTypeError("first_bad_op", problem, "Return the loss")
        if not is_finite(loss.data):
            return watch.blame_output(loss)
        if not parameters:
            return None
        gradients = grad(loss, parameters, gradient)
    finally:
        watching.reset(token)
    return watch.blame_gradients([p for p, g in zip(parameters, gradients, strict=True) if not is_finite(g)])


class _Call(NamedTuple):
    """A call, forward or backward, that was given or has made something not finite."""

    time: int
    bad: BadOp
    sources: tuple[_Call, ...]  # the calls that made what was not finite in its inputs


class _Recorded(NamedTuple):
    """The forward call that a node records; holds the node, whose id is the key."""

    node: Any
    call: BadOp
    sources: tuple[_Call, ...]  # itself if its outputs are not finite, else what made its inputs so


class _Watch:
    """The `Watcher` behind `first_bad_op`."""

    def __init__(self) -> None:
        self._time = 0
        self._kept: list[Any] = []  # Tensors whose id is a key below
        self._made: dict[int, _Call] = {}  # by id of a Tensor: the forward call that made it
        self._recorded: dict[int, _Recorded] = {}  # by id of a node
        self._flowed: dict[int, list[_Call]] = {}  # by id of a node or leaf: backward calls whose gradient reached it
        self._names: dict[int, str] = {}  # of the modules and parameters of the outermost module
        self._layer: ContextVar[str] = ContextVar("layer", default="")

    @contextmanager
    def inside(self, module: Module) -> Iterator[None]:
        if not self._names:
            self._names = {id(m): name or type(m).__name__ for name, m in module.named_modules()}
            self._names |= {id(p): f"parameter {name}" for name, p in module.named_parameters()}
        token = self._layer.set(self._names.get(id(module), type(module).__name__))
        try:
            yield
        finally:
            self._layer.reset(token)

    def called(self, op: Any, inputs: Any, arrays: Any, static: dict[str, Any], outputs: Any, node: Any) -> None:
        names = {i: self._names[id(x)] for i, x in enumerate(inputs) if id(x) in self._names}
        outside = [i for i, x in enumerate(inputs) if id(x) not in self._made and not is_finite(arrays[i])]
        results = tuple(t.data for t in outputs)
        bad = BadOp(op, self._layer.get(), tuple(arrays), static, (), results, names, tuple(outside))
        sources = [self._made[id(x)] for x in inputs if id(x) in self._made]
        wrong = [t for t in outputs if not is_finite(t.data)]
        if wrong:
            sources = [self._call(bad, sources)]
            self._made |= {id(t): sources[0] for t in wrong}
        if node is not None:
            self._recorded[id(node)] = _Recorded(node, bad, tuple(sources))
        self._kept.extend(outputs)

    def differentiated(self, node: Any, douts: Any, gradients: Any) -> None:
        forward = self._recorded.get(id(node))
        if forward is None:
            return  # from before the watch began
        wrong = [
            parent
            for parent, dx in zip(node.parents, gradients, strict=False)
            if parent is not None and dx is not None and not is_finite(dx)
        ]
        if wrong:
            # Finite upstream, the fault may lie in the forward pass though the loss is finite: exp(-x) of a large
            # x is right, as 1 / exp(x), and its gradient is not.
            sources = self._flowed.get(id(node)) or forward.sources
            outside = tuple(len(douts) + i for i in forward.call.outside)
            if not self._flowed.get(id(node)):
                outside += tuple(i for i, dout in enumerate(douts) if not is_finite(dout))
            bad = forward.call._replace(douts=tuple(douts), results=tuple(gradients), outside=outside)
            call = self._call(bad, sources)
            for parent in wrong:
                self._flowed.setdefault(id(parent[0] if type(parent) is tuple else parent), []).append(call)

    def _call(self, bad: BadOp, sources: Sequence[_Call]) -> _Call:
        self._time += 1
        return _Call(self._time, bad, tuple(sources))

    def blame_output(self, output: Tensor) -> BadOp | None:
        return _origin([self._made[id(output)]]) if id(output) in self._made else None

    def blame_gradients(self, leaves: Sequence[Tensor]) -> BadOp | None:
        calls = [call for leaf in leaves for call in self._flowed.get(id(leaf), [])]
        return _origin(calls) if calls else None


def _origin(calls: Sequence[_Call]) -> BadOp:
    """Where the damage in `calls` began: the one of their ancestors that is most to blame, the earliest of these."""
    found: dict[int, _Call] = {}
    waiting = list(calls)
    while waiting:
        call = waiting.pop()
        if call.time not in found:
            found[call.time] = call
            waiting.extend(call.sources)
    return min(found.values(), key=lambda call: (call.bad.blame, call.time)).bad
