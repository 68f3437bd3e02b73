"""Small mistakes in a source text, made from its syntax tree: what `mutate.py` runs the tests against.

Left out, because no number depends on it: docstrings, annotations, decorators, imports, `raise` and `assert`
with their messages, formatted strings, `__repr__`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """One mistake: where, of which kind, the statement before and after, and the whole text with it."""

    function: str  # the outermost around it, "" if there is none
    line: int
    kind: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.kind}: `{self.before}` -> `{self.after}`"


class _Point(NamedTuple):
    """A place in the tree, `node.field` or `node.field[index]`, and what stands there in the mutant."""

    node: ast.AST
    field: str
    index: int | None
    kind: str
    new: ast.AST

    def swap(self, new: ast.AST) -> ast.AST:
        """Put `new` there; returns what was there."""
        if self.index is None:
            old = getattr(self.node, self.field)
            setattr(self.node, self.field, new)
        else:
            old = getattr(self.node, self.field)[self.index]
            getattr(self.node, self.field)[self.index] = new
        return old


_OPERATORS = {
    ast.Add: (ast.Sub, "+ to -"),
    ast.Sub: (ast.Add, "- to +"),
    ast.Mult: (ast.Div, "* to /"),
    ast.Div: (ast.Mult, "/ to *"),
    ast.FloorDiv: (ast.Mult, "// to *"),
    ast.Pow: (ast.Mult, "** to *"),
    ast.BitAnd: (ast.BitOr, "& to |"),
    ast.BitOr: (ast.BitAnd, "| to &"),
}
_COMPARISONS = {
    ast.Lt: (ast.LtE, "< to <="),
    ast.LtE: (ast.Lt, "<= to <"),
    ast.Gt: (ast.GtE, "> to >="),
    ast.GtE: (ast.Gt, ">= to >"),
    ast.Eq: (ast.NotEq, "== to !="),
    ast.NotEq: (ast.Eq, "!= to =="),
    ast.Is: (ast.IsNot, "is to is not"),
    ast.IsNot: (ast.Is, "is not to is"),
    ast.In: (ast.NotIn, "in to not in"),
    ast.NotIn: (ast.In, "not in to in"),
}
_SUMS = {"sum", "mean", "sum_to"}
_SKIPPED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
_SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "type_comment"}


def mutants(source: str, constants_of_speed: frozenset[str] = frozenset()) -> Iterator[Mutant]:
    """Every mutant of `source`, in the order of its lines, none twice.

    `constants_of_speed` are module-level names whose value changes no number, only how fast it comes.
    """
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for statement, point in _points(tree, tree, constants_of_speed):
        before = _head(statement)
        old = point.swap(point.new)
        ast.fix_missing_locations(tree)
        mutated, after = ast.unparse(tree), _head(point.new if old is statement else statement)
        point.swap(old)
        if mutated not in seen:
            seen.add(mutated)
            around = [f.name for f in functions if f.lineno <= statement.lineno <= (f.end_lineno or 0)]
            yield Mutant("".join(around), statement.lineno, point.kind, before, after, mutated)


def _head(statement: ast.AST) -> str:
    """The statement without the statements inside it."""
    return ast.unparse(statement).partition("\n")[0]


def _points(node: ast.AST, statement: ast.AST, speed: frozenset[str]) -> Iterator[tuple[ast.stmt, _Point]]:
    """Every point below `node`, with the statement that it lies in."""
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED_FIELDS:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(child, ast.AST) or _is_skipped(child, speed):
                continue
            inside = child if isinstance(child, ast.stmt) else statement
            if isinstance(inside, ast.stmt):
                yield from ((inside, _Point(node, field, index, kind, new)) for kind, new in _replacements(child))
            if isinstance(child, ast.If | ast.IfExp | ast.comprehension):
                yield from ((inside, p) for p in _negations(child))  # type: ignore[misc]
            yield from _points(child, inside, speed)


def _is_skipped(node: ast.AST, speed: frozenset[str]) -> bool:
    if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
        return True
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id in speed
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, _SKIPPED)


def _negations(node: ast.If | ast.IfExp | ast.comprehension) -> Iterator[_Point]:
    if isinstance(node, ast.comprehension):
        for index, test in enumerate(node.ifs):
            yield _Point(node, "ifs", index, "negated condition", _not(test))
    else:
        yield _Point(node, "test", None, "negated condition", _not(node.test))


def _not(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(ast.Not(), test)


def _replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the place of `node`, and what kind of mistake that is."""
    if isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
        yield from _of_binary(node)
    elif isinstance(node, ast.AugAssign):
        yield "augmented to plain assignment", ast.Assign([node.target], node.value)
        if type(node.op) in _OPERATORS:
            new, kind = _OPERATORS[type(node.op)]
            yield kind, ast.AugAssign(node.target, new(), node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand
    elif isinstance(node, ast.BoolOp):
        for index in range(len(node.values)):
            rest = [value for i, value in enumerate(node.values) if i != index]
            yield "dropped condition", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        new_comparison, kind = _COMPARISONS[type(node.ops[0])]
        yield kind, ast.Compare(node.left, [new_comparison()], node.comparators)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node.value)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield "not transposed", node.value
    elif isinstance(node, ast.Assign) and _is_gradient(node.targets[0]) and not isinstance(node.value, ast.Tuple):
        yield "sign of a gradient", ast.Assign(node.targets, ast.UnaryOp(ast.USub(), node.value))


def _of_binary(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if type(node.op) in _OPERATORS:
        new, kind = _OPERATORS[type(node.op)]
        yield kind, ast.BinOp(node.left, new(), node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        yield "dropped term", node.left
        yield "dropped term", ast.UnaryOp(ast.USub(), node.right) if isinstance(node.op, ast.Sub) else node.right
    elif isinstance(node.op, ast.Mult | ast.Div):
        yield "dropped factor", node.left
        if isinstance(node.op, ast.Mult):
            yield "dropped factor", node.right


def _of_constant(value: object) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield "index or constant by one", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield "constant doubled", ast.Constant(2 * value or 1.0)
    elif isinstance(value, str) and "->" in value and len(value.partition("->")[2]) > 1:
        head, _, result = value.partition("->")
        yield "swapped axes", ast.Constant(f"{head}->{result[1]}{result[0]}{result[2:]}")


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    method = node.func.attr if isinstance(node.func, ast.Attribute) else None
    name = node.func.id if isinstance(node.func, ast.Name) else method
    on_array = isinstance(node.func, ast.Attribute) and not _is_module(node.func.value)
    if name in _SUMS:
        if on_array:
            assert isinstance(node.func, ast.Attribute)
            yield "omitted sum", node.func.value
        elif node.args:
            yield "omitted sum", node.args[0]
    elif name in ("swapaxes", "transpose") and on_array:
        assert isinstance(node.func, ast.Attribute)
        yield "axes not swapped", node.func.value
    elif name == "moveaxis" and len(node.args) == 3:
        array, source, target = node.args
        yield "swapped axes", ast.Call(node.func, [array, target, source], node.keywords)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("np", "math")


def _is_gradient(node: ast.expr) -> bool:
    """Whether a name is `d` + name."""
    return isinstance(node, ast.Name) and node.id[:1] == "d" and node.id[1:] in _DIFFERENTIATED


_DIFFERENTIATED = {"a", "b", "x", "q", "k", "v", "bias", "weight", "weights", "scores", "logits", "losses", "input"}
_DIFFERENTIATED |= {"normed", "rows"}
