"""Imports climb and never descend: the order of the packages, who may know the configuration, and no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

PACKAGE = ROOT / "nostalgia"

# From the ground up; a package imports from tiers below its own and from itself. `errors` stands below all.
TIERS = (
    ("errors",),
    ("options",),
    ("utils",),
    ("linalg", "config"),
    ("parallel",),
    ("data",),
    ("models", "checkpoint"),
    ("curvature",),
    ("projection",),
    ("methods",),
    ("training",),
    ("evaluation",),
    ("logging",),
    ("analysis",),
)
LEVEL = {name: level for level, tier in enumerate(TIERS) for name in tier}
TOP = len(TIERS)  # modules straight under nostalgia/ and commands: above all packages


@dataclass(frozen=True)
class Import:
    """``source`` and ``target`` are modules; ``line`` is where it stands; ``runtime``: not only for type checkers."""

    source: str
    target: str
    line: int
    runtime: bool
    at_import: bool  # executed when the module is imported, not when a function is called

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports_of(source: str, text: str, known: frozenset[str]) -> Iterator[Import]:
    """Every import of the package's own modules in ``text``, wherever it stands."""

    def visit(node: ast.AST, runtime: bool, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "nostalgia"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}, line {node.lineno}: a relative import"
            module = node.module or ""
            within = module.split(".")[0] == "nostalgia"
            # `from nostalgia.models import heads` means the module heads where there is one.
            full = [f"{module}.{alias.name}" for alias in node.names]
            targets = [name if name in known else module for name in full] if within else []
        else:
            targets = []
        for target in dict.fromkeys(targets):
            yield Import(source, target, node.lineno, runtime, at_import)  # type: ignore[attr-defined]
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runtime and not guarded, at_import and not function)

    yield from visit(ast.parse(text), True, True)


def level(module: str) -> int:
    """Height of a module; an unknown package counts as the top's, and a test asks for its place."""
    parts = module.split(".")
    return LEVEL.get(parts[1], TOP) if len(parts) > 1 else TOP


def descends(found: Import) -> bool:
    """Whether an import breaks the order: to a higher tier, or to a neighbour of the same one."""
    if level(found.source) == TOP or found.target == "nostalgia":  # the package's own version and names
        return False
    return package(found.source) != package(found.target) and level(found.target) >= level(found.source)


def knows_configuration(module: str) -> bool:
    """Who may import nostalgia.config: itself and what stands at the top, never a package of values."""
    return level(module) == TOP or package(module) == "config"


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.fixture(scope="module")
def found() -> list[Import]:
    named = modules()
    known = frozenset(named)
    return [one for name, path in named.items() for one in imports_of(name, path.read_text(), known)]


def test_every_package_has_a_place() -> None:
    """A new package is to be put into TIERS; only `experiment` and commands (`scripts`) stand above in a folder."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - set(LEVEL) <= {"experiment", "scripts"}


def test_imports_climb(found: list[Import]) -> None:
    assert len(found) > 100  # the walk found the package
    assert [str(one) for one in found if descends(one)] == []


def test_only_the_top_knows_the_configuration(found: list[Import]) -> None:
    to_config = [one for one in found if package(one.target) == "config"]
    assert [str(one) for one in to_config if not knows_configuration(one.source)] == []


def test_no_file_imports_more_than_fifteen(found: list[Import]) -> None:
    """Of the package's own modules, those for type checkers counted as well."""
    targets: dict[str, set[str]] = {}
    for one in found:
        targets.setdefault(one.source, set()).add(one.target)
    assert {source: len(known) for source, known in targets.items() if len(known) > 15} == {}


def test_no_cycles(found: list[Import]) -> None:
    """Modules import each other, when they are imported, in one direction only."""
    edges: dict[str, set[str]] = {}
    for one in found:
        if one.runtime and one.at_import and one.target != one.source:
            edges.setdefault(one.source, set()).add(one.target)
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        for target in sorted(edges.get(module, ())):
            walk(target, [*path, module])
        finished.add(module)

    for module in sorted(edges):
        walk(module, [])


@pytest.mark.parametrize(
    ("source", "line", "bad"),
    [
        ("nostalgia.linalg.lanczos", "from nostalgia.curvature.operators import HessianOperator", True),
        ("nostalgia.data.stream", "from nostalgia.models import heads", True),
        ("nostalgia.training.loop", "def f():\n    import nostalgia.evaluation.accuracy", True),
        ("nostalgia.methods.base", "if TYPE_CHECKING:\n    from nostalgia.training.loop import Phase", True),
        ("nostalgia.utils.files", "from nostalgia.experiment import run", True),
        ("nostalgia.training.loop", "from nostalgia.methods.base import Method", False),
        ("nostalgia.training.loop", "from nostalgia.training.step import train_step", False),
        ("nostalgia.experiment.components", "from nostalgia.config import save", False),
    ],
)
def test_the_order_is_seen(source: str, line: str, bad: bool) -> None:
    (one,) = imports_of(source, line, frozenset())
    assert descends(one) is bad


def test_help_does_not_wait_for_torch() -> None:
    """Refusing a wrong word takes the configuration only."""
    assert not loaded(["--help"]) & {*HEAVY, "nostalgia.experiment"}
    assert not loaded(["train.epochz=3"]) & {*HEAVY, "nostalgia.experiment"}


def test_a_dry_run_does_not_wait_for_what_draws_tracks_and_downloads() -> None:
    found = loaded(["dataset=digits", "model=vit_tiny", "--dry-run", "--quiet"])
    assert "torch" in found
    assert not found & {"matplotlib", "wandb", "datasets", "nostalgia.analysis.drawing"}


HEAVY = frozenset({"torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "matplotlib", "wandb"}) | {
    "sklearn", "scipy", "pandas", "tensorboard", "numpy", "jinja2",
}  # fmt: skip


def loaded(words: list[str]) -> set[str]:
    """The modules that ``nostalgia.train`` imports for ``words``."""
    program = (
        "import os, sys; from nostalgia.train import main; os._exit = sys.exit\n"
        f"try: main({words!r})\n"
        "finally: print('\\nmodules', *sys.modules, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split()[1:])
