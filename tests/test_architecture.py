"""The floors of the package: a room imports only from lower floors, in no circle, and loads no more than it needs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import make_engine, make_tokenizer, tiny_encoder

import geep._version

PACKAGE = Path(geep._version.__file__).parent

FLOORS = {
    "compiled": 0,
    "modeling": 1,
    "hash_table": 1,
    "scheduler": 1,
    "exits": 1,
    "promise": 1,
    "data": 1,
    "folder": 1,
    "progress": 1,
    "training": 2,
    "predictor": 2,
    "backends": 2,
    "scoring": 2,
    "engine": 3,
    "calibration": 4,
    "distilling": 4,
    "serving": 4,
    "export": 4,
    "evaluation": 5,
    "acceleration": 5,
    "cli": 6,
}
NO_ROOMS = {"utils", "helpers", "common", "config"}

# A thin coat over the public API, like any user's program.
USERS = {"cli"}

# Rooms whose `__init__.py` is more than a list of names.
EAGER = {
    "modeling": "tells Hugging Face's auto classes the model's name, which must happen at import",
    "cli": "is the program that `geep.cli:app` names; no room imports from it",
}

# Slow to import and of no use to who loads an engine and predicts.
HEAVY: dict[str, dict[str, str]] = {
    "sklearn": {
        "geep.exits.fitting": "logistic regression of agreement scores",
        "geep.predictor.fitting": "ridge regression of key rows, isotonic regression of levels",
    },
    "scipy": {
        "geep.predictor.features": "sparse matrices of keys",
        "geep.predictor.linear": "L-BFGS for logistic regression of key rows",
        "geep.predictor.fitting": "sparse matrices of keys",
        "geep.promise.bounds": "exact binomial bounds",
        "geep.promise.drift": "two tests of whether texts are alike",
        "geep.calibration.profiling": "Spearman's rank correlation",
    },
    "matplotlib": {"geep.evaluation.report": "the figure, imported by the function that draws"},
}
DRAWN_INSIDE = {"matplotlib"}

MOST_LINES = 450


def room_of(module: str) -> str | None:
    """The room of a dotted module of the package; None for the package itself and its version."""
    room = module.split(".")[1] if "." in module else None
    return None if room == "_version" else room


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {module_name(path): path.read_text("utf-8") for path in FILES}
STUBS = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("__init__.pyi"))}
every_file = pytest.mark.parametrize("name", sorted(SOURCES))
every_stub = pytest.mark.parametrize("name", sorted(STUBS))


# Floors


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
            if room not in USERS:
                found.append(f"{where}; rooms import rooms, not the package")
        elif (other := room_of(imported)) not in (None, room) and FLOORS.get(str(other), 99) >= FLOORS[room]:
            found.append(f"{where}; floor {FLOORS[room]} imports only from lower floors")
    return found


@every_file
def test_module_imports_only_from_lower_floors(name: str) -> None:
    assert breaches(name, SOURCES[name]) == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {room for name in SOURCES if (room := room_of(name)) is not None}
    assert rooms <= FLOORS.keys()
    assert not rooms & NO_ROOMS


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("geep.data", "from geep.engine import Engine", "lower floors"),
        ("geep.data", "from geep.modeling import GeepConfig", "lower floors"),
        ("geep.data", "def read():\n    import geep.cli", "lower floors"),
        ("geep.engine.run", "if TYPE_CHECKING:\n    from geep import calibration", "lower floors"),
        ("geep.scoring.stream", "from geep.engine import Engine", "lower floors"),
        ("geep.engine.run", "from .tokens import tokenize", "absolute"),
        ("geep.engine", "from . import predictor", "absolute"),
        ("geep.engine", "import geep", "not the package"),
        ("geep.evaluation.race", "import geep", "not the package"),
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
        ("geep.cli.use", "import geep\nfrom geep import progress"),
    ],
)
def test_a_lawful_import_passes(name: str, text: str) -> None:
    assert breaches(name, text) == []


# Circles


def handed_on(stub: str) -> list[tuple[str, str]]:
    """Names that an `__init__.pyi` hands on, and the file beside it that each is from."""
    pairs = []
    for node in ast.parse(stub).body:
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        assert node.level == 1
        pairs += [(alias.asname or "", f".{node.module}") for alias in node.names]
    return pairs


def edges(sources: Mapping[str, str], stubs: Mapping[str, str]) -> dict[str, set[str]]:
    """Files that each file imports; a name handed on by a room leads to the file that has it."""
    homes = {room: {name: room + file for name, file in handed_on(stub)} for room, stub in stubs.items()}

    def homes_of(node: ast.ImportFrom) -> Iterator[str]:
        source = node.module or ""
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield inner if inner in sources else homes.get(source, {}).get(alias.name, source)

    found: dict[str, set[str]] = {}
    for name, text in sources.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets |= set(homes_of(node))
        # The package looks its names up when they are asked for, and names none itself.
        found[name] = {target for target in targets if target in sources and target != PACKAGE.name}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, its first file again at its end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def between_rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same from room to room."""
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        if (room := room_of(name)) is not None:
            found = {other for each in others if (other := room_of(each)) not in (None, room)}
            rooms.setdefault(room, set()).update(found)  # type: ignore[arg-type]
    return rooms


