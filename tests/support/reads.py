"""Which attributes of which classes the code reads, found in its syntax alone.

Types are inferred from annotations of parameters, fields and results, from assignments and from `isinstance`.
An expression has the set of classes that it may be, a container that of its elements; the unknown has none.
"""

import ast
import functools
from collections.abc import Iterable, Iterator

from tests.support.tree import Module, product

Types = frozenset[str]
UNKNOWN: Types = frozenset()
LIKE_THEIR_OWNER = {"values", "items", "get", "pop", "copy", "model_copy"}  # methods
LIKE_THEIR_ARGUMENTS = {
    "replace",
    "deepcopy",
    "sorted",
    "list",
    "tuple",
    "set",
    "next",
    "iter",
    "enumerate",
    "zip",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
RECORDS = {"Metadata", "Leak"}  # what a dataset says of itself
READ_BY_NAME = {  # settings that are asked for by a text, and the module that has it
    "TRMConfig.L_layers": "models.trm",
    "HRMConfig.H_layers": "models.trm",
    "HRMConfig.L_layers": "models.trm",
    "TransformerConfig.H_layers": "models.trm",
}


class Program:
    """The classes, functions and variables of some modules; a name means the same in all of them."""

    def __init__(self, modules: Iterable[Module]):
        self.modules = list(modules)
        self.classes: dict[str, list[ast.ClassDef]] = {}
        self._results: dict[str, list[ast.expr]] = {}
        self._variables: dict[str, list[ast.expr]] = {}
        self._open: set[tuple[str, ...]] = set()  # what is being inferred; it may lead back to itself
        for module in self.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, []).append(node)
            for node in module.tree.body:
                if isinstance(node, ast.FunctionDef) and node.returns:
                    self._results.setdefault(node.name, []).append(node.returns)
                for target, value in _bound_by(node):
                    if isinstance(target, ast.Name):
                        self._variables.setdefault(target.id, []).append(value)

    @functools.cache  # noqa: B019 (a program lives as long as the tests)
    def line_of(self, name: str) -> tuple[str, ...]:
        """A class and its bases, nearest first."""
        bases = [_name_of(base) for node in self.classes.get(name, []) for base in node.bases]
        return (name, *(above for base in bases if base in self.classes for above in self.line_of(base)))

    def fields_of(self, name: str) -> list[str]:
        """The annotated fields that a class declares itself, but class variables."""
        return [
            item.target.id
            for node in self.classes[name]
            for item in node.body
            if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)
        ]

    def settings(self) -> dict[str, list[str]]:
        """The fields of every configuration (subclass of `Config`), but of records of what was made."""
        names = (name for name in sorted(self.classes) if "Config" in self.line_of(name)[1:])
        return {name: self.fields_of(name) for name in names if name not in RECORDS}

    def unread(self, read_by_name: dict[str, str]) -> list[str]:
        """The settings that nothing reads, as `Class.field`.

        A setting is read by an attribute whose owner is inferred to be of its class, outside validators: they
        only refuse values. Or it is read as a text, in the module that `read_by_name` names. A field that a
        subclass declares again is the base's.
        """
        settings = self.settings()
        found = set(self.reads({field for fields in settings.values() for field in fields}))
        unread = []
        for name, fields in settings.items():
            for field in fields:
                owners = [line for line in self.line_of(name) if field in settings.get(line, [])]
                by_name = self._names(read_by_name.get(f"{name}.{field}"), field)
                if not by_name and not any((owner, field) in found for owner in owners):
                    unread.append(f"{name}.{field}")
        return unread

    def _names(self, module: str | None, text: str) -> bool:
        """Does this module have the text as a value?"""
        trees = (m.tree for m in self.modules if m.name == module)
        return any(isinstance(n, ast.Constant) and n.value == text for tree in trees for n in ast.walk(tree))

    def reads(self, names: set[str]) -> Iterator[tuple[str, str]]:
        """Class and attribute of every read of one of these names, outside validators."""
        for module in self.modules:
            yield from self._reads_below(module.tree, names, {})

    def _reads_below(
        self, node: ast.AST, names: set[str], outer: dict[str, Types]
    ) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                own = frozenset({child.name})
                yield from self._reads_below(child, names, {**outer, "self": own, "cls": own})
                continue
            if isinstance(child, Function):
                if not any("validator" in ast.unparse(mark) for mark in getattr(child, "decorator_list", [])):
                    yield from self._reads_below(child, names, Scope(self, child, outer).names)
                continue
            if isinstance(child, ast.Attribute) and child.attr in names and isinstance(child.ctx, ast.Load):
                for owner in Scope(self, None, outer).types_of(child.value):
                    yield from ((line, child.attr) for line in self.line_of(owner))
            yield from self._reads_below(child, names, outer)

    def annotated(self, annotation: ast.expr | None) -> Types:
        """The classes that an annotation names, in whatever container."""
        found: Types = UNKNOWN
        for node in ast.walk(annotation) if annotation else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found |= self.named(node.value)
            elif isinstance(node, ast.Name | ast.Attribute):
                found |= self.named(_name_of(node))
        return found

    def named(self, name: str) -> Types:
        """A class of that name, or what a variable of the module level may be."""
        if name in self.classes:
            return frozenset({name})
        if name not in self._variables or ("variable", name) in self._open:
            return UNKNOWN
        self._open.add(("variable", name))
        found = frozenset().union(*map(self.annotated, self._variables[name]))
        self._open.discard(("variable", name))
        return found

    def result_of(self, name: str) -> Types:
        """What a function of the module level returns, by its annotation."""
        return frozenset().union(*map(self.annotated, self._results.get(name, [])))

    def attribute(self, owners: Types, name: str) -> Types:
        """What the attribute `name` of one of these classes may be; of a method, its result."""
        lines = {line for owner in owners for line in self.line_of(owner)}
        found = frozenset().union(*(self._own_attribute(line, name) for line in lines))
        # `Run[Special]` may be both; where its attribute is a `General`, it is the `Special` one.
        return found | {owner for owner in owners if found & set(self.line_of(owner)[1:])}

    @functools.cache  # noqa: B019
    def _own_attribute(self, owner: str, name: str) -> Types:
        found: Types = UNKNOWN
        for item in (item for node in self.classes[owner] for item in node.body):
            if isinstance(item, ast.AnnAssign) and _name_of(item.target) == name:
                found |= self.annotated(item.annotation)
            elif isinstance(item, ast.FunctionDef) and item.name == name:
                found |= self.annotated(item.returns)
            elif isinstance(item, ast.FunctionDef) and (owner, item.name, name) not in self._open:
                self._open.add((owner, item.name, name))
                found |= self._assigned_in(item, owner, name)
                self._open.discard((owner, item.name, name))
        return found

    def _assigned_in(self, method: ast.FunctionDef, owner: str, name: str) -> Types:
        found: Types = UNKNOWN
        for target, value in _assignments(method):
            if isinstance(target, ast.Attribute) and (target.attr, _name_of(target.value)) == (name, "self"):
                found |= Scope(self, method, {"self": frozenset({owner})}).types_of(value)
        return found


