"""A contract that import-linter lacks: which of our packages may import one *subpackage* of a third-party package.

import-linter's own ``forbidden`` sees third-party imports by their top-level name only (``vllm``), so it cannot tell
``vllm.SamplingParams``, which is public, from ``vllm.v1.worker``, which is not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of every import in a module, ``importlib.import_module("…")`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


class OnlyImporter(Contract):  # type: ignore[misc]
    """``package`` (e.g. ``vllm.v1``) is imported by ``importer`` and what lies inside it, by nothing else of ours."""

    type_name = "only_importer"
    package = fields.StringField()
    importer = fields.StringField()

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        package, importer = str(self.package), str(self.importer)
        violations: list[dict[str, Any]] = []
        for module in sorted(graph.modules):
            if graph.is_module_squashed(module) or within(module, importer):
                continue
            path = module_file(module)
            for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
                if within(name, package):
                    violations.append({"module": module, "line": line, "name": name})
        return ContractCheck(kept=not violations, metadata={"violations": violations})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for found in check.metadata["violations"]:
            output.print_error(f"{found['module']}:{found['line']} imports {found['name']}; only {self.importer} may.")


def module_file(module: str) -> Path:
    """The file of one of our modules, found without importing it (its imports may need a GPU or a running server)."""
    root, _, rest = module.partition(".")
    spec = find_spec(root)
    assert spec is not None
    assert spec.origin is not None
    base = Path(spec.origin).parent.joinpath(*rest.split(".") if rest else ())
    package = base / "__init__.py"
    return package if package.exists() else base.with_suffix(".py")
