"""What the activations are made of, on registers: the normal distribution and the sigmoid.

With the Mills ratio R(t) = exp(t^2/2) Phi(-t), t >= 0, one exponential gives both what forward of the exact GELU
needs, Phi, and the density for its backward. (t + 4) R(t) is a smooth function of w = t / (t + 4), which is 0 at
t = 0 and 1 at infinity: a polynomial in w is good to rounding everywhere. Such a map is that of M. M. Shepherd and
J. G. Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc(x) in 0 <= x < infinity", Math. Comp. 36 (1981);
the coefficients are our own, of the polynomials through Chebyshev's nodes, computed with 40 digits.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from minitransformer.kernels.simd import absolute, constant, exp_low, minimum, polynomial, select_less

_MIDDLE = 4.0
_LAST = 39.0  # behind it exp(-t^2/2) is 0
# Of w, from the lowest power up, for float32 good up to t = 14, where its exp(-t^2/2) is 0, and for float64.
# fmt: off
_TERMS32 = (
    2.000000000437188, -4.383076621455087, 5.233853713409636, -3.19242854368313, 0.29652502201270864,
    0.7105440581684823, -0.10641559660616577, -0.2295816900441021, -0.029100748441234402,
    0.15362763304855384, -0.055054280146012734,
)
_TERMS64 = (
    2.0, -4.383076486422904, 5.233847027150502, -3.1923040532437073, 0.2953956658642576, 0.7160332084202183,
    -0.12032108894876554, -0.21781056459877723, -0.0024344661818867367, 0.07363668751952956,
    0.008813344249791823, 0.049384319643241845, -0.21654511207666097, 0.4969615832610579,
    -0.9842190479064884, 1.55171301521518, -1.898659982020828, 1.7952350499715608, -1.2755861989311064,
    0.6490641786198547, -0.22082665344073452, 0.044690794357547026, -0.004048940085376609,
)
# fmt: on


@njit
def normal(x: Any) -> Any:
    """Phi(x), and the density times sqrt(2 pi)."""
    one, t = constant(x, 1.0), minimum(absolute(x), constant(x, _LAST))
    scale = one / (t + constant(x, _MIDDLE))
    bell = exp_low(t * t * constant(x, -0.5))
    tail = bell * (polynomial(t * scale, _TERMS32, _TERMS64) * scale)  # Phi(-t)
    return select_less(x, constant(x, 0.0), tail, one - tail), bell


@njit
def sigmoid_and_slope(x: Any) -> Any:
    """s and s (1 - s), to a few roundings of each however large |x| is."""
    e = exp_low(constant(x, -0.0) - absolute(x))
    small = constant(x, 1.0) / (constant(x, 1.0) + e)  # s of |x|; e times that is s of -|x|
    large = e * small
    return select_less(x, constant(x, 0.0), large, small), large * small