@functools.cache
def program() -> Program:
    """The project without its benchmarks: what they alone read has no effect on a run."""
    return Program(module for module in product().values() if module.room != "benchmarks")


@functools.cache
def unread_settings() -> tuple[str, ...]:
    """The settings of the project that nothing reads, as `Class.field`."""
    return tuple(program().unread(READ_BY_NAME))


class Scope:
    """What the names in a function may be, wherever in it they are bound."""

    def __init__(self, program: Program, function: Function | None, outer: dict[str, Types]):
        self.program, self.names = program, dict(outer)
        if function is None:
            return
        given = function.args
        for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]:
            if argument and (argument.annotation or argument.arg not in ("self", "cls")):
                self.names[argument.arg] = program.annotated(argument.annotation)
        bindings = [
            (target.id, value) for target, value in _assignments(function) if isinstance(target, ast.Name)
        ]
        for _ in range(3):  # a name may be bound to one that is bound further down
            for name, value in bindings:
                self.names[name] = self.names.get(name, UNKNOWN) | self.types_of(value)

    def types_of(self, node: ast.expr) -> Types:
        """The classes that an expression may be."""
        if isinstance(node, ast.Name):
            return self.names[node.id] if node.id in self.names else self.program.named(node.id)
        if isinstance(node, ast.Attribute):
            return self.program.attribute(self.types_of(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._result_of(node)
        return frozenset().union(*map(self.types_of, _alternatives(node)))

    def _result_of(self, call: ast.Call) -> Types:
        name, program = _name_of(call.func), self.program
        if name in program.classes:
            return frozenset({name})
        if isinstance(call.func, ast.Attribute) and (owners := self.types_of(call.func.value)):
            return program.attribute(owners, name) | (owners if name in LIKE_THEIR_OWNER else UNKNOWN)
        found = program.result_of(name)
        if name in LIKE_THEIR_ARGUMENTS:
            found = found.union(*map(self.types_of, call.args))
        return found


def _name_of(node: ast.expr) -> str:
    """The last part of a name, with or without points."""
    return getattr(node, "id", None) or getattr(node, "attr", "")


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """What the value of an expression, or an element of it, may be one of."""
    if isinstance(node, ast.Subscript | ast.Starred | ast.NamedExpr | ast.DictComp):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp | ast.Dict):
        return node.values
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return node.elts
    return [node.elt] if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp) else []


def _assignments(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets and values of all that binds a name or an attribute in a function, tuples taken apart."""
    for node in ast.walk(function):
        for target, value in _bound_by(node):
            yield from _taken_apart(target, value)


def _bound_by(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What a single node binds; `isinstance` binds a name to its class."""
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.AnnAssign):
        yield node.target, node.annotation
    elif isinstance(node, ast.NamedExpr):
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield node.target, node.iter
    elif isinstance(node, ast.withitem) and node.optional_vars:
        yield node.optional_vars, node.context_expr
    elif isinstance(node, ast.Call) and _name_of(node.func) == "isinstance":
        yield node.args[0], node.args[1]


def _taken_apart(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if not isinstance(target, ast.Tuple | ast.List):
        yield target, value
        return
    parts = value.elts if isinstance(value, ast.Tuple | ast.List) else []
    for i, part in enumerate(target.elts):
        yield from _taken_apart(part, parts[i] if len(parts) == len(target.elts) else value)
