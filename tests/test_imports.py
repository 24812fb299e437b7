"""The structure of the code: imports point downwards, nothing imports in a circle, folders and modules stay small."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_MODULES = 24
MOST_LINES = 400
MOST_FLOORS = 10
FLOORS = [
    "llmcache.cli",
    "llmcache.bench",
    "llmcache llmcache.demo",
    "llmcache.verification",
    "llmcache.pipeline llmcache.distributed llmcache.integrations",
    "llmcache.cache",
    "llmcache.calls",
    "llmcache.planning llmcache.opening",
    "llmcache.concurrency",
    "llmcache.encoding",
    "llmcache.layers llmcache.report",
    "llmcache.decoders",
    "llmcache.near",
    "llmcache.banks",
    "llmcache.model",
    "llmcache.config llmcache.records llmcache.snapshot llmcache.private_files",
    "llmcache.document llmcache.units llmcache.arrays",
    "llmcache.errors",
    "llmcache.indexes.maintenance",
    "llmcache.indexes.store",
    "llmcache.indexes.eviction",
    "llmcache.indexes.commits",
    "llmcache.indexes.bank",
    "llmcache.indexes.search llmcache.indexes.stats",
    "llmcache.indexes.format",
    "llmcache.indexes.files",
    "llmcache.indexes.errors",
    "llmcache.indexes.urls",
]
"""Packages and modules from the top of the project to its ground. A line may import those below it, and itself."""
NEAR = ["", ".matcher", ".calibration", ".neighbors", ".monitoring", ".marks", ".guard"]
"""The same inside `llmcache.near`, whose other modules belong to the first line."""
TYPES = r"(NDArray|Callable|Sequence|Mapping|tuple|list|dict|Literal|Annotated|Union)\["
"""Beginning of the value of a type alias."""


def source_files() -> Iterator[Path]:
    for top in ("llmcache", "indexes", "cli"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if not any(above.is_symlink() for above in path.parents):
                yield path


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "llmcache" else ["llmcache", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, dict[str, bool]]:
    """Modules of the project that each module imports, and whether it does so when it is itself imported.

    Imports for type checkers alone are left out.
    """
    paths = {module_name(path): path for path in source_files()}
    found: dict[str, dict[str, bool]] = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)]
        left_out = {id(inner) for node in for_types for statement in node.body for inner in ast.walk(statement)}
        at_once = {id(node) for node in tree.body}
        found[name] = {}
        for node in ast.walk(tree):
            if id(node) in left_out:
                continue
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in paths else str(node.module) for one in names]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            for target in targets:
                if target in paths and target != name:
                    found[name][target] = found[name].get(target, False) or id(node) in at_once
    return found


def floor(name: str, floors: list[str]) -> tuple[int, str]:
    """Number of the line that a module belongs to, from the top, and the entry of that line."""
    matching = [
        (len(entry), number, entry)
        for number, line in enumerate(floors)
        for entry in line.split()
        if name == entry or (name.startswith(f"{entry}.") and entry != "llmcache")
    ]
    assert matching, f"{name} has no place in the order of imports (FLOORS)"
    _, number, entry = max(matching)
    return number, entry


def upward(floors: list[str], inside: str = "llmcache") -> list[str]:
    """Imports that go up, or aside into another entry of the same line."""
    faults = []
    for name, targets in imports().items():
        for target in targets:
            if not (name.startswith(inside) and target.startswith(inside)):
                continue
            (mine, me), (theirs, they) = floor(name, floors), floor(target, floors)
            if theirs < mine or (theirs == mine and me != they):
                faults.append(f"{name} imports {target}")
    return faults


def test_imports_point_downwards() -> None:
    assert not upward(FLOORS)


def test_imports_inside_near_reuse_point_downwards() -> None:
    assert not upward([f"llmcache.near{name}" for name in NEAR], "llmcache.near")


def test_no_module_imports_itself_through_others() -> None:
    left = {name: {one for one, at_once in targets.items() if at_once} for name, targets in imports().items()}
    while done := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in done:
            del left[name]
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_chains_of_packages_are_short() -> None:
    """The longest chain of packages, the folders of `llmcache`, of which each imports the next one."""
    folders = {path.name for path in (ROOT / "llmcache").iterdir() if path.is_dir()}

    def package(name: str) -> str:
        return [*name.split("."), ""][1]

    targets: dict[str, set[str]] = {}
    for name, found in imports().items():
        targets.setdefault(package(name), set()).update(package(target) for target, at_once in found.items() if at_once)

    @cache
    def longest(name: str) -> tuple[str, ...]:
        chains = [longest(target) for target in sorted(targets.get(name, set()) - {name, ""})]
        following = max(chains, key=len, default=())
        return (name, *following) if name in folders else following

    chain = max(map(longest, sorted(folders)), key=len)
    assert len(chain) <= MOST_FLOORS, f"a chain of {len(chain)} packages: {' > '.join(chain)}"


def test_no_folder_has_more_modules_than_one_can_take_in() -> None:
    modules = Counter(path.parent for path in source_files() if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in modules.items() if count > MOST_MODULES}


@pytest.mark.parametrize("path", [pytest.param(path, id=module_name(path)) for path in source_files()])
def test_no_module_is_longer_than_one_can_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").split("\n")) - 1 <= MOST_LINES


def test_no_class_or_type_has_the_name_of_two_others() -> None:
    modules: dict[str, list[str]] = {}
    for path in source_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(module_name(path))
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
                modules.setdefault(ast.unparse(node.target), []).append(module_name(path))
            elif isinstance(node, ast.Assign) and re.match(TYPES, ast.unparse(node.value)):
                modules.setdefault(ast.unparse(node.targets[0]), []).append(module_name(path))
    assert not {name: where for name, where in modules.items() if len(where) > 2}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_the_pages_name_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", text))
    tops = ["", "llmcache/", "llmcache/near/"]
    known = ("llmcache/", "indexes/", "cli/", "tests/", *(f"{path.name}/" for path in (ROOT / "llmcache").iterdir()))
    missing = [
        name
        for name in named
        if name.startswith(known)
        and not any((ROOT / f"{top}{name}{end}").exists() for top in tops for end in ("", ".py"))
    ]
    assert not missing, f"{page} names files that do not exist"
