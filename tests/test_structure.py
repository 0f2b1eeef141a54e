"""The shape of the tree: imports go one way down, tests share helpers alone, functions stay small."""

import ast
from collections.abc import Iterator

from tests.support.tree import Module, modules, product

ROOMS = {"utils": 0, "dataset": 1, "models": 2, "training": 3, "evaluation": 4, "config": 5, "tests": 7}
COMMANDS = 6  # scripts, tools, experiments, benchmarks, baselines
MOST_LINES = 60
MOST_PARAMETERS = 8
MOST_CHARACTERS = 110

Function = ast.FunctionDef | ast.AsyncFunctionDef


def rank(name: str) -> int:
    """The floor of a module; imports go down or stay."""
    return ROOMS.get(name.split(".")[0], COMMANDS)


def upward_imports(files: dict[str, Module]) -> list[str]:
    return [
        f"{name}:{line} imports {imported}"
        for name, module in files.items()
        for line, imported in module.imports(set(files))
        if rank(imported) > rank(name)
    ]


def circles(files: dict[str, Module]) -> list[set[str]]:
    """Groups of modules on one floor that import each other, directly or around."""
    below = {
        name: {imported for _, imported in module.imports(set(files)) if rank(imported) == rank(name)}
        for name, module in files.items()
    }

    def reached_from(start: str) -> set[str]:
        reached, waiting = set(), [start]
        while waiting:
            for imported in below[waiting.pop()] - reached:
                reached.add(imported)
                waiting.append(imported)
        return reached

    reached = {name: reached_from(name) for name in files}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in files}
    return [set(group) for group in groups if group]


def functions_of(module: Module) -> Iterator[tuple[str, Function, bool]]:
    """Every function with its dotted name, and whether it is called on an object or class."""

    def below(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                static = any(getattr(d, "id", "") == "staticmethod" for d in child.decorator_list)
                yield prefix + child.name, child, in_class and not static
                yield from below(child, f"{prefix}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from below(child, f"{prefix}{child.name}.", True)
            else:
                yield from below(child, prefix, in_class)

    yield from below(module.tree, f"{module.name}.", False)


def long_functions(files: dict[str, Module]) -> list[str]:
    return [
        f"{name} has {lines} lines"
        for module in files.values()
        for name, function, _ in functions_of(module)
        if (lines := function.end_lineno - function.lineno + 1) > MOST_LINES
    ]


def parameters_of(function: Function, bound: bool) -> int:
    """How many parameters a caller may give; `*rest` and `**named` are one each."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None) - bound


def wide_functions(files: dict[str, Module]) -> list[str]:
    return [
        f"{name} has {count} parameters"
        for module in files.values()
        for name, function, bound in functions_of(module)
        if (count := parameters_of(function, bound)) > MOST_PARAMETERS
    ]


def long_lines(files: dict[str, Module]) -> list[str]:
    return [
        f"{name}:{number} has {len(line)} characters"
        for name, module in files.items()
        for number, line in enumerate(module.text.splitlines(), 1)
        if len(line) > MOST_CHARACTERS
    ]


def type_checking(files: dict[str, Module]) -> list[str]:
    """Where a name exists for type checkers only, which hides an import that goes the wrong way."""
    word = "TYPE_" + "CHECKING"
    return [
        f"{name}:{node.lineno}"
        for name, module in files.items()
        for node in ast.walk(module.tree)
        if word in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
        and hasattr(node, "lineno")
    ]


def listed(found: list) -> str:
    return f"{len(found)} found:\n" + "\n".join(map(str, found))


def test_imports_go_one_way_down():
    found = upward_imports(product())
    assert not found, listed(found)


def test_no_modules_import_each_other():
    found = circles(product())
    assert not found, listed([" <-> ".join(sorted(group)) for group in found])


def test_no_name_exists_for_type_checkers_only():
    found = type_checking(modules())
    assert not found, listed(found)


def test_no_function_of_the_product_is_long():
    found = long_functions(product())
    assert not found, listed(found)


def test_no_function_has_many_parameters():
    found = wide_functions(modules())
    assert not found, listed(found)


def test_no_line_is_wide():
    found = long_lines(modules())
    assert not found, listed(found)


def test_tests_share_helpers_and_not_each_other():
    files = {name: module for name, module in modules().items() if module.room == "tests"}
    private = {
        name for name in files if name.split(".")[1:] and name.split(".")[1].startswith(("test_", "conftest"))
    }
    found = [
        f"{name}:{line} imports {imported}"
        for name, module in files.items()
        for line, imported in module.imports(set(files))
        if imported in private
    ]
    assert private and not found, listed(found)


def test_conftest_holds_fixtures_only():
    others = [
        node.name
        for node in modules()["tests.conftest"].tree.body
        if isinstance(node, Function | ast.ClassDef)
        and not any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert not others, f"move to tests/support: {others}"


def made_up(**texts: str) -> dict[str, Module]:
    """Modules by name; two underscores stand for a point."""
    named = {name.replace("__", "."): text for name, text in texts.items()}
    return {name: Module(name, text) for name, text in named.items()}


def test_an_upward_import_is_seen_wherever_it_hides():
    hidden = "def f():\n    from training.step import train\n"
    guarded = "if TYPE_CHECKING:\n    import evaluation.run as r\n"
    relative = "from ..models import trm\nfrom . import task\n"
    called = "importlib.import_module('tools.doctor')\nrunpy.run_module('evaluate')\n"
    files = made_up(
        models__trm=hidden, models__act=guarded, dataset__batch=relative, utils__old=called,
        training__step="import models.trm, torch", evaluation__run="",
        dataset__task="", tools__doctor="", evaluate="",
    )  # fmt: skip
    assert upward_imports(files) == [
        "models.trm:2 imports training.step",
        "models.act:2 imports evaluation.run",
        "dataset.batch:1 imports models.trm",
        "utils.old:1 imports tools.doctor",
        "utils.old:2 imports evaluate",
    ]


def test_a_circle_is_seen_within_a_floor():
    files = made_up(
        models__a="from models import b",
        models__b="def f():\n    import models.c",
        models__c="from models.a import x",
        models__d="import models.a, dataset.e",
        dataset__e="import models.d",
        models="from models.encoders import f",
        models__encoders="from models import f",
    )
    assert sorted(map(sorted, circles(files))) == [
        ["models", "models.encoders"],
        ["models.a", "models.b", "models.c"],
    ]


def test_functions_are_measured_without_their_object():
    eight = ", ".join(f"a{i}" for i in range(8))
    text = f"class C:\n    def fits(self, {eight}): pass\n    def no(cls, {eight}, *rest): pass\n"
    text += f"    @staticmethod\n    def also(a, {eight}): pass\n"
    text += f"def f({eight}, *, b): pass\ndef fine({eight}): pass\n"
    found = wide_functions({"m": Module("m", text)})
    assert found == [f"m.{name} has 9 parameters" for name in ("C.no", "C.also", "f")]
    lines = "def f():\n" + "    x = 1\n" * 59
    assert long_functions({"m": Module("m", lines)}) == []
    assert long_functions({"m": Module("m", lines + "    y = 2\n")}) == ["m.f has 61 lines"]
    assert long_lines({"m": Module("m", "x" * 110 + "\n" + "x" * 111)}) == ["m:2 has 111 characters"]
    word = "TYPE_" + "CHECKING"
    guarded = f"import typing as t\nfrom typing import {word}\nif t.{word}:\n    pass\n"
    assert type_checking({"m": Module("m", guarded)}) == ["m:2", "m:3"]
