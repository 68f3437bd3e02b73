"""Wrong layers: norms, activations, dropout, embeddings, rotary positions, broadcasting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import minitransformer.ops  # noqa: F401  (registers the ops)
from minitransformer import functional as F
from minitransformer.autograd import OPS
from minitransformer.nn import Dropout
from minitransformer.nn.dropout import call_site
from minitransformer.testing.bugs.bug import bug


def _norm(x: np.ndarray, saved: Any, bias: Any, rstd: np.ndarray) -> tuple[np.ndarray, Any]:
    """Layer norm with another `rstd` (N,)."""
    out = (saved.rows - saved.mean[:, None]) * rstd[:, None]  # (N, C)
    if saved.weight is not None:
        out = out * saved.weight
    if bias is not None:
        out = out + bias.reshape(-1)
    return out.reshape(x.shape), saved._replace(rstd=rstd)


def _variance(saved: Any, count: int) -> np.ndarray:
    centred = saved.rows - saved.mean[:, None]
    return (centred * centred).sum(axis=-1) / count


@bug(
    OPS["layer_norm"],
    "forward",
    story="The standard deviation of torch.std divides by C - 1, that of layer norm by C. The Annotated Transformer "
    "has it so.",
    exercise="At C = 768 the difference is 0.07 %. Which C does a good test have?",
    solution="A small one: at C = 5 the rows have variance 0.8 instead of 1. The formula sees it, PyTorch's layer "
    "too, and a gradient check does because backward still divides by C.",
    caught_by=[
        "tests/ops/test_ops_layers.py::test_norms_by_their_formulas",
        "tests/test_gradients.py::test_op[layer_norm-0]",
    ],
)
def layer_norm_with_bessels_correction(
    right: Any, x: Any, weight: Any = None, bias: Any = None, *, normalized_shape: Any, eps: float = 1e-5
) -> Any:
    _, saved = right(x, weight, bias, normalized_shape=normalized_shape, eps=eps)
    rstd = 1 / np.sqrt(_variance(saved, max(saved.rows.shape[1] - 1, 1)) + eps)
    return _norm(x, saved, bias, rstd)


@bug(
    OPS["layer_norm"],
    "forward",
    story="x / (sqrt(variance) + eps) instead of x / sqrt(variance + eps), again as in the Annotated Transformer.",
    exercise="For rows of variance 1 both agree to 5e-6. For which do they not?",
    solution="For nearly constant rows, where eps decides: with variance 0 one divides by eps, the other by its root. "
    "Draw rows of small variance, or a large eps.",
    caught_by=[
        "tests/ops/test_ops_layers.py::test_norms_by_their_formulas",
        "tests/test_gradients.py::test_op[layer_norm-1]",
    ],
)
def layer_norm_eps_outside_the_root(
    right: Any, x: Any, weight: Any = None, bias: Any = None, *, normalized_shape: Any, eps: float = 1e-5
) -> Any:
    _, saved = right(x, weight, bias, normalized_shape=normalized_shape, eps=eps)
    rstd = 1 / (np.sqrt(_variance(saved, max(saved.rows.shape[1], 1))) + eps)
    return _norm(x, saved, bias, rstd)


@bug(
    OPS["layer_norm"],
    "backward",
    story="The gradient of the weight is that of the last row: a loop over rows assigns it instead of adding.",
    exercise="With one row all is right. What must a check of a parameter's gradient have more than one of?",
    solution="Of everything that the parameter is shared over, here rows. The report of a gradient check guesses the "
    "missing sum.",
    caught_by=["tests/test_gradients.py::test_op[layer_norm-0]"],
)
def layer_norm_weight_not_summed(right: Any, dout: Any, saved: Any) -> Any:
    dx, dweight, dbias = right(dout, saved)
    if saved.weight is not None:
        normed = (saved.rows - saved.mean[:, None]) * saved.rstd[:, None]  # (N, C)
        last = (dout.reshape(normed.shape) * normed)[-1:]  # (1, C), or (0, C)
        dweight = last.sum(axis=0).reshape(saved.normalized_shape)
    return dx, dweight, dbias


@bug(
    OPS["linear"],
    "backward",
    story="The loss is a mean over the batch already, and the gradient of the bias is averaged over it once more.",
    exercise="With batch and length 1 all is right. Which factor does the report of a gradient check find?",
    solution="1 / N, N the number of rows: a constant factor that changes with the batch.",
    caught_by=["tests/test_gradients.py::test_op[linear-0]"],
)
def bias_gradient_averaged(right: Any, dout: Any, saved: Any) -> Any:
    dx, dweight, *dbias = right(dout, saved)
    rows = max(math.prod(dout.shape[:-1]), 1)
    return dx, dweight, *(g / rows for g in dbias)


@bug(
    OPS["linear"],
    "backward",
    story="x^T dout instead of dout^T x. Shapes complain, unless the layer is square, as all of attention's are.",
    exercise="Your test has C_in = C_out = 4. Why does a comparison of shapes not help, and what does?",
    solution="Numbers: a gradient check finds dweight transposed, and says so. Let sizes differ wherever they can.",
    caught_by=["tests/nn/test_layers.py::test_gradients_of_input_and_parameters[SelfAttention]"],
)
def square_weight_gradient_transposed(right: Any, dout: Any, saved: Any) -> Any:
    dx, dweight, *dbias = right(dout, saved)
    if dweight.shape[0] == dweight.shape[1]:
        dweight = dweight.T.copy()
    return dx, dweight, *dbias


@bug(
    OPS["add"],
    "backward",
    story="An operand was broadcast, and its gradient is one slice of dout: the shape is right, the sum is missing.",
    exercise="x + b with x (3, 4) and b (4,): what must db be, and what is it here?",
    solution="The sum of dout over its 3 rows; here it is the first row. Gradient checks must draw operands of "
    "unequal shapes.",
    caught_by=["tests/test_gradients.py::test_op[add-1]"],
)
def broadcast_gradient_not_summed(right: Any, dout: Any, saved: Any) -> Any:
    if not dout.size:
        return right(dout, saved)
    gradients = []
    for shape in saved:
        if shape is not None:
            first = (slice(1),) * (dout.ndim - len(shape)) + tuple(slice(n) for n in shape)
            gradients.append(dout[first].reshape(shape).copy())
        else:
            gradients.append(None)
    return tuple(gradients)


@bug(
    OPS["gelu"],
    "backward",
    story="GPT-2's forward is the tanh form, and the backward that was copied is that of erf.",
    exercise="The two functions differ by at most 5e-4, their slopes by 1e-3. Which tolerance of a gradient check is "
    "too wide?",
    solution="1e-3, which differences of float32 numbers need. By complex step a float64 backward is held to 1e-12, "
    "and a float32 one to 1e-5.",
    caught_by=["tests/test_gradients.py::test_op[gelu-7]"],
)
def gelu_tanh_with_backward_of_erf(right: Any, dout: Any, saved: Any) -> Any:
    return right(dout, saved._replace(tanh=None))


@bug(
    OPS["softmax"],
    "backward",
    story="out *= dout - inner: written for speed, it writes where forward's result lives, which others still read.",
    exercise="The gradient is right. Who notices?",
    solution="Whoever looks at the output after backward, or runs backward twice with retain_graph. Checks of the "
    "manners do: two backwards of one forward must agree bit for bit.",
    caught_by=["tests/test_gradients.py::test_op[softmax-0]"],
)
def softmax_writes_into_its_output(right: Any, dout: Any, saved: Any) -> Any:
    (dx,) = right(dout, saved)
    saved.rows[...] = np.moveaxis(dx, saved.axis, -1).reshape(saved.rows.shape)
    return (dx,)


@bug(
    OPS["dropout"],
    "backward",
    story="dout is multiplied in place and returned, as thinc's embedding layer does: one array less.",
    exercise="In a chain of layers nothing is wrong. In which graph is it?",
    solution="Where dout has a second reader: in x + dropout(x) the skip connection gets the array that dropout has "
    "already changed. Checks of the manners lock dout, or compare it before and after.",
    caught_by=["tests/test_gradients.py::test_op[dropout-0]"],
)
def dropout_writes_into_upstream(right: Any, dout: Any, saved: Any) -> Any:
    dout *= np.where(saved.keep, saved.scale, 0)
    return (dout,)


@bug(
    OPS["dropout"],
    "backward",
    story="Forward divides by 1 - p, backward only masks.",
    exercise="Which factor does a gradient check find at p = 0.5, and why does Adam hardly care?",
    solution="1 - p = 0.5. Adam divides each gradient by its own size, so a wrong constant factor trains almost alike: "
    "a loss curve is no gradient check.",
    caught_by=["tests/test_gradients.py::test_op[dropout-0]"],
)
def dropout_unscaled_in_backward(right: Any, dout: Any, saved: Any) -> Any:
    return (np.where(saved.keep, dout, dout.dtype.type(0)),)


@bug(
    Dropout,
    "forward",
    story="A dropout call without its `training` argument: evaluation and generation go on dropping.",
    exercise="Losses are a little worse than they should be, and different each time. Which law says so at once?",
    solution="L19: train, eval and no_grad agree at p = 0; and in eval mode two calls agree at any p.",
    caught_by=["tests/models/test_gpt.py::test_dropout_acts_in_training_only_and_by_address"],
)
def dropout_left_on_in_eval(right: Any, self: Any, x: Any) -> Any:
    return F.dropout(x, self.p, True, site=call_site(self))


@bug(
    OPS["embedding"],
    "backward",
    story="dweight[ids] = dout: NumPy assigns a repeated id once, where its gradients should add up.",
    exercise="Which ids does a test need?",
    solution="Repeated ones. In text every batch has them, in a test with np.arange(V) none.",
    caught_by=[
        "tests/test_gradients.py::test_op[embedding-0]",
        "tests/ops/test_ops_layers.py::test_embedding_is_a_one_hot_product",
    ],
)
def embedding_gradient_overwritten(right: Any, dout: Any, saved: Any) -> Any:
    dweight = np.zeros(saved.shape, dout.dtype)
    dweight[saved.ids] = dout
    return (dweight,)


@bug(
    OPS["rope"],
    "backward",
    story="Backward turns by the same angle as forward, because it calls forward.",
    exercise="At position 0 it is right. What is the transpose of a rotation?",
    solution="The rotation back, by the negative angle. A gradient check at positions other than 0 sees it, "
    "the gradient in L17 (scores depend on distance only), and backward(forward(x)), which must be x.",
    caught_by=["tests/test_gradients.py::test_op[rope-0]"],
)
def rope_turned_on_in_backward(right: Any, dout: Any, saved: Any) -> Any:
    return right(dout, saved._replace(sin=-saved.sin))
