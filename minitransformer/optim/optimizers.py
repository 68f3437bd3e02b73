"""SGD, Adam and AdamW with torch's arithmetic, each step one kernel call over the flat buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minitransformer.autograd import Parameter, check_same_device
from minitransformer.checks import check_count, check_number, is_integer, shown
from minitransformer.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from minitransformer.kernels import serve
from minitransformer.kernels.gpu.arrays import device_of, is_array, like, to_host
from minitransformer.optim.flat import FlatParameters


class Optimizer(ABC):
    """What all optimizers share: the flat buffers, gathering gradients, and saving the state.

    Weight decay, in every optimizer here, applies to parameters with two or more dimensions (weights
    and embeddings) and not to biases and the weights of norms, as in GPT-2 and its successors; torch
    does that only if it is given two parameter groups.

    `flat` is the `FlatParameters`. `lr` may be assigned between steps.
    """

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float, state: Sequence[str]) -> None:
        self._name = type(self).__name__
        self.lr = lr
        self.weight_decay = check_number(self._name, "weight_decay", weight_decay)
        self.flat = FlatParameters(params)
        self.steps = 0
        self._state = {name: np.zeros_like(self.flat.data) for name in state}
        self._gathered: np.ndarray | None = None  # made when a step first needs it

    @property
    def lr(self) -> float:
        """The learning rate of the next step, a finite number from 0."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = check_number(self._name, "lr", value)

    def step(self, gradient: np.ndarray | None = None) -> None:
        """Update every parameter once, in place; a graph that was recorded before can then not be
        differentiated any more if it needs them.

        `gradient` is a flat array in the order of `flat.params`, shape (size,), dtype of the parameters;
        it is only read. None takes the `.grad`s. A parameter without `.grad` counts as one with zeros,
        which is what `mt.grad` gives, so momentum and decay go on; torch leaves such a parameter out.
        To keep parameters as they are, freeze them before making the optimizer.

        Raises `GradientError` if there is no gradient at all, or if parameters were moved, converted,
        frozen or unfrozen since the optimizer was made; `ShapeError` or `DTypeError` for a gradient that
        does not fit. Nothing has changed then.
        """
        self.flat.check()
        data = self.flat.data
        if gradient is None:
            if self._gathered is None:
                self._gathered = np.empty_like(data)
            self.flat.gather(self._gathered)
            gradient = self._gathered
        if not is_array(gradient) or gradient.dtype != data.dtype:
            raise DTypeError(
                f"{self._name}.step",
                f"gradient is {getattr(gradient, 'dtype', type(gradient).__name__)}, expected {data.dtype}",
                "Pass a flat NumPy array like optimizer.flat.data",
            )
        if gradient.shape != data.shape:
            raise ShapeError(
                f"{self._name}.step",
                f"gradient has shape {gradient.shape}, expected {data.shape}",
                "Pass a flat NumPy array like optimizer.flat.data",
            )
        check_same_device(f"{self._name}.step", "gradient", gradient, device_of(data))
        self.steps += 1
        self._update(data, gradient)
        for p in self.flat.params:
            p.mark_written()

    @abstractmethod
    def _update(self, data: np.ndarray, gradient: np.ndarray) -> None:
        """Step number `steps` on the flat buffer."""

    def zero_grad(self) -> None:
        """Set `.grad` of every parameter to None."""
        for p in self.flat.params:
            p.grad = None

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
        """Copies of the flat state arrays, on the host, and numbers: all that `load_state` needs to go on.

        Hyperparameters other than `lr` are not part of it; neither are the parameters.
        """
        numbers: dict[str, int | float] = {"steps": self.steps, "lr": self.lr, "layout": self.flat.layout}
        return {name: np.array(to_host(array)) for name, array in self._state.items()}, numbers

    def load_state(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, int | float]) -> None:
        """Go on from what `state` returned: the next steps are the same, bit for bit.

        Raises `CheckpointError`, before anything is written, for missing or unknown names, for another
        shape, order of shapes or dtype, and for numbers that make no sense.
        """
        op, again = f"{self._name}.load_state", "Load it into the optimizer and model it was saved from"
        given: tuple[tuple[str, Any, Any], ...] = (
            ("arrays", arrays, self._state.keys()),
            ("numbers", numbers, {"steps", "lr", "layout"}),
        )
        for what, got, expected in given:
            if not isinstance(got, Mapping) or got.keys() != expected:
                names = sorted(map(str, got)) if isinstance(got, Mapping) else shown(got)
                raise CheckpointError(op, f"{what} has the names {names}, expected {sorted(expected)}", again)
        if not is_integer(numbers["layout"]) or numbers["layout"] != self.flat.layout:
            raise CheckpointError(op, "the state belongs to parameters of other shapes or order", again)
        for name, mine in self._state.items():
            array = arrays[name]
            if not isinstance(array, np.ndarray) or array.shape != mine.shape or array.dtype != mine.dtype:
                kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else shown(array)
                raise CheckpointError(op, f"{name} is {kind}, expected {mine.dtype} {mine.shape}", again)
        try:
            steps = check_count(op, "steps", numbers["steps"])
            self.lr = numbers["lr"]
        except ConfigError as error:
            raise CheckpointError(op, error.problem, again) from None
        self.steps = steps
        for name, mine in self._state.items():
            np.copyto(mine, like(mine, arrays[name]))


class SGD(Optimizer):
    """Stochastic gradient descent with (heavy ball) momentum.

    velocity = momentum velocity + gradient + weight_decay data;  data -= lr velocity

    Weight decay is the gradient of weight_decay/2 |data|^2; see `Optimizer` for what it applies to.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self.momentum = check_number("SGD", "momentum", momentum, below=1)
        super().__init__(params, lr, weight_decay, ("velocity",) if momentum else ())

    def _update(self, data: np.ndarray, gradient: np.ndarray) -> None:
        serve("optimizer", data).sgd_step(
            data,
            gradient,
            self._state.get("velocity"),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            num_decayed=self.flat.num_decayed,
        )


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), weight decay as a part of the gradient.

    first = beta1 first + (1 - beta1) g;  second = beta2 second + (1 - beta2) g^2
    data -= lr (first / (1 - beta1^step)) / (sqrt(second / (1 - beta2^step)) + eps)

    with g = gradient + weight_decay data; see `Optimizer` for what weight decay applies to.
    """

    KERNEL = "adam_step"

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        op = type(self).__name__
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigError(op, f"betas is {shown(betas)}, expected two numbers", "Pass betas=(0.9, 0.999)")
        self.betas = (
            check_number(op, "betas[0]", betas[0], below=1),
            check_number(op, "betas[1]", betas[1], below=1),
        )
        self.eps = check_number(op, "eps", eps)
        if self.eps == 0:
            raise ConfigError(op, "eps is 0, expected a number above 0", "Keep the default, 1e-8")
        super().__init__(params, lr, weight_decay, ("first", "second"))

    def _update(self, data: np.ndarray, gradient: np.ndarray) -> None:
        kernel = getattr(serve("optimizer", data), self.KERNEL)
        kernel(
            data,
            gradient,
            self._state["first"],
            self._state["second"],
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            num_decayed=self.flat.num_decayed,
            step=self.steps,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Before each step of Adam, data *= 1 - lr weight_decay; see `Optimizer` for what that applies to.
    """

    KERNEL = "adamw_step"

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
