"""One call of attention with everything it takes, for us and for torch, as arrays and as a program."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from minitransformer.checks import check_choice
from minitransformer.errors import ConfigError, require
from minitransformer.testing.layouts import array_text, lay_out, layout_of

_OURS = """\
import numpy as np
import minitransformer as mt
import minitransformer.functional as F
"""
_TORCHS = """\
import numpy as np
import torch
import torch.nn.functional as F
"""
_VARIABLES = {"query": "q", "key": "k", "value": "v", "attn_mask": "mask"}  # arguments with a line of their own


class TorchCall(NamedTuple):
    """Keyword arguments of `torch.nn.functional.scaled_dot_product_attention`, and the upstream gradient."""

    kwargs: dict[str, Any]
    dout: Any


@dataclass(frozen=True, eq=False, repr=False)
class AttentionProblem:
    """Arrays and options of one call of `F.scaled_dot_product_attention`, and its upstream gradient.

    q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv), dout (B, H, T, Dv), of one float dtype; `options` are the other
    keyword arguments of the call. The arrays are read-only: no run changes the next. Its `repr` is a program.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for x in (self.q, self.k, self.v, self.dout, *self.options.values()):
            if isinstance(x, np.ndarray):
                x.flags.writeable = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """All arguments, as in `F.scaled_dot_product_attention(**problem.kwargs)`."""
        return {"query": self.q, "key": self.k, "value": self.v, **self.options}

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, H, T, S), the shape of the scores."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def allowed(self) -> np.ndarray:
        """Which query may attend to which key, all options taken together: bool (B, H, T, S).

        Computed from their definitions, not by the kernels.
        """
        may = np.ones(self.sizes, bool)
        own = self._own_positions()  # (B, 1, T, 1)
        keys = np.arange(self.sizes[3])
        if self.options.get("is_causal"):
            may &= keys <= own
        left, right = self.options.get("window_size") or (None, None)
        if left is not None:
            may &= own - keys <= left
        if right is not None:
            may &= keys - own <= right
        if (lengths := self.options.get("key_lengths")) is not None:
            may &= keys < lengths[:, None, None, None]
        if (mask := self.options.get("attn_mask")) is not None:
            may &= mask if mask.dtype == bool else ~np.isneginf(mask)
        return may

    def _own_positions(self) -> np.ndarray:
        """Where each query stands among the keys, (B, 1, T, 1)."""
        B, _, T, S = self.sizes
        shift = np.zeros(B, int)
        if self.options.get("causal_align") == "lower_right":
            shift += self.options.get("key_lengths", S) - T
        return (np.arange(T) + shift[:, None])[:, None, :, None]

    def to(self, dtype: Any) -> AttentionProblem:
        """The same problem in another float dtype. Drawn ones hold numbers of float32, so nothing is rounded."""

        def cast(x: Any) -> Any:
            is_float = isinstance(x, np.ndarray) and x.dtype.kind == "f"
            return lay_out(x.astype(dtype), *layout_of(x)) if is_float else x

        options = {name: value if name == "alibi_slopes" else cast(value) for name, value in self.options.items()}
        return replace(self, q=cast(self.q), k=cast(self.k), v=cast(self.v), dout=cast(self.dout), options=options)

    # --- torch --------------------------------------------------------------------------------------------

    @property
    def torch_lacks(self) -> str | None:
        """What torch's scaled_dot_product_attention cannot do of this; None if it can do all."""
        return "softcap" if self.options.get("softcap") else None

    def to_torch(self) -> TorchCall:
        """The same problem for torch: positions, lengths and slopes become one mask.

        Query, key and value require a gradient, and so does a float mask that is passed as it is. Raises
        `ConfigError` where `torch_lacks` something, `MissingExtraError` without torch.
        """
        plain = self._for_torch()
        torch = require("torch", extra="peers", purpose="AttentionProblem.to_torch")
        tensors = {
            name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
            for name, value in plain.items()
        }
        for name in self._leaves(plain):
            tensors[name].requires_grad_()
        return TorchCall(tensors, torch.from_numpy(self.dout.copy()))

    def _for_torch(self) -> dict[str, Any]:
        """Torch's keyword arguments, as arrays."""
        if (lack := self.torch_lacks) is not None:
            problem = f"torch's scaled_dot_product_attention has no {lack}"
            raise ConfigError("AttentionProblem", problem, "Leave such problems out: `torch_lacks` is not None")
        kept: dict[str, Any] = {
            name: self.options[name] for name in ("scale", "enable_gqa", "attn_mask") if name in self.options
        }
        given: dict[str, Any] = {"query": self.q, "key": self.k, "value": self.v, **kept}
        slopes = self.options.get("alibi_slopes")
        rules = [n for n in ("is_causal", "window_size", "key_lengths") if self.options.get(n) is not None]
        if not rules and slopes is None:
            return given
        T, S = self.sizes[2:]
        upper_left = T == S or self.options.get("causal_align") == "upper_left"
        # torch multiplies the -inf of what is_causal hides by the scale too.
        if rules == ["is_causal"] and slopes is None and upper_left and kept.keys() <= {"enable_gqa"}:
            return {**given, "is_causal": True}
        mask = self.options.get("attn_mask")
        if slopes is None and (mask is None or mask.dtype == bool):
            return {**given, "attn_mask": self.allowed}
        added = np.zeros(self.sizes) if mask is None or mask.dtype == bool else mask.astype(np.float64)
        if slopes is not None:
            added = added - slopes[:, None, None] * abs(self._own_positions() - np.arange(S))
        return {**given, "attn_mask": np.where(self.allowed, added, -np.inf).astype(self.q.dtype)}

    # --- the program --------------------------------------------------------------------------------------

    def _leaves(self, arguments: dict[str, Any]) -> list[str]:
        """The arguments that get a gradient."""
        mask = arguments.get("attn_mask")
        leaves = ["query", "key", "value"]
        if mask is not None and mask.dtype != bool and mask is self.options.get("attn_mask"):
            leaves.append("attn_mask")
        return leaves

    def code(self, framework: str = "minitransformer") -> str:
        """A program that runs the problem forward and backward and prints the result; or one for "torch".

        It leaves them behind as `out`, and `q.grad` and so on. Raises `ConfigError` where `torch_lacks` something.
        """
        check_choice("code", "framework", framework, ("minitransformer", "torch"))
        ours = framework == "minitransformer"
        arguments = self.kwargs if ours else self._for_torch()
        leaves = self._leaves(arguments)
        lines, call = [], []
        for name, value in arguments.items():
            text = _text(value, layout=ours)
            if name in _VARIABLES:
                if not ours:
                    text = f"torch.tensor({text}){'.requires_grad_()' * (name in leaves)}"
                elif name in leaves:
                    text = f"mt.Tensor({text}, requires_grad=True)"
                lines.append(f"{_VARIABLES[name]} = {text}  # {value.shape}")
                text = _VARIABLES[name]
            call.append(text if name in ("query", "key", "value") else f"{name}={text}")
        dout = _text(self.dout, layout=ours)
        lines.append(f"dout = {dout}" if ours else f"dout = torch.tensor({dout})")
        lines += [f"out = F.scaled_dot_product_attention({', '.join(call)})", "out.backward(dout)"]
        printed = ", ".join(["out", *(f"{_VARIABLES[name]}.grad" for name in leaves)])
        text = "\n".join([*lines, f'print({printed}, sep="\\n")', ""])
        layouts = "from minitransformer.testing.layouts import lay_out\n" if "lay_out(" in text else ""
        return f"{_OURS if ours else _TORCHS}{layouts}\n{text}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints dataclasses field by field, unless they say how."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        B, H, T, S = self.sizes
        K, D, Dv = self.k.shape[1], self.k.shape[3], self.v.shape[3]
        return f"<attention problem B={B} H={H} K={K} T={T} S={S} D={D} Dv={Dv} {self.q.dtype}\n\n{self.code()}>"


def _text(value: Any, layout: bool) -> str:
    """The value as an expression, which with `layout` also lays it out in memory as it is."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    text = array_text(value)
    if not layout or value.flags.c_contiguous:
        return text
    order, steps = layout_of(value)
    return f"lay_out({text}, order={order}, steps={steps})"