def test_files_import_each_other_in_no_circle() -> None:
    assert circle(edges(SOURCES, STUBS)) == []


def test_rooms_import_each_other_in_no_circle() -> None:
    assert circle(between_rooms(edges(SOURCES, STUBS))) == []


def test_names_handed_on_lead_to_their_files() -> None:
    graph = edges(SOURCES, STUBS)
    assert "geep.exits.criteria" in graph["geep.engine.settings"]
    assert "geep.hash_table.cpu" in graph["geep.hash_table.triton"]
    assert "geep.modeling.model" in graph["geep.modeling"]
    assert graph["geep.predictor"] == set()


STUB = {"geep.data": "from .two import Two as Two"}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            {"geep.data.one": "from geep.data.two import Two", "geep.data.two": "from geep.data.one import One"},
            ["geep.data.one", "geep.data.two", "geep.data.one"],
        ),
        # Through the list of the room's names, for type checkers and in a function.
        (
            {
                "geep.data.one": "if TYPE_CHECKING:\n    from geep.data import Two",
                "geep.data.two": "import geep.data.one",
            },
            ["geep.data.one", "geep.data.two", "geep.data.one"],
        ),
        (
            {
                "geep.data.one": "from geep.data import two",
                "geep.data.two": "def f():\n    from geep.data.one import One",
            },
            ["geep.data.one", "geep.data.two", "geep.data.one"],
        ),
        ({"geep.data.two": "from geep.data import Two"}, ["geep.data.two", "geep.data.two"]),
        ({"geep.data.one": "from geep.data import Two", "geep.data.two": "import torch"}, []),
    ],
)
def test_a_circle_is_found(sources: dict[str, str], expected: list[str]) -> None:
    assert circle(edges({"geep.data": "", **sources}, STUB)) == expected


def test_a_circle_of_rooms_is_found() -> None:
    graph = between_rooms({"geep.a.x": {"geep.b.x"}, "geep.b.y": {"geep.c"}, "geep.c": {"geep.a.z"}, "geep.a.z": set()})
    assert circle(graph) == ["a", "b", "c", "a"]
    assert circle(between_rooms({"geep.a.x": {"geep.b.x", "geep.a.y"}, "geep.b.y": {"geep.c"}})) == []


# What is slow to import


def heavy_imports(name: str, text: str) -> list[str]:
    """Imports of a file that belong elsewhere, or into a function."""
    tree, found = ast.parse(text), []
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for _, imported in imports(node):
            package = imported.split(".")[0]
            if package in HEAVY and name not in HEAVY[package]:
                found.append(f"{name}, line {node.lineno}: {package} is for {sorted(HEAVY[package])}")
            elif package in DRAWN_INSIDE and id(node) not in inside:
                found.append(f"{name}, line {node.lineno}: {package} is imported by the function that draws")
    return found


@every_file
def test_slow_imports_stay_where_they_are_needed(name: str) -> None:
    assert heavy_imports(name, SOURCES[name]) == []


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, rows in HEAVY.items() for name in rows])
def test_every_reason_for_a_slow_import_still_holds(package: str, name: str) -> None:
    assert package in {imported.split(".")[0] for _, imported in imports(ast.parse(SOURCES[name]))}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("geep.scheduler", "from scipy.optimize import nnls", "scipy is for"),
        ("geep.exits.profile", "def fit():\n    import sklearn.linear_model", "sklearn is for"),
        ("geep.engine.run", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure", "matplotlib is for"),
        ("geep.evaluation.report", "from matplotlib.figure import Figure", "the function that draws"),
    ],
)
def test_a_slow_import_is_found(name: str, text: str, reason: str) -> None:
    (breach,) = heavy_imports(name, text)
    assert reason in breach


# Sizes


