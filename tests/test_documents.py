"""Documents tell what is there: every option, every public name, and no other."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import geep
from geep.backends import BACKENDS
from geep.cli import app
from geep.cli.options import NAMES
from geep.data import ENCODERS
from geep.engine import DTYPES
from geep.exits import AGREEMENT, CRITERIA
from geep.modeling import HEADS, GeepConfig
from geep.predictor import PREDICTORS
from geep.training import RECIPES

ROOT = Path(__file__).parent.parent
CLI, API = ((ROOT / "docs" / name).read_text("utf-8") for name in ("cli.md", "api.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]


def options(command: Any) -> Iterator[Any]:
    return (parameter for parameter in command.params if parameter.param_type_name == "option")


def flags(parameter: Any) -> set[str]:
    return {*parameter.opts, *parameter.secondary_opts}


def section(name: str) -> str:
    """What docs/cli.md says of a command, with what it says of all of them."""
    shared, *parts = re.split(r"^## geep ", CLI, flags=re.MULTILINE)
    (own,) = (part for part in parts if part.startswith(f"{name}\n"))
    return shared + own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    text = section(name)
    missing = [flag for option in options(COMMANDS[name]) for flag in flags(option) if f"`{flag}" not in text]
    assert [flag for flag in missing if flag != "--help"] == []


def test_every_documented_option_exists() -> None:
    known = {flag for command in COMMANDS.values() for option in options(command) for flag in flags(option)}
    known |= {"--version", "--install-completion", "--show-completion", "--help"}
    assert set(re.findall(r"`(--?[a-z][a-z0-9-]*)", CLI)) - known == set()


def test_commands_of_code_blocks_exist() -> None:
    for path in DOCUMENTS:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL))
        for command, rest in re.findall(r"^geep +(\w+)(.*)$", blocks, flags=re.MULTILINE):
            known = {flag for option in options(COMMANDS[command]) for flag in flags(option)}
            assert set(re.findall(r"(?<= )--?[a-z][a-z0-9-]*", rest)) <= known, f"{path.name}: geep {command}{rest}"


def test_an_option_is_the_same_in_every_command() -> None:
    """One meaning for each: the same kind, the same words of help and the same default, wherever it is offered."""
    own = {"--output", "--text", "--criterion", "--text-column", "--text-pair-column", "--label-column", "--max-texts"}
    own |= {"--head", "--max-length", "--texts"}
    seen: dict[str, tuple[Any, ...]] = {}
    for name, command in COMMANDS.items():
        for option in options(command):
            flag = option.opts[0]
            said = (option.help, option.is_flag, option.default)
            if flag not in own:
                assert seen.setdefault(flag, said) == said, f"geep {name} {flag}"


def test_help_names_the_rows_that_there_are() -> None:
    tables = {
        "ENCODERS": ENCODERS,
        "RECIPES": RECIPES,
        "HEADS": HEADS,
        "PREDICTORS": PREDICTORS,
        "CRITERIA": CRITERIA,
        "BACKENDS": BACKENDS,
        "DTYPES": DTYPES,
    }
    assert {name: tuple(rows) for name, rows in tables.items()} == NAMES


def test_defaults_of_the_command_line_are_those_of_python() -> None:
    def default(command: str, name: str) -> Any:
        return next(parameter.default for parameter in COMMANDS[command].params if parameter.name == name)

    def argument(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    plan = geep.DataPlan("x")
    assert default("train", "model") == argument(geep.train, "encoder")
    assert default("train", "head") == argument(geep.train, "head") == GeepConfig.exit_head
    assert default("train", "holdout") == plan.holdout == argument(geep.divide, "fraction")
    assert default("train", "confidence") == geep.Promise(min_agreement=0.9).confidence
    for name in ("text_column", "text_pair_column", "label_column"):
        assert default("train", name) == getattr(plan, name)
    assert default("accelerate", "head") == argument(geep.accelerate, "head")
    assert default("accelerate", "confidence") == argument(geep.accelerate, "promise").confidence
    assert default("profile", "criterion") == argument(geep.profile, "criterion") == AGREEMENT
    assert default("calibrate", "on_miss") == argument(geep.calibrate, "on_miss")
    assert default("evaluate", "max_texts") == argument(geep.evaluate, "max_texts")
    assert default("evaluate", "rounds") == argument(geep.evaluate, "rounds")
    assert default("predict", "chunk_rows") == argument(geep.score_file, "chunk_rows")
    assert default("predict", "threshold") == argument(geep.Engine.predict, "threshold")


def test_every_public_name_exists_and_stands_in_the_table_of_names() -> None:
    table = API.split("## All names")[1]
    listed = re.findall(r"`(\w+)`", table.split("|---|---|")[1])
    assert sorted(listed) == sorted(geep.__all__)
    for name in listed:
        found = getattr(geep, name)
        assert inspect.getdoc(found) or name in ("RECIPES", "__version__"), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_dotted_names_in_documents_resolve(path: Path) -> None:
    for dotted in re.findall(r"\bgeep(?:\.[A-Za-z_]\w*)+", path.read_text("utf-8")):
        resolve(dotted)


def resolve(dotted: str) -> object:
    found: Any = geep
    for depth, name in enumerate(dotted.split(".")[1:], start=1):
        if not hasattr(found, name):
            found = importlib.import_module(".".join(dotted.split(".")[: depth + 1]))
        else:
            found = getattr(found, name)
    return found


def test_files_named_in_documents_exist() -> None:
    named = re.compile(r"`((?:geep|tests|benchmarks|docs|examples)/[\w/.-]+\.(?:pyi?|md|jsonl))`")
    for path in DOCUMENTS:
        for name in named.findall(path.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *PAGES], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        address, _, anchor = link.partition("#")
        if address.startswith("http"):
            continue
        target = (path.parent / address).resolve() if address else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            text = re.sub(r"^```.*?^```", "", target.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{path.name} links to {link}"


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda words: " ".join(words) or "geep")
def test_help_loads_neither_torch_nor_transformers(command: tuple[str, ...]) -> None:
    code = f"""
import sys
from geep.cli import app
try:
    app({[*command, "--help"]!r})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib", "pyarrow"}} & set(sys.modules)
sys.exit(f"loaded {{sorted(heavy)}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
