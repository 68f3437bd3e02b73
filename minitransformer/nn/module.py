"""Module: parameters found by walking attributes, no registration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minitransformer.autograd import Parameter, as_array, cast, target_named, watching
from minitransformer.checks import check_flag, shown
from minitransformer.errors import CheckpointError, DTypeError, ShapeError, nearest
from minitransformer.kernels.gpu.arrays import like, move, plain, to_host


class Module:
    """Base of all layers and models: write `__init__` and `forward`, call the instance.

    Parameters and submodules are the attributes that are `Parameter`s or `Module`s, also inside lists,
    tuples and dicts; their names are the attribute paths, as "blocks.0.attn.qkv.weight".
    """

    training = True
    path: str | None = None  # where the module sits in its model; addresses its dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watcher = watching.get()
        if watcher is None:
            return self.forward(*args, **kwargs)
        with watcher.inside(self):
            return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it with their paths, each once, in attribute order."""
        if not isinstance(prefix, str):
            raise DTypeError("named_modules", f"prefix is {shown(prefix)}, expected a string", "Leave it out")
        seen: set[int] = set()
        for name, value in _walk(self, prefix):
            if isinstance(value, Module) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their paths, each once: a shared one under its first name."""
        seen: set[int] = set()
        for name, value in _walk(self, ""):
            if isinstance(value, Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def parameters(self) -> list[Parameter]:
        """All parameters, each once."""
        return [parameter for _, parameter in self.named_parameters()]

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter._data.size for parameter in self.parameters())

    def name_call_sites(self) -> None:
        """Tell every submodule its path, so that its dropout masks do not depend on call order."""
        for name, module in self.named_modules():
            module.path = name

    def train(self, mode: bool = True) -> Module:
        """Switch dropout on (or off) in this module and all below it."""
        check_flag("train", "mode", mode)
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch dropout off."""
        return self.train(False)

    def to(self, target: Any) -> Module:
        """Move to a device ("cpu", "cuda", "simulator") or cast all parameters to float32 or float64, in place.

        Make the optimizer afterwards: it keeps the parameters in a buffer of its own.
        """
        goal = target_named(target)
        if not isinstance(goal, str) and goal not in (np.float32, np.float64, np.complex128):
            raise DTypeError("to", f"{target!r} is no dtype for parameters", "Pass 'float32' or 'float64'")
        for parameter in self.parameters():
            array = parameter._data
            parameter.rebind(move(array, goal) if isinstance(goal, str) else array.astype(goal))
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter by name, on the host."""
        return {name: np.array(to_host(parameter._data)) for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Write arrays into the parameters of the same names, all or none.

        Raises `CheckpointError` if names are missing or left over (unless not `strict`), `ShapeError` for
        a shape that differs.
        """
        if not isinstance(state, Mapping):
            problem = f"got {shown(state)}, expected a dict of arrays by name"
            raise CheckpointError("load_state_dict", problem, "Pass what state_dict() returned")
        check_flag("load_state_dict", "strict", strict)
        own = dict(self.named_parameters())
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        if strict and (missing or unexpected):
            hint = nearest(missing[0], map(str, unexpected)) if missing and unexpected else "Is it the same config?"
            raise CheckpointError(
                "load_state_dict",
                f"the names do not match, missing {_some(missing)}, unexpected {_some(unexpected)}",
                f"{hint} Pass strict=False to load what fits",
            )
        arrays = {name: plain(as_array("load_state_dict", state[name])) for name in own if name in state}
        for name, array in arrays.items():
            shape, parameter = array.shape, own[name]
            if array.dtype.kind not in "biufc" or (array.dtype.kind == "c" and parameter.dtype.kind != "c"):
                problem = f"{name} has dtype {array.dtype}, expected {parameter.dtype}"
                raise DTypeError("load_state_dict", problem, "Convert it with array.astype(...)")
            if shape != parameter.shape:
                turned = " It is the transpose: pass array.T." if shape == parameter.shape[::-1] else ""
                raise ShapeError(
                    "load_state_dict",
                    f"{name} has shape {shape}, expected {parameter.shape}",
                    f"Load it into a model of the same config.{turned}",
                )
        for name, array in arrays.items():
            own[name].data = like(own[name]._data, cast("load_state_dict", array, own[name].dtype))

    def __repr__(self) -> str:
        lines = []
        for name, value in _children(self):
            if isinstance(value, (Module, Parameter)):
                body = repr(value) if isinstance(value, Module) else f"Parameter{value.shape}"
                lines.append(f"({name}): " + body.replace("\n", "\n  "))
        inside = "\n  ".join(["", *lines]) + "\n" if lines else ""
        return f"{type(self).__name__}({inside})"


def _some(names: list[Any]) -> str:
    if not names:
        return "none"
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    """What may hold parameters directly below `value`, flattened out of lists and dicts."""
    if isinstance(value, Module):
        pairs: Iterable[tuple[Any, Any]] = vars(value).items()
    elif isinstance(value, dict):
        pairs = value.items()
    else:
        pairs = enumerate(value)
    for name, child in pairs:
        if isinstance(child, (Module, Parameter)):
            yield str(name), child
        elif isinstance(child, (list, tuple, dict)):
            for inner, grandchild in _children(child):
                yield f"{name}.{inner}", grandchild


def _walk(module: Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """`module`, and every Module and Parameter below it, with its path."""
    yield prefix, module
    for name, child in _children(module):
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, Module):
            yield from _walk(child, path)
        else:
            yield path, child
