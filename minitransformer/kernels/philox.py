"""The numbers of `minitransformer.random` in Numba, to be compiled into the kernels that drop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

_U = np.uint64  # beside a signed number, an unsigned one would become a float
_MULTIPLIERS = (_U(0xD2511F53), _U(0xCD9E8D57))
_WEYL = (_U(0x9E3779B9), _U(0xBB67AE85))
_LOW, _SHIFT = _U(0xFFFFFFFF), _U(32)


@register_jitable(no_cfunc_wrapper=True)
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox-4x32-10: four words, as uint64, for one counter of four and the two words of a key."""
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
