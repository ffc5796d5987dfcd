"""Examples run, and what the documents show compiles, names things that exist and, in docs/api.md, runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import geep
from geep.acceleration import training
from geep.calibration import Route
from geep.promise import Promise

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "api.md"]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    if path.exists()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S), start=1)
]
TOPICS = {"earn": ("profit", "net", "cts"), "crude": ("oil", "barrels", "opec"), "grain": ("wheat", "tonnes", "corn")}
FILLERS = tuple(f"w{number}" for number in range(40))


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Draw texts of which one word tells the topic."""
    random = np.random.default_rng(seed)
    out = []
    for label in random.choice(list(TOPICS), count).tolist():
        words = random.choice(FILLERS, random.integers(2, 9)).tolist()
        words.insert(int(random.integers(0, len(words) + 1)), str(random.choice(TOPICS[label])))
        out.append({"text": " ".join(words), "label": label})
    return out


def write(path: Path, count: int, *, seed: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed=seed)), "utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tiny BERT with random weights and its tokenizer, as any encoder folder is."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = (*special, *(word for words in TOPICS.values() for word in words), *FILLERS)
    tokens = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_compiles_and_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    assert missing(tree) == []


@pytest.mark.parametrize(
    ("promise", "said"),
    [
        ("0.3", "speed"),
        ("0.01", f"at least {Route.all_to(Promise(max_accuracy_drop=0.01))[0].each.texts_needed} are needed"),
    ],
    ids=["promise", "too-few-texts"],
)
def test_quickstart_leaves_a_model_that_predicts(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], promise: str, said: str
) -> None:
    data, output = write(tmp_path / "news.jsonl", 60, seed=1), tmp_path / "model"
    load(ROOT / "examples" / "quickstart.py").main(
        ["--data", str(data), "--encoder", encoder, "--output", str(output), "--max-accuracy-drop", promise]
    )
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.count("of 4 layers") == 8
    found = {file.name for file in output.iterdir()}
    assert {"config.json", "model.safetensors", "calibration.json"} <= found
    assert sum(name.startswith("exit_table-") for name in found) == 1
    assert "checkpoints" not in found


# --------------------------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------------------------


def missing(tree: ast.AST) -> list[str]:
    """Modules and names that a piece of code imports and that do not exist."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if importlib.util.find_spec(alias.name) is None]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    return found


def test_a_missing_name_is_found() -> None:
    assert missing(ast.parse("from geep import Engine, Nothing\nimport json")) == ["geep.Nothing"]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_compiles_and_imports_what_exists(block: str) -> None:
    assert missing(ast.parse(block)) == []


# Half a fifth of the rows has to be enough for the README's promise of one point.
TOY_ROWS = 4800


@pytest.fixture
def toy_world(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which the data set and the encoder that documents fetch are toys that lie on disk."""
    data = tmp_path / "news"
    data.mkdir()
    write(data / "train.jsonl", TOY_ROWS, seed=2)
    write(data / "test.jsonl", 40, seed=3)
    write(tmp_path / "news.jsonl", 30, seed=4)
    real = geep.load_dataset

    def toy_dataset(name: str, **arguments: Any) -> geep.Dataset:
        return real(data, **arguments)

    monkeypatch.setattr(geep, "load_dataset", toy_dataset)
    monkeypatch.setattr(geep, "fetch_encoder", lambda name: encoder)
    monkeypatch.setattr(training, "fetch_encoder", lambda name, **options: encoder)
    monkeypatch.chdir(tmp_path)


def execute(blocks: list[Any], where: str) -> None:
    names: dict[str, Any] = {"__name__": "document", "texts": ["oil rose", "wheat fell"]}
    for number, block in enumerate(blocks, start=1):
        exec(compile(str(block), f"{where}, block {number}", "exec"), names)


@pytest.mark.parametrize("document", ["api.md", "README.md"])
def test_document_runs_from_top_to_bottom(document: str, toy_world: None, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block.values[0] for block in BLOCKS if str(block.id).startswith(document)]
    assert blocks
    execute(blocks, document)
    assert "Traceback" not in capsys.readouterr().err
