"""Parameters as views of one contiguous buffer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from zlib import crc32

import numpy as np

from minitransformer.autograd import Parameter, Tensor, check_same_device
from minitransformer.errors import ConfigError, DTypeError, GradientError, ShapeError
from minitransformer.kernels.gpu.arrays import device_of, is_array, is_writable


def _trainable(params: Iterable[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """The distinct parameters that require a gradient, and those that do not, in the given order."""
    if isinstance(params, (Tensor, np.ndarray)) or not isinstance(params, Iterable):
        raise DTypeError(
            "optim",
            f"params is a {type(params).__name__}, expected an iterable of Parameters",
            "Pass model.parameters(), or a list",
        )
    given: dict[int, Parameter] = {}
    for position, p in enumerate(params):
        if not isinstance(p, Parameter):
            raise DTypeError(
                "optim",
                f"item {position} of params is a {type(p).__name__}, expected a Parameter",
                "Pass model.parameters(), or a list of Parameters",
            )
        given[id(p)] = p
    trainable = [p for p in given.values() if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "optim",
            f"none of the {len(given)} parameters requires a gradient, expected at least one",
            "Pass model.parameters() of a model with something to train",
        )
    dtype = trainable[0].dtype
    for p in trainable:
        if p.dtype != dtype or dtype.char not in "fd":
            raise DTypeError(
                "optim",
                f"a parameter of shape {p.shape} is {p.dtype}, expected "
                + (f"{dtype} like the first" if dtype.char in "fd" else "float32 or float64"),
                "Convert the model first: model.to('float32')",
            )
        check_same_device("optim", f"a parameter of shape {p.shape}", p.data, trainable[0].device)
    return trainable, [p for p in given.values() if not p.requires_grad]


class FlatParameters:
    """One buffer that holds the values of all trainable parameters, each of which becomes a view of it.

    `params` are the parameters in the order of the buffer: those with two or more dimensions first, so
    that weight decay is one slice, otherwise as given, each once. `data` is the buffer, (size,) in the
    one dtype of all parameters, and its first `num_decayed` elements decay. Frozen parameters
    (`requires_grad` False) stay where they are.

    A parameter can look into one buffer only: the newest takes it from an older one, whose `check`
    then fails.

    Raises `DTypeError` for what is no Parameter and for mixed dtypes, `ConfigError` if nothing is
    trainable.
    """

    def __init__(self, params: Iterable[Parameter]) -> None:
        trainable, self._frozen = _trainable(params)
        self.params = tuple(sorted(trainable, key=lambda p: p.ndim < 2))  # a stable sort
        self.num_decayed = sum(p.data.size for p in self.params if p.ndim >= 2)
        self._ends = tuple(accumulate(p.data.size for p in self.params))
        self.data = np.empty_like(self.params[0].data, shape=(self._ends[-1],))
        self._views = self.views(self.data)
        for p, view in zip(self.params, self._views, strict=True):
            np.copyto(view, p.data)
            gradient = p.grad
            p.rebind(view)
            p.grad = gradient

    @property
    def layout(self) -> int:
        """A checksum of the shapes in their order, to tell whether saved buffers belong here."""
        return crc32(repr([p.shape for p in self.params]).encode())

    def views(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Views of `buffer`, contiguous and of shape (size,), shaped like `params`; else `ShapeError`."""
        if not is_array(buffer) or buffer.dtype != self.data.dtype:
            raise DTypeError(
                "FlatParameters.views",
                f"buffer is {getattr(buffer, 'dtype', type(buffer).__name__)}, expected an array of {self.data.dtype}",
                "Make it with np.empty_like(flat.data)",
            )
        check_same_device("FlatParameters.views", "buffer", buffer, device_of(self.data))
        if buffer.shape != self.data.shape or not buffer.flags.c_contiguous:
            raise ShapeError(
                "FlatParameters.views",
                f"buffer has shape {buffer.shape} and strides {buffer.strides}, expected {self.data.shape}, contiguous",
                "Make it with np.empty_like(flat.data)",
            )
        return [
            buffer[end - p.data.size : end].reshape(p.shape) for p, end in zip(self.params, self._ends, strict=True)
        ]

    def check(self) -> None:
        """`GradientError` if writing into the buffer would no longer update the model as it is now."""
        for p, view in zip(self.params, self._views, strict=True):
            if p.data is not view:
                raise GradientError(
                    "optimizer",
                    f"a parameter of shape {p.shape} and dtype {p.dtype} has left the optimizer's buffer",
                    "Make the optimizer after model.to(...), and only one for each parameter",
                )
        if not all(p.requires_grad for p in self.params) or any(p.requires_grad for p in self._frozen):
            raise GradientError(
                "optimizer",
                "requires_grad of a parameter has changed since the optimizer was made",
                "Make a new optimizer after freezing or unfreezing parameters",
            )

    def gather(self, out: np.ndarray) -> None:
        """Write every `.grad` to its place in the flat array `out`, zeros where there is none.

        Raises `GradientError` if no parameter has a gradient, `ShapeError` or `DTypeError` for a `.grad`
        that does not fit its parameter.
        """
        if all(p.grad is None for p in self.params):
            raise GradientError(
                "optimizer",
                "no parameter has a gradient",
                "Call loss.backward() before step()",
            )
        views = self.views(out)
        if not is_writable(out):
            raise ShapeError("FlatParameters.gather", "out is read-only", "Make it with np.empty_like(flat.data)")
        for p, view in zip(self.params, views, strict=True):
            if p.grad is None:
                view[...] = 0
                continue
            if p.grad.shape != p.shape:
                raise ShapeError(
                    "optimizer",
                    f"a .grad has shape {p.grad.shape}, its parameter {p.shape}",
                    "Let backward fill .grad, or assign an array of the parameter's shape",
                )
            if p.grad.dtype != p.dtype:
                raise DTypeError(
                    "optimizer",
                    f"the .grad of a parameter of shape {p.shape} is {p.grad.dtype}, expected {p.dtype}",
                    "Convert it with grad.astype(...)",
                )
            np.copyto(view, p.grad)
