"""The Python files of the project as syntax trees, and what they import."""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

GENERATED = {"data", "runs", "outputs", "wandb"}  # what runs write; it may be large
LOADERS = {"import_module", "run_module", "__import__"}  # calls that import the module they name


@dataclass(frozen=True)
class Module:
    """A Python file: its dotted name, whether it is a package's `__init__`, and its text."""

    name: str
    text: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    def imports(self, known: set[str]) -> list[tuple[int, str]]:
        """Line and name of every import of a `known` module, inside functions and conditions, too."""
        found = []
        for node in ast.walk(self.tree):
            for name in self._named_by(node):
                # `from a.b import c` is an import of a.b.c where there is such a module, else of a.b
                while name and name not in known:
                    name = name.rpartition(".")[0]
                if name:
                    found.append((node.lineno, name))
        return found

    def _named_by(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.name.split(".")
                package = parts[: len(parts) - node.level + self.is_package]
                base = ".".join([*package, *([base] if base else [])])
            return [f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            return [str(node.args[0].value)] if called in LOADERS else []
        return []


@functools.cache
def modules() -> dict[str, Module]:
    """Every Python file of the project by its dotted name."""
    folders = (path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    files = [*ROOT.glob("*.py")]
    for folder in folders:
        if folder.name not in GENERATED:
            files += folder.rglob("*.py")
    return {module.name: module for module in map(_read, sorted(files))}


def product() -> dict[str, Module]:
    """Every Python file that is no test."""
    return {name: module for name, module in modules().items() if module.room != "tests"}


def _read(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)
