"""The type of a register, how it comes from memory and goes back, and what writes LLVM's code for it."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import models, register_model

intrinsic: Any = extending.intrinsic  # untyped: what it makes has other arguments than what it is given

INDEX = ir.IntType(32)


def register_bits() -> int:
    """The width of the vector registers of this processor: 512 with AVX-512, 256 with AVX, else 128 (SSE, NEON)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return 512 if "+avx512f" in features else 256 if "+avx" in features else 128


REGISTER_BITS = register_bits()


class Vector(types.Type):
    """The Numba type of a register of `count` numbers of type `scalar`."""

    def __init__(self, scalar: Any) -> None:
        self.scalar, self.count = scalar, REGISTER_BITS // scalar.bitwidth
        super().__init__(name=f"vector({scalar}, {self.count})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        scalar = manager.lookup(vector.scalar).get_value_type()
        super().__init__(manager, vector, ir.VectorType(scalar, vector.count))


def suffix(vector: Vector) -> str:
    return f"v{vector.count}f{vector.scalar.bitwidth}"


def filled(vt: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vt, [ir.Constant(vt.element, value)] * vt.count)


def spread(builder: Any, vt: ir.VectorType, scalar: Any) -> Any:
    """A register with `scalar` in every lane."""
    undefined = ir.Constant(vt, ir.Undefined)
    first = builder.insert_element(undefined, scalar, INDEX(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INDEX, vt.count), [0] * vt.count))


def call(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """A call of one of LLVM's own functions."""
    function = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


# --- memory ----------------------------------------------------------------------------------------------


def pointer_to(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array)(context, builder, value).data, [index])


def first_of(builder: Any, vt: ir.VectorType, count: Any) -> Any:
    """Which lanes are among the first `count`, as LLVM's masked loads and stores want it."""
    index = ir.VectorType(ir.IntType(64), vt.count)
    numbers = ir.Constant(index, list(range(vt.count)))
    return builder.icmp_signed("<", numbers, spread(builder, index, count))


def _is_flat(array: Any) -> bool:
    return isinstance(array, types.Array) and array.layout == "C" and array.dtype in (types.float32, types.float64)


@intrinsic
def lanes(typingctx: Any, array: Any) -> Any:
    """How many numbers of `array`'s dtype a register holds: a constant of the compiled code."""
    count = Vector(array.dtype).count
    return types.intp(array), lambda context, builder, sig, args: context.get_constant(types.intp, count)


@intrinsic
def load(typingctx: Any, array: Any, i: Any) -> Any:
    """array[i], array[i + 1], ... as a register."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(vector)
        address = builder.bitcast(pointer_to(context, builder, array, *args), vt.as_pointer())
        return builder.load(address, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), emit


@intrinsic
def load_some(typingctx: Any, array: Any, i: Any, n: Any) -> Any:
    """The first `n` lanes as `load` has them, and 0 in the others, whose memory is not touched."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(vector)
        address = builder.bitcast(pointer_to(context, builder, array, args[0], args[1]), vt.as_pointer())
        align = INDEX(array.dtype.bitwidth // 8)
        given = [address, align, first_of(builder, vt, args[2]), filled(vt, 0.0)]
        return call(builder, f"llvm.masked.load.{suffix(vector)}.p0{suffix(vector)}", vt, given)

    return vector(array, types.intp, types.intp), emit


@intrinsic
def store(typingctx: Any, array: Any, i: Any, x: Any) -> Any:
    """Write the lanes of `x` to array[i], array[i + 1], ..."""
    if not _is_flat(array) or x != Vector(array.dtype):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(x)
        address = builder.bitcast(pointer_to(context, builder, array, args[0], args[1]), vt.as_pointer())
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), emit


@intrinsic
def store_some(typingctx: Any, array: Any, i: Any, n: Any, x: Any) -> Any:
    """Write the first `n` lanes of `x`, and touch no memory behind them."""
    if not _is_flat(array) or x != Vector(array.dtype):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(x)
        address = builder.bitcast(pointer_to(context, builder, array, args[0], args[1]), vt.as_pointer())
        given = [args[3], address, INDEX(array.dtype.bitwidth // 8), first_of(builder, vt, args[2])]
        call(builder, f"llvm.masked.store.{suffix(x)}.p0{suffix(x)}", ir.VoidType(), given)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, x), emit


@intrinsic
def broadcast(typingctx: Any, array: Any, i: Any) -> Any:
    """array[i] in every lane."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, context.get_value_type(vector), builder.load(pointer_to(context, builder, array, *args)))

    return vector(array, types.intp), emit


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """The number `x`, of type float32 or float64, in every lane."""
    if x not in (types.float32, types.float64):
        return None
    vector = Vector(x)
    return vector(x), lambda context, builder, sig, args: spread(builder, context.get_value_type(vector), args[0])


@intrinsic
def zeros(typingctx: Any, array: Any) -> Any:
    """A register of zeros of `array`'s dtype."""
    vector = Vector(array.dtype)
    return vector(array), lambda context, builder, sig, args: filled(context.get_value_type(vector), 0.0)


@njit
def load_up_to(array: Any, i: Any, n: Any) -> Any:
    """`load`, or `load_some` where fewer than a register are left: n numbers. One loop then does for any length."""
    return load(array, i) if n >= lanes(array) else load_some(array, i, n)


@njit
def store_up_to(array: Any, i: Any, n: Any, x: Any) -> Any:
    """`store`, or `store_some` where fewer than a register are left: n numbers."""
    if n >= lanes(array):
        store(array, i, x)
    else:
        store_some(array, i, n, x)


@intrinsic
def constant(typingctx: Any, like: Any, value: Any) -> Any:
    """The float64 `value`, rounded to the dtype of the array or register `like`, in every lane."""
    vector = Vector(like.dtype) if isinstance(like, types.Array) else like
    if not isinstance(vector, Vector) or value != types.float64:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[1], types.float64, vector.scalar)
        return spread(builder, context.get_value_type(vector), scalar)

    return vector(like, value), emit


@intrinsic
def first_lanes(typingctx: Any, n: Any, x: Any, y: Any) -> Any:
    """The first `n` lanes of x, and those of y in the others."""
    if not (isinstance(x, Vector) and x == y):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(first_of(builder, context.get_value_type(x), args[0]), args[1], args[2])

    return x(types.intp, x, x), emit