def too_long(name: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    return [f"{name} has {lines} lines, expected at most {MOST_LINES}; divide it"] if lines > MOST_LINES else []


@every_file
def test_no_file_is_long(name: str) -> None:
    assert too_long(name, SOURCES[name]) == []


def test_a_long_file_is_found() -> None:
    assert too_long("geep.data", "pass\n" * MOST_LINES) == []
    assert "has 451 lines" in too_long("geep.data", "pass\n" * (MOST_LINES + 1))[0]


# Names of rooms


LAZY = """
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
"""


def more_than_a_list(text: str) -> list[str]:
    """Statements of a room's `__init__.py` beside its docstring and the three that look its names up."""
    expected = {ast.dump(node) for node in ast.parse(LAZY).body}
    body = ast.parse(text).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    found = [ast.unparse(node) for node in body if ast.dump(node) not in expected]
    return found + [f"missing: {len(expected)} lines"] * (not expected <= {ast.dump(node) for node in body})


def listed_twice(stub: str) -> list[str]:
    names = [name for name, _ in handed_on(stub)]
    return sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("name", [module_name(path) for path in FILES if path.name == "__init__.py"])
def test_a_room_is_a_list_of_names(name: str) -> None:
    room = room_of(name)
    if room in EAGER:
        assert name not in STUBS
        assert more_than_a_list(SOURCES[name])
    elif room is not None:
        assert more_than_a_list(SOURCES[name]) == []
        assert name in STUBS


@every_stub
def test_every_name_that_is_handed_on_exists_and_is_listed_once(name: str) -> None:
    stub, module = STUBS[name], importlib.import_module(name)
    assert listed_twice(stub) == []
    for public, file in handed_on(stub):
        assert hasattr(module, public), f"{name} hands on {public}, which {name}{file} does not have"
        if name != PACKAGE.name:
            assert getattr(module, public) is getattr(importlib.import_module(name + file), public)
    assert {public for public, _ in handed_on(stub)} <= set(module.__all__)


def test_more_than_a_list_is_found() -> None:
    assert more_than_a_list('"""Room."""\n' + LAZY) == []
    assert more_than_a_list(LAZY + "SPEED = 3\n") == ["SPEED = 3"]
    assert more_than_a_list(LAZY + "from geep.data.rows import Row\n") == ["from geep.data.rows import Row"]
    assert more_than_a_list('"""Room."""\nimport lazy_loader\n') == ["missing: 2 lines"]


def test_a_name_listed_twice_is_found() -> None:
    assert listed_twice("from .one import One as One\nfrom .two import (\n    Two as Two,\n    One as One,\n)") == [
        "One"
    ]
    with pytest.raises(AssertionError):
        handed_on("ONE: int")


def test_a_name_that_is_not_there_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "hut"
    room.mkdir()
    (room / "__init__.py").write_text(LAZY, encoding="utf-8")
    (room / "__init__.pyi").write_text("from .one import One as One\nfrom .one import Two as Two\n", encoding="utf-8")
    (room / "one.py").write_text("One = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("hut")
    assert [hasattr(module, name) for name, _ in handed_on((room / "__init__.pyi").read_text("utf-8"))] == [True, False]


# What is loaded


def loaded(code: str) -> set[str]:
    """Modules that a process of its own has loaded after some code."""
    code = f"import json, sys\n{code}\nsys.stdout.write('\\n' + json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_the_package_alone_loads_neither_torch_nor_transformers() -> None:
    found = loaded("import geep\ngeep.__version__, dir(geep)")
    assert "geep" in found
    assert not found & {"torch", "transformers", "numpy", "huggingface_hub", "geep.engine", "geep.modeling"}


def test_an_engine_that_predicts_loads_no_more_than_it_needs(tmp_path: Path) -> None:
    """Beside what Hugging Face's BERT of the same size loads.

    transformers itself loads SciPy and accelerate (until 5.20 scikit-learn and pyarrow, too) where they are installed,
    as soon as it loads a model; that is neither geep's choice nor held against it.
    """
    make_engine().save_pretrained(tmp_path / "engine")
    tiny_encoder("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    plain = loaded(
        f"""
import torch, transformers
place = {str(tmp_path / "bert")!r}
model, tokenizer = (kind.from_pretrained(place) for kind in (transformers.AutoModel, transformers.AutoTokenizer))
model(**tokenizer(["w1 w2"], return_tensors="pt"))
"""
    )
    ours = loaded(
        f"""
import geep
engine = geep.Engine.from_pretrained({str(tmp_path / "engine")!r}, device="cpu")
(answer,) = engine.predict(["w1 w2"])
assert answer.label.startswith("LABEL_")
"""
    )
    assert "geep.engine.engine" in ours
    left_out = {"sklearn", "scipy", "matplotlib", "pyarrow", "accelerate", "transformers.trainer", "pandas", "datasets"}
    assert not (ours - plain) & left_out
    assert not ours & {"matplotlib", "transformers.trainer"}
    rooms = {room_of(name) for name in ours if name.split(".")[0] == PACKAGE.name}
    assert not rooms & {"training", "calibration", "evaluation", "data", "scoring", "cli"}
    assert not {name for name in ours if name.startswith("geep.") and name.endswith(".fitting")}
    # Nothing of others comes with geep but what looks its names up.
    others = {name.split(".")[0] for name in ours - plain} - {name.split(".")[0] for name in plain}
    assert others - sys.stdlib_module_names - {"geep"} <= {"lazy_loader"}
