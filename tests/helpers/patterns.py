"""Find one expression or statement of a function, whatever file it is in, and replace it.

Patterns are Python. A name that begins with `any_` stands for any expression, the same one wherever
it is repeated; `*any_rest` among the arguments of a call stands for any number of them, keywords
included. Layout, comments and the place of a function do not matter, nor does anything that the
pattern does not name.
"""

import ast
import copy
import functools
from pathlib import Path

Bound = dict[str, object]


def _parse(text: str) -> ast.AST:
    """The expression, or the one statement, that a text holds."""
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


@functools.cache
def _functions(file: Path) -> dict[str, list[ast.FunctionDef]]:
    found = {}
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def _is_any(node: object) -> bool:
    return isinstance(node, ast.Name) and node.id.startswith("any_")


def _match(pattern: object, found: object, bound: Bound) -> Bound | None:
    """What the names of the pattern stand for if it matches, None otherwise."""
    if _is_any(pattern):
        if not isinstance(found, ast.expr):
            return None
        earlier = bound.get(pattern.id)
        if earlier is None:
            return bound | {pattern.id: found}
        return bound if ast.unparse(earlier) == ast.unparse(found) else None
    if type(pattern) is not type(found):
        return None
    if isinstance(pattern, ast.Call):
        bound = _match(pattern.func, found.func, bound)
        return None if bound is None else _match_arguments(pattern, found, bound)
    if isinstance(pattern, list):
        if len(pattern) != len(found):
            return None
        pairs = zip(pattern, found, strict=True)
    elif isinstance(pattern, ast.AST):
        names = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
        pairs = ((getattr(pattern, name), getattr(found, name)) for name in names)
    else:
        return bound if pattern == found else None
    for one, other in pairs:
        bound = _match(one, other, bound)
        if bound is None:
            return None
    return bound


def _match_arguments(pattern: ast.Call, found: ast.Call, bound: Bound) -> Bound | None:
    keywords = {keyword.arg: keyword for keyword in found.keywords}
    for keyword in pattern.keywords:
        bound = _match(keyword, keywords.pop(keyword.arg, None), bound)
        if bound is None:
            return None
    rests = [a for a in pattern.args if isinstance(a, ast.Starred) and _is_any(a.value)]
    if not rests and keywords:
        return None

    def go(wanted: list, given: list, bound: Bound) -> Bound | None:
        if not wanted:
            return None if given else bound
        if wanted[0] not in rests:
            step = _match(wanted[0], given[0], bound) if given else None
            return None if step is None else go(wanted[1:], given[1:], step)
        for n in range(len(given) + 1):
            rest = given[:n] + (list(keywords.values()) if wanted[0] is rests[-1] else [])
            if (done := go(wanted[1:], given[n:], bound | {wanted[0].value.id: rest})) is not None:
                return done
        return None

    return go(pattern.args, found.args, bound)


class _Fill(ast.NodeTransformer):
    """Put in what the names of a pattern stand for."""

    def __init__(self, bound: Bound):
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.bound[node.id]) if _is_any(node) else node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        args, keywords = [], list(node.keywords)
        for argument in node.args:
            if isinstance(argument, ast.Starred) and _is_any(argument.value):
                rest = self.bound[argument.value.id]
                args += [a for a in rest if not isinstance(a, ast.keyword)]
                keywords += [a for a in rest if isinstance(a, ast.keyword)]
            else:
                args.append(self.visit(argument))
        keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in keywords]
        return ast.Call(self.visit(node.func), args, keywords)


def replaced(
    package: Path, function: str, pattern: str, replacement: str, nth: int | None = None
) -> tuple[Path, bytes]:
    """The file below `package` in which a function of this name holds the pattern, and its text
    with the replacement.

    Raises:
        LookupError: unless exactly one place matches (of several, `nth` says which).
    """
    places, wanted = [], _parse(pattern)
    for file in sorted(package.rglob("*.py")):
        for node in _functions(file).get(function, ()):
            for part in ast.walk(node):
                bound = _match(wanted, part, {})
                if bound is not None:
                    places.append((file, part, bound))
    if len(places) != 1 and (nth is None or nth >= len(places)):
        raise LookupError(f"{function} must hold this once, not {len(places)} times: {pattern}")
    file, node, bound = places[nth or 0]
    text = ast.unparse(_Fill(bound).visit(_parse(replacement)))
    if isinstance(node, ast.expr):
        text = f"({text})"
    lines = file.read_bytes().splitlines(keepends=True)  # columns of the tree count bytes
    before = b"".join([*lines[: node.lineno - 1], lines[node.lineno - 1][: node.col_offset]])
    after = b"".join([lines[node.end_lineno - 1][node.end_col_offset :], *lines[node.end_lineno :]])
    return file, before + text.encode() + after
