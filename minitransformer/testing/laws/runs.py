"""Laws of how it is run: dropout, training and evaluation, threads."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from minitransformer.testing.laws.law import law
from minitransformer.testing.laws.trial import EVERY_OPTION, Trial


@law("L18", "dropout is one mask, the same in forward and backward", "dropout_p value_width")
def dropout(trial: Trial) -> None:
    """y = sum_s m_ts w_ts v_s with m = 0 or 1 / (1 - p), of mean 1, and a function of the seed alone.

    Backward uses the same m: <dy, y> = <dv, v>, and sum_s dk_s = 0 because the softmax is blind to a shift.
    """
    p = trial.problem(*(o for o in EVERY_OPTION if o != "softcap"))
    rate = trial.draw(st.sampled_from([0.5, 0.25]))
    dropped = p.having(dropout_p=rate, seed=trial.draw(st.integers(0, 1000)))
    run, again = trial.run(dropped), trial.run(dropped)
    trial.same(again, run, p, bitwise=True)

    S = p.k.shape[2]
    eye = np.broadcast_to(np.eye(S, dtype=p.q.dtype), (*p.k.shape[:3], S))  # its output is the matrix of weights
    w = trial.forward(p.with_(v=eye))
    mw = trial.forward(dropped.with_(v=eye))
    kept = mw != 0
    trial.equal("weights", mw, np.where(kept, w / (1 - rate), 0), p, bitwise=False)
    visible = w > 1e-30
    number, expected = int((kept & visible).sum()), float((1 - rate) * visible.sum())
    noise = 2 + 6 * (rate * expected) ** 0.5  # six standard deviations
    trial.within("number of kept weights", np.array([number]), np.array([expected]), noise)

    if run.dk is not None and run.dv is not None:
        sizes, total = p.magnitudes(), run.dk.sum(2)
        eps = 64 * float(np.finfo(p.q.dtype).eps) * (4 + sizes["scores"]) / (1 - rate)
        seen, passed = (p.dout * run.out).sum(keepdims=True), (run.dv * p.v).sum(keepdims=True)
        trial.within("<dv, v>", passed, seen, eps * sizes["dv"] * sizes["out"] * p.v.size)
        trial.within("sum of dk", total, np.zeros_like(total), eps * sizes["dk"] * p.k.shape[2])


@law("L19", "training, evaluation and no gradients give the same output", "gradient", "dropout_p")
def evaluation(trial: Trial) -> None:
    """At dropout 0: the output beside a backward = the output without one = that of an explicit dropout_p = 0."""
    p = trial.problem(*EVERY_OPTION)
    plain = trial.forward(p)
    if trial.attention.pull is not None:
        trial.equal("out", trial.run(p).out, plain, p)
    if trial.can("dropout_p"):
        zero = p.having(dropout_p=0.0, seed=trial.draw(st.integers(0, 9)))
        trial.equal("out", trial.forward(zero), plain, p)


@law("L20", "any number of threads gives the same result", "threads")
def threads(trial: Trial) -> None:
    """The same numbers with 1, 2, 3 or 7 threads."""
    p = trial.problem(*EVERY_OPTION)
    n = trial.draw(st.sampled_from([2, 3, 7]))
    trial.same(trial.run(p.having(threads=n)), trial.run(p.having(threads=1)), p)
