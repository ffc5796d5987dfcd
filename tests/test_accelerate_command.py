"""`geep accelerate`, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, tiny_encoder, toy_task
from test_acceleration import make_toy_classifier
from test_cli import run, write_rows

import geep
from geep.engine import Engine

FAST = ("--min-agreement", "0.95", "--device", "cpu", "--any-pace")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier, a file of texts and a labelled one."""
    folder = tmp_path_factory.mktemp("accelerate")
    make_toy_classifier(folder / "classifier")
    texts, _ = toy_task(1300, seed=1)
    rows = [json.dumps({"body": text}) for text in [*texts, *texts[:7]]]
    (folder / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    write_rows(folder / "labelled.jsonl", 900, seed=4)
    return folder


def arguments(place: Path, *more: str, output: str = "fast") -> list[str]:
    source = ["--texts", str(place / "texts.jsonl"), "--text-column", "body"]
    return ["accelerate", str(place / "classifier"), *source, "-o", str(place / output), *FAST, *more]


def test_a_classifier_is_made_faster(place: Path) -> None:
    found = run(*arguments(place, output="json"), "--json")
    assert found["after"]["layers"] < found["before"]["layers"] == 4
    assert found["after"]["agreement"] >= 0.95
    assert found["copies"] >= 7
    engine = Engine.from_pretrained(place / "json", device="cpu")
    assert engine.settings.speed == found["speed"] > 0
    assert engine.certificate is not None


def test_people_see_one_table(place: Path) -> None:
    said = run(*arguments(place))
    assert "the classifier 4.00" in said
    assert "7 copies that were left out: learned from" in said
    assert "Certified: an agreement of at least 0.95 at 95 % confidence. Seen on" in said
    assert "texts a second" in said or "slower" in said
    again = run(*arguments(place))
    assert "with exits already; nothing was done" in again
    assert "the classifier 4.00" in again
    assert "made otherwise: found another promise" in run(*arguments(place), "--confidence", "0.9", code=2)
    predicted = run("predict", place / "fast", "--text", "w1 w30", "--device", "cpu", "--json")
    assert predicted[0]["label"] in ("red", "green", "blue")


def test_labelled_rows_certify_accuracy(place: Path) -> None:
    asked = [word for word in arguments(place, output="drop") if word not in FAST[:2]]
    rows = place / "both.jsonl"
    labelled = [json.loads(line) for line in (place / "labelled.jsonl").read_text("utf-8").splitlines()]
    rows.write_text("\n".join(json.dumps({"body": row["text"], "is": row["label"]}) for row in labelled), "utf-8")
    options = ("--max-drop", "5", "--calibration", str(rows), "--label-column", "is", "--json")
    found = run(*asked, *options)
    assert found["calibration"]["promise"]["max_accuracy_drop"] == 0.05
    assert found["speed"] > 0
    other = rows.read_text("utf-8").replace('"red"', '"pink"')
    rows.write_text(other, "utf-8")
    assert "pink" in run(*asked, *options[:-1], code=2)


def test_a_promise_may_hold_among_early_leavers_too(place: Path) -> None:
    found = run(*arguments(place, output="conditional"), "--conditional", "--json")
    assert found["calibration"]["promise"]["conditional"]
    assert found["calibration"]["certificate"]["promise"]["conditional"]
    assert "among the texts answered by any depth" in found["promise"]
    assert "another promise" in run(*arguments(place, output="conditional"), code=2)


@pytest.mark.parametrize("step", ["fit_exits", "profile", "calibrate", "_paces"])
def test_a_command_that_was_killed_goes_on(place: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"geep.acceleration.accelerating.{step}", killed)
        assert "the same command goes on" in run(*arguments(place, output=step), code=130)
    found = run(*arguments(place, output=step), "--json")
    assert found["speed"] > 0
    assert not found["was_finished"]
    assert not (place / step / "work").exists()


def test_what_cannot_be_done_is_said_at_once(place: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "w1"}\n{"text": "w2"}\n', encoding="utf-8")
    asked = ["accelerate", place / "classifier", "--texts", few, "-o", tmp_path / "out", "--device", "cpu"]
    assert "at least 299 are needed" in run(*asked, code=2)
    few.write_text("", encoding="utf-8")
    run(*asked, code=2)
    assert "no text column 'words'" in run(*arguments(place, output="never"), "--text-column", "words", code=2)
    assert "takes labelled rows" in run(*[*asked[:3], place / "labelled.jsonl", *asked[4:]], "--max-drop", "1", code=2)
    assert "--label-column would change nothing" in run(*arguments(place), "--label-column", "x", code=2)
    tiny_encoder("bert").save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    wrong = arguments(place, output="never")
    wrong[1] = str(tmp_path / "encoder")
    assert "holds a BertModel, expected a sequence classifier" in run(*wrong, code=2)
    wrong[1] = str(tmp_path / "nowhere")
    run(*wrong, code=2)
    assert "exit_layers must ascend within 1..3" in run(*arguments(place, output="never"), "--exit-layers", "4", code=2)
    assert not (tmp_path / "out").exists()


def test_python_and_command_do_the_same(place: Path) -> None:
    texts = geep.load_split(place / "texts.jsonl", text_column="body", require_label=False)
    found = geep.accelerate(
        place / "classifier",
        texts,
        place / "python",
        promise=geep.Promise(min_agreement=0.95),
        check_pace=False,
        device="cpu",
    )
    said = run(*arguments(place, output="command"), "--json")
    assert (found.speed, found.after.layers, list(found.losses)) == (
        said["speed"],
        said["after"]["layers"],
        said["losses"],
    )
