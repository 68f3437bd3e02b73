"""The two routines that do the arithmetic of matrices: a tile of a product, and a transposition.

Both are written as LLVM code once per compiled kernel and called, so that what they keep in registers stays there
and a kernel with seven products compiles one. Positions are flat, and nothing is checked.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from minitransformer.kernels.simd.registers import (
    REGISTER_BITS,
    Vector,
    call,
    filled,
    first_of,
    lanes,
    load,
    pointer_to,
    splat,
    spread,
    suffix,
)

# A tile is ROWS x 2 registers of sums. AVX-512 and NEON have 32 registers, older x86 has 16, and two rows of B and
# one number of A must find a place too.
ROWS = 12 if REGISTER_BITS == 512 or platform.machine() in ("arm64", "aarch64") else 6

# A function that is compiled into the kernels that call it, and nothing else: njit would also compile what it takes to
# call it from Python, which is a quarter of the time.
routine = register_jitable(no_cfunc_wrapper=True)

_INT = ir.IntType(64)
_BIT = ir.IntType(1)


LINE = 64  # bytes of a cache line


@routine
def first_line(w: Any) -> Any:
    """The position in `w` of the first cache line that begins there."""
    return -w.ctypes.data % LINE // w.itemsize


def _function(module: Any, name: str, arguments: list[Any]) -> tuple[Any, bool]:
    """LLVM's function `name` in this module, and whether it is still to be written."""
    if name in module.globals:
        return module.globals[name], False
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    return function, True


def _product_function(module: Any, vt: ir.VectorType, suffix: str, width: int) -> Any:
    """void(A, row, step, B, ldb, C, ldc, K, rows, add): see `product`; C is ROWS x `width` registers."""
    pointer, lanes = vt.element.as_pointer(), vt.count
    arguments = [pointer, _INT, _INT, pointer, _INT, pointer, _INT, _INT, _INT, _BIT]
    function, empty = _function(module, f"mt_product_{ROWS}x{width}_{suffix}", arguments)
    if not empty:
        return function
    align = 8 if suffix.endswith("64") else 4
    A, row, step, B, ldb, C, ldc, K, rows, add = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))

    def at(base: Any, index: Any) -> Any:
        return builder.bitcast(builder.gep(base, [index]), vt.as_pointer())

    # Rows behind the last one repeat it: they are computed in vain and not stored.
    last = builder.sub(rows, _INT(1))
    offsets: list[Any] = [_INT(0)]
    for r in range(1, ROWS):
        exists = builder.icmp_signed("<", _INT(r), rows)
        offsets.append(builder.mul(builder.select(exists, _INT(r), last), row))

    start = builder.block
    loop, end = function.append_basic_block("loop"), function.append_basic_block("end")
    builder.cbranch(builder.icmp_signed(">", K, _INT(0)), loop, end)
    builder.position_at_end(loop)
    k, a, b = builder.phi(_INT), builder.phi(pointer), builder.phi(pointer)
    sums = [builder.phi(vt) for _ in range(ROWS * width)]
    columns = [builder.load(at(b, _INT(w * lanes)), align=align) for w in range(width)]
    totals = []
    for r in range(ROWS):
        number = spread(builder, vt, builder.load(builder.gep(a, [offsets[r]])))
        totals += [
            call(builder, f"llvm.fma.{suffix}", vt, (number, columns[w], sums[r * width + w])) for w in range(width)
        ]
    following = builder.add(k, _INT(1)), builder.gep(a, [step]), builder.gep(b, [ldb])
    zero = filled(vt, 0.0)
    for phi, first, next_ in zip(
        (k, a, b, *sums), (_INT(0), A, B, *[zero] * len(sums)), (*following, *totals), strict=True
    ):
        phi.add_incoming(first, start)
        phi.add_incoming(next_, loop)
    builder.cbranch(builder.icmp_signed("<", following[0], K), loop, end)

    builder.position_at_end(end)
    sums = [builder.phi(vt) for _ in totals]
    for phi, total in zip(sums, totals, strict=True):
        phi.add_incoming(zero, start)
        phi.add_incoming(total, loop)
    done = function.append_basic_block("done")
    adds, sets = function.append_basic_block("adds"), function.append_basic_block("sets")
    builder.cbranch(add, adds, sets)
    for block, adding in ((adds, True), (sets, False)):
        builder.position_at_end(block)
        target = C
        for r in range(ROWS):
            for w in range(width):
                address, value = at(target, _INT(w * lanes)), sums[r * width + w]
                if adding:
                    value = builder.fadd(builder.load(address, align=align), value)
                builder.store(value, address, align=align)
            if r + 1 < ROWS:
                following = function.append_basic_block()
                builder.cbranch(builder.icmp_signed("<", _INT(r + 1), rows), following, done)
                builder.position_at_end(following)
                target = builder.gep(target, [ldc])
        builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def _product(width: int) -> Any:
    @intrinsic
    def function(
        typingctx: Any,
        A: Any,
        a: Any,
        row: Any,
        step: Any,
        B: Any,
        b: Any,
        ldb: Any,
        C: Any,
        c: Any,
        ldc: Any,
        K: Any,
        rows: Any,
        add: Any,
    ) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            A, a, row, step, B, b, ldb, C, c, ldc, K, rows, add = args
            vector = Vector(sig.args[0].dtype)
            code = _product_function(builder.module, context.get_value_type(vector), suffix(vector), width)
            A, B, C = (pointer_to(context, builder, sig.args[0], *pair) for pair in ((A, a), (B, b), (C, c)))
            builder.call(code, [A, row, step, B, ldb, C, ldc, K, rows, builder.trunc(add, _BIT)])
            return context.get_dummy_value()

        i = types.intp
        return types.void(A, i, i, i, A, i, i, A, i, i, i, i, types.uint8), emit

    return function


