"""The floors of the package: a room imports only from lower floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import geep._version

PACKAGE = Path(geep._version.__file__).parent

FLOORS = {
    "modeling": 1,
    "hash_table": 1,
    "scheduler": 1,
    "data": 1,
    "training": 2,
    "exits": 2,
    "predictor": 2,
    "backends": 2,
    "engine": 3,
    "calibration": 4,
    "scoring": 4,
    "serving": 4,
    "evaluation": 5,
    "cli": 6,
}
NO_ROOMS = {"utils", "helpers", "common", "config"}


def room_of(module: str) -> str | None:
    """The room of a dotted module of the package; None for the package itself and its version."""
    room = module.split(".")[1] if "." in module else None
    return None if room == "_version" else room


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, wherever in the file; a relative import as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                # `from geep import data` names a room just as `from geep.data import Row` does.
                yield node.lineno, f"{source}.{alias.name}" if source == PACKAGE.name else source


def breaches(name: str, text: str) -> list[str]:
    """What a module of the package imports and must not."""
    room = room_of(name)
    found = []
    for line, imported in imports(ast.parse(text)):
        where = f"{name}, line {line}: imports {imported}"
        if imported.startswith("."):
            found.append(f"{where}; absolute imports only")
        elif imported.split(".")[0] != PACKAGE.name or name == PACKAGE.name:
            continue
        elif room is None:
            found.append(f"{where}; _version imports nothing of the package")
        elif imported == PACKAGE.name:
            found.append(f"{where}; rooms import rooms, not the package")
        elif (other := room_of(imported)) not in (None, room) and FLOORS.get(str(other), 99) >= FLOORS[room]:
            found.append(f"{where}; floor {FLOORS[room]} imports only from lower floors")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_module_imports_only_from_lower_floors(path: Path) -> None:
    assert breaches(module_name(path), path.read_text("utf-8")) == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {room for path in FILES if (room := room_of(module_name(path))) is not None}
    assert rooms <= FLOORS.keys()
    assert not rooms & NO_ROOMS


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("geep.data", "from geep.engine import Engine", "lower floors"),
        ("geep.data", "from geep.modeling import GeepConfig", "lower floors"),
        ("geep.data", "def read():\n    import geep.cli", "lower floors"),
        ("geep.engine", "if TYPE_CHECKING:\n    from geep import scoring", "lower floors"),
        ("geep.engine", "from .predictor import ExitTable", "absolute"),
        ("geep.engine", "from . import predictor", "absolute"),
        ("geep.engine", "import geep", "not the package"),
        ("geep.engine", "from geep.nowhere import thing", "lower floors"),
        ("geep._version", "from geep import data", "nothing"),
    ],
)
def test_a_breach_is_found(name: str, text: str, reason: str) -> None:
    (breach,) = breaches(name, text)
    assert reason in breach


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("geep", "from geep.engine import Engine"),
        ("geep.engine", "from geep.predictor import ExitPredictor\nfrom geep import _version\nimport torch"),
        ("geep.data", "from geep._version import __version__"),
        ("geep.backends.packed", "from geep.backends.kernels import attend"),
    ],
)
def test_a_lawful_import_passes(name: str, text: str) -> None:
    assert breaches(name, text) == []
