"""The commands, run as a user runs them: on files, with bad input too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from conftest import make_tokenizer, random_texts, tiny_encoder, toy_task
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import geep
from geep.backends import int8
from geep.cli import app
from geep.data import Split
from geep.engine import Engine
from geep.modeling import GeepForSequenceClassification


def run(*arguments: str | Path, code: int = 0) -> Any:
    """Run a command; return its JSON document if it was asked for one, else what it printed, lines joined."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return json.loads(result.stdout) if "--json" in arguments else " ".join(result.output.split())


def write_rows(path: Path, count: int, *, seed: int) -> Path:
    texts, labels = toy_task(count, seed=seed)
    names = ("red", "green", "blue")
    rows = [{"text": text, "label": names[label]} for text, label in zip(texts, labels.tolist(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_encoder_and_data(folder: Path, **counts: int) -> None:
    """Write what a training takes: an encoder, and so many rows of each part of a data set."""
    tiny_encoder("bert").save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    (folder / "data").mkdir()
    for part, count in counts.items():
        write_rows(folder / "data" / f"{part}.jsonl", count, seed=count)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a data set and a model trained on it by the command."""
    folder = tmp_path_factory.mktemp("cli")
    write_encoder_and_data(folder, train=240, dev=300, test=40)
    shutil.copytree(folder / "data", folder / "large")
    write_rows(folder / "large" / "dev.jsonl", 2000, seed=7)
    plain = GeepForSequenceClassification.from_encoder(tiny_encoder("bert"), num_labels=3, exit_layers=[])
    for part in (plain, make_tokenizer()):
        part.save_pretrained(folder / "plain")
    summary = run(*train_arguments(folder), "--json")
    assert summary["steps"] > 0
    assert summary["calibration"]["speed"] >= 0
    return folder


def train_arguments(folder: Path) -> list[str]:
    return [
        *("train", str(folder / "data"), "--output", str(folder / "model"), "--model", str(folder / "encoder")),
        *("--epochs", "8", "--learning-rate", "2e-3", "--batch-size", "16", "--exit-layers", "1,2,3"),
        *("--max-drop", "5", "--device", "cpu"),
    ]


@pytest.fixture
def model(workplace: Path, tmp_path: Path) -> Path:
    """A copy of the trained model that a test may spoil."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    return tmp_path / "model"


def test_training_makes_a_folder_that_is_ready(workplace: Path) -> None:
    names = {path.name for path in (workplace / "model").iterdir()}
    assert {"config.json", "model.safetensors", "calibration.json", "training.json"} <= names
    assert sum(name.startswith("exit_table-") for name in names) == 1
    assert "checkpoints" not in names
    engine = Engine.from_pretrained(workplace / "model", device="cpu")
    assert engine.label_names == ("blue", "green", "red")


def test_training_again_with_the_same_settings_trains_nothing(workplace: Path, model: Path) -> None:
    before = (workplace / "model" / "model.safetensors").read_bytes()
    assert "already" in run(*train_arguments(workplace))
    assert (workplace / "model" / "model.safetensors").read_bytes() == before
    assert "other settings" in run(*train_arguments(workplace), "--seed", "7", code=2)


def test_training_a_finished_folder_again_leaves_a_later_calibration(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "model", tmp_path / "model")
    again = train_arguments(workplace)
    again[3] = str(tmp_path / "model")
    run("calibrate", tmp_path / "model", "--min-agreement", "0.9", "--device", "cpu")
    before = (tmp_path / "model" / "calibration.json").read_bytes()
    without = again[: again.index("--max-drop")] + ["--device", "cpu"]
    assert "nothing was changed" in run(*without)
    assert run(*without, "--json")["calibration"]["promise"]["min_agreement"] == 0.9
    # The promise that it was trained with first is another one now: that is said, and nothing is undone.
    assert "Nothing was changed; run `geep calibrate" in run(*again, code=2)
    assert "nothing was changed" in run(*without, "--min-agreement", "0.9")
    assert (tmp_path / "model" / "calibration.json").read_bytes() == before


@pytest.mark.skipif(not int8.is_available(), reason="this build of torch has no oneDNN")
def test_a_model_is_profiled_calibrated_and_run_in_8_bits(model: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--dtype", "int8")
    assert "run `geep profile MODEL --dtype int8` first" in run("calibrate", model, *options, code=2)
    run("profile", model, *options)
    assert len(list(model.glob("activation_ranges-*.safetensors"))) == 1
    run("calibrate", model, "--min-agreement", "0.9", *options)
    certificate = Engine.from_pretrained(model, device="cpu", dtype="int8").certificate
    assert certificate is not None
    assert (certificate.made_with["dtype"], certificate.reference) == ("int8", "float32")
    assert Engine.from_pretrained(model, device="cpu", dtype="float32").certificate is None
    rows = write_rows(tmp_path / "rows.jsonl", 12, seed=5)
    run("predict", model, rows, "--output", tmp_path / "out.jsonl", *options)
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 12


def test_profile_and_calibrate_write_their_files(model: Path) -> None:
    (model / "calibration.json").unlink()
    for table in model.glob("exit_table-*.safetensors"):
        table.unlink()
    found = run("profile", model, "--predictor", "counts", "--device", "cpu", "--json")
    assert found["predictor"] == "counts"
    assert Engine.from_pretrained(model, device="cpu").settings.speed == 0
    certified = run("calibrate", model, "--min-agreement", "0.9", "--device", "cpu", "--json")
    assert certified["promise"]["min_agreement"] == 0.9
    assert certified["trials"]
    assert Engine.from_pretrained(model, device="cpu").settings.speed == certified["speed"]
    record = json.loads((model / "calibration.json").read_text(encoding="utf-8"))["record"]
    assert set(record) == {"profile", "calibration"}
    assert "Certifying" in run("calibrate", model, "--max-drop", "5", "--device", "cpu")


def test_too_few_texts_for_a_promise_are_said_to_be_too_few(model: Path) -> None:
    before = (model / "calibration.json").read_text(encoding="utf-8")
    assert "are needed" in run("calibrate", model, "--max-drop", "0.1", code=2)
    assert (model / "calibration.json").read_text(encoding="utf-8") == before


def test_evaluate_shows_and_saves_all_rivals(model: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", model, "-o", tmp_path / "out", "--max-texts", "8", "--rounds", "1", "--speed", "0.5")
    shown = run(*arguments, "--device", "cpu")
    for name in ("HF pipeline", "constant depth 1", "FastBERT", "GEEP stop", "GEEP continue", "oracle"):
        assert name in shown
    assert (tmp_path / "out" / "evaluation.png").exists()
    document = run(*arguments, write_rows(tmp_path / "own.jsonl", 20, seed=4), "--device", "cpu", "--json")
    assert document["report"]["num_texts"] == 20
    assert document["headline"]["over_full"] > 0


def test_predict_tells_other_texts_from_those_that_certified(model: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "-o", tmp_path / "out.jsonl", "--overwrite")
    assert "other texts" not in run("predict", model, write_rows(tmp_path / "same.jsonl", 60, seed=5), *options)
    strange = tmp_path / "strange.jsonl"
    strange.write_text("".join(json.dumps({"text": "?! (;) " * 3}) + "\n" for _ in range(60)), encoding="utf-8")
    assert "other texts than the promise is about" in run("predict", model, strange, *options)
    report = run("predict", model, strange, *options, "--json")
    assert report["drift"]["unknown"] == 1
    assert report["drift"]["p_value"] < 0.001
    assert report["drift"]["is_large"] is True


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_predict_writes_a_row_for_each_text(model: Path, tmp_path: Path, ending: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", 30, seed=5)
    target = tmp_path / f"out.{ending}"
    report = run("predict", model, source, "-o", target, "--chunk-rows", "7", "--device", "cpu", "--json")
    assert report["rows"] == sum(report["exit_layer_counts"].values()) == 30
    assert 0 <= report["drift"]["layers"] <= 1
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    expected = [found.label for found in Engine.from_pretrained(model, device="cpu").predict(texts)]
    if ending == "jsonl":
        labels = [json.loads(line)["label"] for line in target.read_text(encoding="utf-8").splitlines()]
    elif ending == "parquet":
        labels = pq.read_table(target).column("label").to_pylist()
    else:
        lines = target.read_text(encoding="utf-8").splitlines()
        column = lines[0].split(",").index("label")
        labels = [line.split(",")[column] for line in lines[1:]]
    assert labels == expected


def test_predict_takes_texts_on_the_command_line(model: Path) -> None:
    answers = run("predict", model, "-t", "w0 w30", "-t", "", "--device", "cpu", "--json")
    assert [answer["text"] for answer in answers] == ["w0 w30", ""]
    assert set(answers[0]["scores"]) == {"red", "green", "blue"}
    assert "exit layer" in run("predict", model, "-t", "w0", "--device", "cpu")


def test_bad_rows_are_reported_and_left_out(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "w1"}\n{"text": "\xff"}\nnot json\n{"text": 3}\n{"text": "w2"}\n')
    shown = run("predict", model, source, "-o", tmp_path / "out.jsonl", "--device", "cpu")
    assert "3 bad rows left out" in shown
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [2, 3, 4]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    source.write_text('{"text": "w1"}\nnot json\n', "utf-8")
    assert "1 bad row left out, listed in" in run("predict", model, source, "-o", tmp_path / "one.jsonl")


def test_a_bad_row_that_hides_rows_is_said_and_ends_with_code_2(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("text\nw1\n" + '"' + "w2\n" * 1500, "utf-8")
    shown = run("predict", model, source, "-o", target, code=2)
    assert "1 bad row of 1,500 lines left out" in shown
    assert "--no-quoting" in shown
    assert json.loads(target.read_text("utf-8"))["text"] == "w1"
    run("predict", model, source, "-o", target, "--no-quoting", "--overwrite")
    assert len(target.read_text("utf-8").splitlines()) == 1501


def test_quotes_of_a_file_are_read_as_it_is_said_else_as_trained(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text('id\ttext\n1\t"w1 said\n2\tw21\n3\t"\n4\tw4\n', "utf-8")

    def texts(name: str, *options: str) -> list[str]:
        target = tmp_path / name
        run("predict", model, source, "-o", target, *options)
        return [json.loads(line)["text"] for line in target.read_text("utf-8").splitlines()]

    assert texts("plain.jsonl") == ['"w1 said', "w21", '"', "w4"]
    assert texts("quoted.jsonl", "--quoting") == ["w1 said\n2\tw21\n3\t", "w4"]
    record = json.loads((model / "training.json").read_text("utf-8"))
    assert record["about"]["data"]["quoting"] is None
    record["about"]["data"]["quoting"] = True
    (model / "training.json").write_text(json.dumps(record), "utf-8")
    assert texts("trained.jsonl") == ["w1 said\n2\tw21\n3\t", "w4"]
    assert texts("otherwise.jsonl", "--no-quoting") == ['"w1 said', "w21", '"', "w4"]


def test_bad_input_gets_one_message_and_code_2(model: Path, workplace: Path, tmp_path: Path) -> None:
    csv = tmp_path / "in.csv"
    csv.write_text("body,label\nw1,red\n", encoding="utf-8")
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text('{"text": "w1", "label": "purple"}\n', encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "w1", "label": "red"}\n', encoding="utf-8")
    encoder = str(workplace / "encoder")
    own_code = tmp_path / "own-code"
    own_code.mkdir()
    (own_code / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    cases: list[tuple[list[str | Path], str]] = [
        (["predict", model, csv], "text"),
        (["predict", model, tmp_path / "missing.jsonl"], "missing.jsonl"),
        (["predict", model], "Give a file"),
        (["predict", encoder, "-t", "w1"], "expected 'geep'"),
        (["predict", model, "-t", "w1", "--speed", "2"], "speed must lie in"),
        (["predict", model, "-t", "w1", "--backend", "fast"], "Unknown backend"),
        (["predict", model, "-t", "w1", "--device", "banana"], "device='banana' is none that torch can use here"),
        (
            ["train", workplace / "data", "-o", tmp_path / "m", "-m", encoder, "--device", "xpu9"],
            "device='xpu9' is none",
        ),
        (["train", workplace / "data", "-o", tmp_path / "m", "-m", own_code], "code of a checkpoint is never run"),
        (["evaluate", model, unknown], "purple"),
        (["train", empty, "-o", tmp_path / "m", "-m", encoder], "rows"),
        (["train", one, "-o", tmp_path / "m", "-m", encoder], "label"),
        (["train", workplace / "data", "-o", tmp_path / "m", "-m", encoder, "--recipe", "magic"], "Unknown recipe"),
        (["train", "no-such-data", "-o", tmp_path / "m", "-m", encoder], "no-such-data"),
        (["calibrate", model, "--max-drop", "0.5", "--min-agreement", "0.9"], "one promise"),
        (["calibrate", model, "--on-miss", "panic"], "--on-miss"),
        (["predict", "nobody/nothing", "-t", "w1", "--local-files-only"], "nobody/nothing"),
        (["predict", model, "-t", "w1", "--top-k", "0"], "top_k must be at least 1"),
    ]
    for arguments, expected in cases:
        shown = run(*arguments, code=2)
        assert expected in shown, f"{arguments}: {shown}"
        assert "Traceback" not in shown
    failed = run("predict", model, csv, "--json", code=2)
    assert failed["error_type"] == "ValueError"


def test_damaged_model_folders_are_refused(model: Path, workplace: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in run("predict", model, "-t", "w1", code=2)

    weights.write_bytes(whole)
    tensors = load_file(weights)
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("teacher.")}
    save_file(lacking, weights, metadata={"format": "pt"})
    assert "lack" in run("predict", model, "-t", "w1", code=2)

    tensors["teacher.out.bias"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for table in model.glob("exit_table-*.safetensors"):
        table.unlink()
    (model / "calibration.json").unlink()
    assert "NaN" in run("predict", model, "-t", "w1", code=2)

    tensors["teacher.out.bias"][0] = 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    (table,) = (workplace / "model").glob("exit_table-*.safetensors")
    shutil.copy(table, model)
    shutil.copy(workplace / "model" / "calibration.json", model)
    assert "another model" in run("predict", model, "-t", "w1", code=2)


def test_exits_are_fitted_on_further_texts_which_certify_nothing(workplace: Path, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", 300, seed=21)
    usual = train_arguments(workplace)
    usual[usual.index("--epochs") + 1] = "1"
    output = ("--output", str(tmp_path / "model"))
    command = (*usual[:2], *usual[4:], *output, "--unlabelled", str(more))
    shown = run(*command)
    assert "further texts without labels" in shown
    assert "texts answer as the full model does, on others: layer 1 " in shown
    plan, parts = geep.parts_of(tmp_path / "model")
    assert (plan.unlabelled, parts.unlabelled is None) == (str(more), False)
    assert json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))["exit_head"] == "conv"
    asked = ("calibrate", tmp_path / "model", "--min-agreement", "0.9", "--device", "cpu", "--calibration", more)
    assert "are needed" in run(*asked, code=2)
    assert "nothing was changed" in run(*command)
    assert "other settings" in run(*command[:-2], code=2)
    more.write_text(more.read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    assert "rows have changed" in run("profile", tmp_path / "model", "--device", "cpu", code=2)


def test_training_says_how_good_the_model_is_beside_the_most_frequent_label(workplace: Path, tmp_path: Path) -> None:
    changes = ("--output", str(tmp_path / "model"), "--epochs", "2", "--gradient-accumulation", "2", "--no-calibrate")
    usual = train_arguments(workplace)
    usual = usual[: usual.index("--max-drop")] + ["--device", "cpu"]
    arguments = [*usual, *changes, "--set", "lr_scheduler_type=cosine", "--set", "adam_beta2=0.98"]
    summary = run(*arguments, "--json")
    assert summary["steps"] == 2 * -(-(240 - 48) // (16 * 2))  # a fifth is held out beside the small dev split
    assert {"accuracy", "majority", "best_epoch"} <= summary["dev"].keys()
    asked = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))["about"]["settings"]
    assert asked["arguments"] == {"lr_scheduler_type": "cosine", "adam_beta2": 0.98}
    assert "always answering the most frequent label" in run(*arguments)
    assert "did you mean" in run(*arguments, "--set", "lr_schedular_type=cosine", code=2)
    assert "NAME=VALUE" in run(*arguments, "--set", "cosine", code=2)


def test_a_shallow_model_is_trained_of_the_first_layers(workplace: Path, tmp_path: Path) -> None:
    usual = train_arguments(workplace)
    changes = ("--output", str(tmp_path / "model"), "--epochs", "1", "--recipe", "vanilla", "--encoder-layers", "2")
    arguments = [*usual[: usual.index("--exit-layers")], "--device", "cpu", *changes]
    run(*arguments)
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert engine.depths == (2,)
    assert engine.predict(["w1 w2"])[0].exit_layer == 2
    assert "other settings" in run(*arguments[:-1], "3", code=2)
    assert "at least one and at most all" in run(
        *arguments, "--output", str(tmp_path / "m"), "--encoder-layers", "9", code=2
    )


def test_rows_of_ones_own_certify(model: Path, tmp_path: Path) -> None:
    mine = write_rows(tmp_path / "mine.jsonl", 333, seed=77)
    options = ("--min-agreement", "0.9", "--device", "cpu", "--json")
    found = run("calibrate", model, "--calibration", mine, *options)
    assert found["num_texts"] == 333
    assert run("calibrate", model, *options)["num_texts"] == len(geep.parts_of(model)[1].calibration)


def test_rows_that_were_trained_on_certify_nothing(workplace: Path, model: Path, tmp_path: Path) -> None:
    fresh = write_rows(tmp_path / "fresh.jsonl", 300, seed=78).read_text("utf-8")
    trained = (workplace / "data" / "train.jsonl").read_text("utf-8")
    (tmp_path / "mixed.jsonl").write_text(trained + fresh, encoding="utf-8")
    options = ("calibrate", model, "--min-agreement", "0.9", "--device", "cpu", "--calibration")
    alone = run(*options, tmp_path / "fresh.jsonl", "--json")["num_texts"]
    assert "rows of" in run(*options, tmp_path / "mixed.jsonl")
    # Rows of the file that were held out to certify have been neither learned nor chosen on.
    held = set(geep.parts_of(model)[1].calibration.texts) & {json.loads(row)["text"] for row in trained.splitlines()}
    assert run(*options, tmp_path / "mixed.jsonl", "--json")["num_texts"] == alone + len(held)
    stricter = ("--min-agreement", "0.99")  # than those few certify
    assert "are needed" in run(*options, workplace / "data" / "train.jsonl", *stricter, code=2)


def test_rows_that_changed_after_training_are_an_error(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    changes = ("data", "--output", "model", "--model", str(workplace / "encoder"), "--epochs", "1", "--device", "cpu")
    run("train", *changes, "--exit-layers", "1,2,3", "--no-calibrate")
    monkeypatch.chdir(workplace)  # the folder remembers where its rows are
    run("profile", tmp_path / "model", "--device", "cpu")
    rows = (tmp_path / "data" / "dev.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "data" / "dev.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n", encoding="utf-8")
    for command in ("profile", "calibrate"):
        shown = run(command, tmp_path / "model", "--device", "cpu", code=2)
        assert "rows have changed" in shown
        assert "calibration, profile" in shown


def test_every_command_helps_with_examples() -> None:
    for command in ("train", "profile", "calibrate", "evaluate", "predict"):
        assert f"geep {command}" in run(command, "--help")
    assert "demo" in run("--help")
    assert run("--version").startswith("geep ")


def test_multi_label_data_goes_through(workplace: Path, tmp_path: Path) -> None:
    texts = random_texts(120, seed=3)
    names = [[name for word, name in (("w1", "one"), ("w2", "two")) if word in text] for text in texts]
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, names, strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    output = tmp_path / "model"
    encoder = str(workplace / "encoder")
    run("train", tmp_path / "train.jsonl", "-o", output, "-m", encoder, "--epochs", "1", "--device", "cpu")
    answers = run("predict", output, "-t", "w1 w2", "--device", "cpu", "--json")
    assert set(answers[0]["scores"]) == {"one", "two"}
    above = run("predict", output, "-t", "w1 w2", "--threshold", "0", "--top-k", "1", "--device", "cpu", "--json")
    assert above[0]["labels"] == ["one", "two"]
    assert "threshold must lie in" in run("predict", output, "-t", "w1", "--threshold", "2", code=2)
    assert len(above[0]["scores"]) == 1
    target = tmp_path / "out.jsonl"
    run("predict", output, tmp_path / "train.jsonl", "-o", target, "--threshold", "0", "--device", "cpu")
    assert all(json.loads(line)["labels"] == ["one", "two"] for line in target.read_text("utf-8").splitlines())


def write_labels(path: Path, texts: list[str], labels: list[Any]) -> Path:
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_labels_of_another_kind_than_the_models_are_refused(model: Path, workplace: Path, tmp_path: Path) -> None:
    texts = [f"w{number} w1" for number in range(40)]
    several = write_labels(tmp_path / "several.jsonl", texts, [["red"], ["red", "blue"]] * 20)
    said = f"{several} has lists of labels, the training file one label a row"
    assert said in run("evaluate", model, several, "--device", "cpu", code=2)
    before = (model / "calibration.json").read_bytes()
    assert said in run("calibrate", model, "--calibration", several, "--device", "cpu", code=2)
    assert (model / "calibration.json").read_bytes() == before
    arguments = ["train", str(workplace / "data"), "-o", str(tmp_path / "m"), "-m", str(workplace / "encoder")]
    assert said in run(*arguments, "--calibration", several, code=2)
    assert not (tmp_path / "m").exists()


def test_labels_that_do_not_fit_the_engine_are_refused_before_anything_is_run(model: Path) -> None:
    engine = Engine.from_pretrained(model, speed=0.5, device="cpu")
    texts = ["w0", "w3", "w6", "w0 w1"]
    several = Split(texts, labels=np.eye(4, 3, dtype=np.float32))
    unknown = Split(texts, labels=np.array([0, 1, 2, 3]), origin="some.jsonl")
    for rows, message in (
        (several, r"shape \(4, 3\), expected one label id a text, shape \(4,\)"),
        (unknown, r"some.jsonl have label ids 0..3, expected 0..2;"),
    ):
        with pytest.raises(ValueError, match=message):
            geep.evaluate(engine, rows)
        with pytest.raises(ValueError, match=message):
            geep.profile(engine, rows, Split(texts))
        with pytest.raises(ValueError, match=message):
            geep.calibrate(engine, Split(texts), rows, geep.Promise(min_agreement=0.01))


# Modes in which an option would change nothing, by command: one with none always counts. A new option needs a row.
ALWAYS: tuple[str, ...] = ()
IGNORED_IN: dict[str, dict[str, tuple[str, ...]]] = {
    "accelerate": {
        **dict.fromkeys(
            ("--texts", "--output", "--min-agreement", "--max-drop", "--confidence", "--calibration"), ALWAYS
        ),
        **dict.fromkeys(("--calibration", "--exit-layers", "--head", "--max-length", "--seed"), ALWAYS),
        **dict.fromkeys(("--text-column", "--text-pair-column", "--quoting", "--device"), ALWAYS),
        **dict.fromkeys(("--token", "--cache-dir", "--local-files-only", "--json", "--any-pace"), ALWAYS),
        "--conditional": ALWAYS,
        "--label-column": ("no labelled rows",),
        "--revision": ("classifier folder",),
    },
    "train": {
        **dict.fromkeys(("--output", "--model", "--recipe", "--head", "--epochs", "--batch-size"), ALWAYS),
        **dict.fromkeys(("--gradient-accumulation", "--learning-rate", "--max-length", "--max-train"), ALWAYS),
        **dict.fromkeys(("--bf16", "--set", "--data-dir", "--seed", "--device"), ALWAYS),
        "--holdout": ("large dev",),
        **dict.fromkeys(("--token", "--cache-dir", "--local-files-only", "--json"), ALWAYS),
        **dict.fromkeys(("--exit-layers", "--calibrate"), ("vanilla",)),
        **dict.fromkeys(("--max-drop", "--min-agreement", "--confidence"), ("vanilla", "no-calibrate")),
        **dict.fromkeys(("--calibration", "--conditional"), ("vanilla", "no-calibrate")),
        **dict.fromkeys(("--text-column", "--text-pair-column", "--label-column", "--quoting"), ("named data",)),
        "--revision": ("named encoder", "encoder folder"),
        "--fit-exits": ("fitted",),
        "--encoder-layers": (),
        **dict.fromkeys(("--exit-head", "--unlabelled"), ("vanilla", "geep")),
    },
    "profile": dict.fromkeys(("--predictor", "--criterion", "--device", "--dtype", "--backend", "--json"), ALWAYS),
    "calibrate": {
        **dict.fromkeys(("--max-drop", "--min-agreement", "--confidence", "--on-miss"), ALWAYS),
        **dict.fromkeys(("--criterion", "--device", "--dtype", "--backend", "--json"), ALWAYS),
        **dict.fromkeys(("--texts", "--conditional"), ALWAYS),
        **dict.fromkeys(("--to-label", "--labels", "--labelled-by", "--max-labels"), ("no texts", "agreement")),
        **dict.fromkeys(("--text-column", "--text-pair-column", "--quoting"), ("no texts",)),
        "--calibration": ("texts",),
        # Errors of their own where there is no table, and on a GPU.
        **dict.fromkeys(("--lexical", "--by-time"), ALWAYS),
        "--call-size": ("no time",),
    },
    "evaluate": {
        **dict.fromkeys(("--output", "--max-texts", "--rounds", "--speed", "--seed", "--json"), ALWAYS),
        **dict.fromkeys(("--device", "--dtype", "--backend", "--max-batch-tokens"), ALWAYS),
        **dict.fromkeys(("--token", "--cache-dir", "--local-files-only"), ALWAYS),
        **dict.fromkeys(("--text-column", "--text-pair-column", "--label-column", "--quoting"), ("no file",)),
        "--revision": ("model folder",),
    },
    "predict": {
        # --text-pair has an error of its own beside a file.
        **dict.fromkeys(("--text", "--text-pair", "--top-k", "--json"), ALWAYS),
        "--speed": ("no exits",),
        **dict.fromkeys(("--device", "--dtype", "--backend", "--max-batch-tokens"), ALWAYS),
        **dict.fromkeys(("--token", "--cache-dir", "--local-files-only"), ALWAYS),
        **dict.fromkeys(("--output", "--scores", "--chunk-rows"), ("text",)),
        "--overwrite": ("text", "standard output"),
        **dict.fromkeys(("--text-column", "--text-pair-column", "--quoting"), ("text",)),
        "--threshold": ("one label", "text, one label"),
        "--revision": ("model folder",),
    },
    "demo": dict.fromkeys(("--output", "--text", "--max-texts", "--json"), ALWAYS),
    "datasets": dict.fromkeys(("--json",), ALWAYS),
}
# Options that 1 is no value of.
VALUES = dict.fromkeys(("--min-agreement", "--confidence", "--threshold", "--speed", "--holdout"), "0.6")
FLAGS = {"--conditional", "--calibrate", "--fit-exits", "--overwrite", "--quoting", "--scores", "--any-pace"}


def test_every_option_is_known_to_count_or_to_be_ignored() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {max(option.opts, key=len) for option in command.params if option.param_type_name == "option"}
        for name, command in commands.items()
    }
    assert {name: rows.keys() for name, rows in IGNORED_IN.items()} == found


@pytest.mark.parametrize(
    ("command", "option", "mode"),
    [
        (command, option, mode)
        for command, options in IGNORED_IN.items()
        for option, modes in options.items()
        for mode in modes
    ],
)
def test_an_option_that_a_mode_ignores_is_refused(
    command: str, option: str, mode: str, workplace: Path, tmp_path: Path
) -> None:
    model, rows, encoder = workplace / "model", workplace / "data" / "test.jsonl", workplace / "encoder"
    named = {
        ("accelerate", "no labelled rows"): [encoder, "--texts", rows],
        ("accelerate", "classifier folder"): [encoder, "--texts", rows],
        ("train", "vanilla"): [workplace / "data", "-m", encoder, "--recipe", "vanilla"],
        ("train", "geep"): [workplace / "data", "-m", encoder, "--recipe", "geep"],
        ("train", "fitted"): [workplace / "data", "-m", encoder],
        ("train", "no-calibrate"): [workplace / "data", "-m", encoder, "--no-calibrate"],
        ("train", "large dev"): [workplace / "large", "-m", encoder],
        ("train", "named data"): ["reuters-r8", "-m", encoder],
        ("train", "named encoder"): [workplace / "data"],
        ("train", "encoder folder"): [workplace / "data", "-m", encoder],
        ("calibrate", "no texts"): [model],
        ("calibrate", "no time"): [model],
        ("calibrate", "texts"): [model, "--texts", rows],
        ("calibrate", "agreement"): [model, "--texts", rows, "--min-agreement", "0.9"],
        ("evaluate", "no file"): [model],
        ("evaluate", "model folder"): [model, rows],
        ("predict", "text"): [model, "-t", "w1"],
        ("predict", "standard output"): [model, rows, "-o", "-"],
        ("predict", "one label"): [model, rows, "-o", tmp_path / "out.jsonl"],
        ("predict", "text, one label"): [model, "-t", "w1"],
        ("predict", "model folder"): [model, rows],
        ("predict", "no exits"): [workplace / "plain", "-t", "w1"],
    }
    output = ["-o", str(tmp_path / "m")] if command in ("accelerate", "train") else []
    given = [option] if option in FLAGS else [option, VALUES.get(option, "1")]
    shown = run(command, *named[command, mode], *output, *given, code=2)
    assert f"{option} would change nothing with" in shown  # with --text, without a file, …
    assert "leave it out" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["accelerate", "train", "calibrate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-drop", "1", "--min-agreement", "0.9"], "one promise, got --max-drop 1 and --min-agreement 0.9"),
        (
            ["--max-drop", "100"],
            "--max-drop is in points of accuracy, above 0 and below 100: 0.5 is half a point; got 100",
        ),
        (["--max-drop", "0"], "--max-drop is in points"),
        (["--max-drop", "nan"], "--max-drop is in points"),
        (["--min-agreement", "99"], "--min-agreement is a share, above 0 and below 1: 0.99 is 99 %; got 99"),
        (["--confidence", "95"], "--confidence is a share, at least 0.5 and below 1: 0.95 is 95 %; got 95"),
    ],
)
def test_a_promise_is_refused_in_the_words_and_units_of_its_options(
    command: str, options: list[str], message: str, workplace: Path, tmp_path: Path
) -> None:
    model = workplace / "model"
    named: dict[str, list[Any]] = {
        "accelerate": [workplace / "encoder", "--texts", workplace / "data" / "test.jsonl", "-o", tmp_path / "m"],
        "train": [workplace / "data", "-m", workplace / "encoder", "-o", tmp_path / "m"],
        "calibrate": [model],
    }
    assert message in run(command, *named[command], *options, code=2)


def test_a_finished_folder_is_for_the_promise_and_the_rows_that_it_was_made_with(
    workplace: Path, tmp_path: Path
) -> None:
    again = train_arguments(workplace)
    assert "nothing was changed" in run(*again)
    before = (workplace / "model" / "calibration.json").read_bytes()
    other = write_rows(tmp_path / "other.jsonl", 100, seed=9)
    for options in (["--confidence", "0.9"], ["--calibration", other]):
        assert "made for another promise or on other rows than those asked for" in run(*again, *options, code=2)
    assert (workplace / "model" / "calibration.json").read_bytes() == before