_wide, _narrow = _product(2), _product(1)


@routine
def product(
    A: Any,
    a: Any,
    row: Any,
    step: Any,
    B: Any,
    b: Any,
    ldb: Any,
    C: Any,
    c: Any,
    ldc: Any,
    K: Any,
    rows: Any,
    registers: Any,
    add: Any,
) -> None:
    """C[c + r ldc + n] (+)= sum_k A[a + r row + k step] B[b + k ldb + n] for k < K, r < rows, n < registers L."""
    L = lanes(A)
    for r in range(0, rows, ROWS):
        left = min(ROWS, rows - r)
        for n in range(0, registers, 2):
            b_n, c_n = b + n * L, c + r * ldc + n * L
            if n + 2 <= registers:
                _wide(A, a + r * row, row, step, B, b_n, ldb, C, c_n, ldc, K, left, add)
            else:
                _narrow(A, a + r * row, row, step, B, b_n, ldb, C, c_n, ldc, K, left, add)


def _transpose_function(module: Any, vt: ir.VectorType, suffix: str) -> Any:
    """void(A, lda, rows, columns, B, ldb, rows of B, columns of B, factor): see `_transpose`."""
    pointer, lanes = vt.element.as_pointer(), vt.count
    function, empty = _function(
        module, f"mt_transpose_{suffix}", [pointer, _INT, _INT, _INT, pointer, _INT, _INT, _INT, vt]
    )
    if not empty:
        return function
    A, lda, rows, columns, B, ldb, rows_out, columns_out, factor = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    bits = ir.VectorType(_BIT, lanes)
    align = ir.Constant(ir.IntType(32), 8 if suffix.endswith("64") else 4)

    def row(base: Any, r: int, ld: Any) -> Any:
        return builder.bitcast(builder.gep(base, [builder.mul(_INT(r), ld)]), vt.as_pointer())

    def mask(whole: Any, r: int, count: Any) -> Any:
        """Which lanes of row r are there."""
        return builder.select(builder.icmp_signed("<", _INT(r), count), whole, ir.Constant(bits, None))

    def emit(full: bool) -> None:
        registers = []
        whole = first_of(builder, vt, columns)
        for r in range(lanes):
            address = row(A, r, lda)
            if full:
                loaded = builder.load(address, align=align.constant)
            else:
                given = [address, align, mask(whole, r, rows), filled(vt, 0.0)]
                loaded = call(builder, f"llvm.masked.load.{suffix}.p0{suffix}", vt, given)
            registers.append(builder.fmul(loaded, factor))
        # Shuffling the two halves into each other log2(lanes) times brings element r of register c to c of r.
        orders = [[half + n // 2 + n % 2 * lanes for n in range(lanes)] for half in (0, lanes // 2)]
        orders = [ir.Constant(ir.VectorType(ir.IntType(32), lanes), order) for order in orders]
        for _ in range(lanes.bit_length() - 1):
            pairs = zip(registers[: lanes // 2], registers[lanes // 2 :], strict=True)
            registers = [builder.shuffle_vector(*pair, order) for pair in pairs for order in orders]
        whole = first_of(builder, vt, columns_out)
        for r in range(lanes):
            if full:
                builder.store(registers[r], row(B, r, ldb), align=align.constant)
            else:
                given = [registers[r], row(B, r, ldb), align, mask(whole, r, rows_out)]
                call(builder, f"llvm.masked.store.{suffix}.p0{suffix}", ir.VoidType(), given)
        builder.ret_void()

    # Masks take longer than the transposition, and as a rule nothing is missing.
    full = ir.Constant(_BIT, 1)
    for count in (rows, columns, rows_out, columns_out):
        full = builder.and_(full, builder.icmp_signed(">=", count, _INT(lanes)))
    with builder.if_then(full):
        emit(full=True)
    emit(full=False)
    return function


@intrinsic
def _transpose(
    typingctx: Any,
    A: Any,
    a: Any,
    lda: Any,
    rows: Any,
    columns: Any,
    B: Any,
    b: Any,
    ldb: Any,
    rows_out: Any,
    columns_out: Any,
    factor: Any,
) -> Any:
    """L x L numbers: B[b + c ldb + r] = A[a + r lda + c] factor[c], read as 0 and not written beyond the sizes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        A, a, lda, rows, columns, B, b, ldb, rows_out, columns_out, factor = args
        code = _transpose_function(builder.module, factor.type, suffix(sig.args[-1]))
        A, B = (pointer_to(context, builder, sig.args[0], *pair) for pair in ((A, a), (B, b)))
        builder.call(code, [A, lda, rows, columns, B, ldb, rows_out, columns_out, factor])
        return context.get_dummy_value()

    i = types.intp
    return types.void(A, i, i, i, i, A, i, i, i, i, factor), emit


_transposed: Any = _transpose  # it is called without the typing context


@routine
def to_lanes(A: Any, a: Any, lda: Any, rows: Any, columns: Any, B: Any, b: Any, ldb: Any, factor: Any) -> None:
    """The rows of A, `columns` wide, become lanes: B[b + c ldb + r] = factor A[a + r lda + c].

    All lanes of B's rows are written, 0 in those without a row of A, and so are B's rows up to a multiple of L.
    """
    L = lanes(A)
    for c in range(0, columns, L):
        for r in range(0, ldb, L):
            _transposed(A, a + r * lda + c, lda, rows - r, columns - c, B, b + c * ldb + r, ldb, L, L, splat(factor))


@routine
def from_lanes(
    A: Any, a: Any, lda: Any, B: Any, b: Any, ldb: Any, rows: Any, columns: Any, factors: Any, f: Any
) -> None:
    """Lanes become rows: B[b + r ldb + c] = A[a + c lda + r] factors[f + r] for r < rows and c < columns."""
    L = lanes(A)
    for r in range(0, rows, L):
        factor = load(factors, f + r)
        for c in range(0, columns, L):
            _transposed(
                A, a + c * lda + r, lda, columns - c, rows - r, B, b + r * ldb + c, ldb, rows - r, columns - c, factor
            )
