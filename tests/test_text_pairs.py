"""A model of pairs and a model of single texts each refuse the other's texts, wherever these come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model, make_tokenizer, tiny_encoder, toy_task
from test_cli import run

from geep.acceleration import train
from geep.data import DataPlan, Parts, Split
from geep.engine import Engine, EngineConfig
from geep.modeling import GeepConfig
from geep.scoring import score_file
from geep.training import TrainSettings

PAIRED = ("w1 w2", "w3")


def engine_of(*, pairs: bool | None) -> Engine:
    model = make_model()
    model.config.text_pairs = pairs
    return Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("pairs", "texts", "message"),
    [
        (
            True,
            [PAIRED, "w1", "w2"],
            "Text 1 is a single text; the model was trained on pairs: give (text, second text)",
        ),
        (False, ["w1", "", PAIRED], "Text 2 is a pair of texts; the model was trained on single texts: leave"),
    ],
)
def test_texts_of_the_other_kind_are_refused_and_the_first_is_named(
    pairs: bool, texts: list[Any], message: str
) -> None:
    engine = engine_of(pairs=pairs)
    calls: list[Any] = [
        engine.predict,
        engine.predict_columns,
        engine.tokenize,
        lambda found: list(engine.predict_stream(found)),
        lambda found: list(engine.predict_stream(iter(found))),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(texts)


def test_texts_of_the_models_kind_are_answered_and_of_an_older_model_all() -> None:
    assert len(engine_of(pairs=True).predict([PAIRED, ("w1", "")])) == 2
    assert len(engine_of(pairs=False).predict(["w1", ""])) == 2
    assert len(engine_of(pairs=None).predict(["w1", PAIRED])) == 2
    assert GeepConfig().text_pairs is None


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_single_rows_of_the_other_kind_are_left_out_of_a_file_and_said(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "w1", "text_pair": "w2"}, {"text": "w3"}, {"text": "w4", "text_pair": "w5"}]
    source = write(tmp_path / "in.jsonl", rows)
    report = score_file(engine_of(pairs=True), source, tmp_path / "pairs.jsonl")
    assert report.rows == 2
    assert [(row.line, row.reason) for row in report.bad_rows] == [
        (2, "no second text in column 'text_pair'; the model was trained on pairs")
    ]
    report = score_file(engine_of(pairs=False), source, tmp_path / "single.jsonl")
    assert report.rows == 1
    assert [(row.line, row.reason) for row in report.bad_rows] == [
        (line, "a second text in column 'text_pair'; the model was trained on single texts") for line in (1, 3)
    ]
    assert score_file(engine_of(pairs=None), source, tmp_path / "any.jsonl").rows == 3


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_of_the_other_kind_is_one_error_and_nothing_is_written(tmp_path: Path, pairs: bool, ending: str) -> None:
    source = tmp_path / f"in.{ending}"
    if ending == "csv":
        source.write_text("text\nw1\nw2\n" if pairs else "text,text_pair\nw1,w2\nw2,w3\n", encoding="utf-8")
    else:
        write(source, [{"text": "w1"} if pairs else {"text": "w1", "text_pair": "w2"}] * 3)
    message = "no second texts in column 'text_pair'.*--text-pair-column" if pairs else "has second texts in column"
    with pytest.raises(ValueError, match=message):
        score_file(engine_of(pairs=pairs), source, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl" and path != source] == []


def test_a_file_without_good_rows_is_no_file_of_the_other_kind(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": 3}\n{"text": "w1", "text_pair": "w2"}\n')
    assert score_file(engine_of(pairs=True), source, tmp_path / "out.jsonl").num_bad == 1


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that learned pairs whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_encoder("bert").save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    texts, labels = toy_task(60)
    write(
        folder / "train.jsonl",
        [{"a": text, "b": "w9", "label": int(label)} for text, label in zip(texts, labels, strict=True)],
    )
    plan = DataPlan(str(folder / "train.jsonl"), text_column="a", text_pair_column="b")
    settings = TrainSettings(epochs=1, batch_size=16, recipe="vanilla")
    train(plan.parts(), folder / "model", encoder=str(folder / "encoder"), settings=settings, plan=plan, device="cpu")
    return folder


def test_training_notes_the_kind_and_the_length_that_was_read(workplace: Path) -> None:
    engine = Engine.from_pretrained(workplace / "model", device="cpu")
    assert engine.text_pairs is True
    # The encoder has 64 positions, the default asks for more: cut alike in training and later.
    assert engine.tokenizer.model_max_length == engine.deployment.max_length == 64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["new"]), "token ids up to 200, the encoder has embeddings for 0..199"),
        (lambda tokenizer: None, "gives pairs segment ids up to 1, the encoder has rows for 0..0"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_training(spoil: Any, message: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    spoil(tokenizer)
    tiny_encoder("bert", type_vocab_size=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = Split(["w1", "w2", "w3"], ["w4"] * 3, np.array([0, 1, 0]))
    with pytest.raises(ValueError, match=message):
        train(Parts(rows, rows, rows, ("a", "b"), False), tmp_path / "model", encoder=str(tmp_path), device="cpu")


def test_predict_reads_the_columns_that_were_trained_with(workplace: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"a": "w1", "b": "w2"}, {"a": "w3", "b": "w4"}])
    options = ("--device", "cpu", "--json")
    assert run("predict", workplace / "model", source, "-o", tmp_path / "out.jsonl", *options)["rows"] == 2
    other = write(tmp_path / "other.jsonl", [{"text": "w1", "text_pair": "w2"}])
    assert "'a'" in run("predict", workplace / "model", other, "-o", tmp_path / "2.jsonl", *options, code=2)["error"]
    named = ("--text-column", "text", "--text-pair-column", "text_pair")
    assert run("predict", workplace / "model", other, "-o", tmp_path / "3.jsonl", *named, *options)["rows"] == 1


def test_a_pair_can_be_given_on_the_command_line(workplace: Path) -> None:
    options = ("--device", "cpu", "--json")
    (first, second) = run(
        *("predict", workplace / "model", "-t", "w1", "--text-pair", "w2", "-t", "w3", "--text-pair", "", *options)
    )
    assert (first["text"], first["text_pair"], second["text_pair"]) == ("w1", "w2", "")
    (expected, _) = Engine.from_pretrained(workplace / "model", device="cpu").predict([("w1", "w2"), ("w3", "")])
    assert first["score"] == pytest.approx(expected.score, abs=1e-5)
    model = workplace / "model"
    assert "trained on pairs" in run("predict", model, "-t", "w1", *options, code=2)["error"]
    both = ("-t", "w1", "-t", "w2", "--text-pair", "w3")
    assert "got 2 and 1" in run("predict", model, *both, *options, code=2)["error"]
    assert "w1 / w2" in run("predict", model, "-t", "w1", "--text-pair", "w2", "--device", "cpu")
