"""One file of source made of many: some classes of this package with everything that they need, and nothing else.

A top-level definition is taken if a taken one names it, through whatever module it was imported. Imports within the
package fall away, the others are gathered on top, and definitions stand in the order in which their modules would have
been imported. So the code that leaves the house is the code that is tested in it, word for word.
"""

import ast
import builtins
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from typing import NamedTuple

PACKAGE = "mosaic_dist"


class Import(NamedTuple):
    """Where a module has a name from; `name` None is the module itself."""

    module: str
    name: str | None

    def is_internal(self) -> bool:
        """Whether it comes from this package."""
        return self.module.split(".")[0] == PACKAGE

    def is_standard(self) -> bool:
        """Whether it comes with Python."""
        return self.module.split(".")[0] in sys.stdlib_module_names


class Definition(NamedTuple):
    """A top-level statement that binds names, with the comment above it and the text that follows it."""

    first_line: int
    text: str
    binds: frozenset[str]
    uses: frozenset[str]


class Source(NamedTuple):
    """A module: what it imports and what it defines, by local name. A definition of two names is there twice."""

    imports: dict[str, Import]
    definitions: dict[str, Definition]


def join_sources(roots: Sequence[tuple[str, str]], left_out: Iterable[str] = ()) -> str:
    """Source of the `roots`, (module, name) each, and of all that they need; modules are read, not run.

    `left_out` are methods, as `mosaic_dist.spec.Spec.to_yaml`, that are dropped with what only they need. An
    AssertionError tells of a name that means two things, and of forms of statement that this does not understand.
    """
    dropped = frozenset(left_out)
    meanings: dict[str, Import] = {}
    waiting, required = list(roots), set(roots)
    while waiting:
        module, local = waiting.pop()
        source = read_source(module, dropped)
        found = source.imports.get(local)
        if found is not None and found.is_internal():
            assert found.name == local, f"{module} renames {found}: joined code has one name for one thing"
            waiting.append((found.module, local))
            required.add((found.module, local))
        elif found is not None:
            _bind(meanings, local, found)
        elif local not in source.definitions:  # a local variable or a builtin
            assert (module, local) not in required, f"{module} has no {local}"
        elif _bind(meanings, local, Import(module, local)):
            waiting += [(module, name) for name in source.definitions[local].uses | source.definitions[local].binds]
    parts = [_import_block(meanings)]
    for module in _import_order([module for module, _ in roots], dropped):
        definitions = read_source(module, dropped).definitions
        taken = {definitions[name] for name in definitions if meanings.get(name) == Import(module, name)}
        if texts := [definition.text for definition in sorted(taken)]:
            parts.append("\n\n\n".join([f"# --- {module} ---", *texts]))
    return "\n\n\n".join(parts) + "\n"


def _bind(meanings: dict[str, Import], name: str, meaning: Import) -> bool:
    """Note what a name means in the joined file; whether that is news."""
    if name in meanings:
        assert meanings[name] == meaning, f"{name} is {meanings[name]} and {meaning}: rename one, to join their modules"
        return False
    assert not hasattr(builtins, name), f"{meaning} has the name of a builtin, which other modules may use"
    meanings[name] = meaning
    return True


def _import_block(meanings: dict[str, Import]) -> str:
    """The statements that import what is not of this package: the standard library first, names of a module in one."""
    statements: dict[tuple[bool, bool, str], list[str]] = {}
    for local, found in meanings.items():
        if not found.is_internal():
            key = (not found.is_standard(), found.name is not None, found.module)
            original = found.name or found.module
            statements.setdefault(key, []).append(original if local == original else f"{original} as {local}")
    lines = {False: "", True: ""}
    for (foreign, is_from, module), names in sorted(statements.items()):
        listed = ", ".join(sorted(names))
        lines[foreign] += f"from {module} import {listed}\n" if is_from else f"import {listed}\n"
    return "\n".join(filter(None, lines.values())).rstrip("\n")


def _import_order(roots: Iterable[str], dropped: frozenset[str]) -> list[str]:
    """Modules of this package that the roots import, each after those that it imports itself; roots as they come."""
    done: dict[str, None] = {}

    def visit(module: str) -> None:
        if module not in done:
            for found in read_source(module, dropped).imports.values():
                if found.is_internal():
                    visit(found.module)
            done[module] = None

    for module in roots:
        visit(module)
    return list(done)


# --- one module ---------------------------------------------------------------------------------------------------


@cache
def read_source(module: str, dropped: frozenset[str]) -> Source:
    """A module's imports and definitions, from its text."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no module {module}"
    assert isinstance(found.loader, SourceFileLoader), f"{module} has no source"
    text = found.loader.get_source(module) or ""
    tree, lines = ast.parse(text), text.splitlines()
    imports: dict[str, Import] = {}
    definitions: dict[str, Definition] = {}
    for statement, last_line in _with_tails(tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports |= _imports(module, statement)
        elif names := frozenset(_bound(statement)):
            definition = _definition(module, statement, last_line, lines, names, dropped)
            definitions |= dict.fromkeys(names, definition)
        else:
            assert isinstance(statement, ast.Expr), f"{module}, line {statement.lineno}: cannot be joined"
    return Source(imports, definitions)


def _with_tails(statements: list[ast.stmt]) -> Iterator[tuple[ast.stmt, int]]:
    """Statements with the last line of the expressions after them, such as the text about a constant."""
    for i, statement in enumerate(statements):
        tail = statement
        for later in statements[i + 1 :]:
            if not isinstance(later, ast.Expr):
                break
            tail = later
        is_definition = not isinstance(statement, ast.Import | ast.ImportFrom | ast.Expr)
        yield statement, (tail if is_definition else statement).end_lineno or statement.lineno


def _imports(module: str, statement: ast.Import | ast.ImportFrom) -> dict[str, Import]:
    if isinstance(statement, ast.ImportFrom):
        assert statement.module, f"{module}, line {statement.lineno}: relative import"
        return {alias.asname or alias.name: Import(statement.module, alias.name) for alias in statement.names}
    found = {alias.asname or alias.name.split(".")[0]: Import(alias.name, None) for alias in statement.names}
    assert not any(what.is_internal() for what in found.values()), f"{module}: import names, not {list(found)}"
    return found


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _definition(
    module: str,
    statement: ast.stmt,
    last_line: int,
    lines: list[str],
    names: frozenset[str],
    dropped: frozenset[str],
) -> Definition:
    first = _first_line(statement)
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    kept = set(range(first, last_line + 1))
    if isinstance(statement, ast.ClassDef):
        methods = {method.name: method for method in statement.body if isinstance(method, ast.FunctionDef)}
        unwanted = [method for name, method in methods.items() if f"{module}.{statement.name}.{name}" in dropped]
        for method in unwanted:
            statement.body.remove(method)
            kept -= set(range(_first_line(method) - 1, (method.end_lineno or 0) + 1))  # with the empty line above
    uses = frozenset(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
    return Definition(first, "\n".join(lines[number - 1] for number in sorted(kept)), names, uses)


def _first_line(statement: ast.stmt) -> int:
    """With its decorators."""
    return min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", ()))])
