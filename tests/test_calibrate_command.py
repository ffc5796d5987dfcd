"""`geep calibrate --texts`, run as a user runs it: labels are asked for, given back, and asked for no more."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import random_texts, toy_task
from test_acceleration import make_toy_classifier
from test_cli import run, write_encoder_and_data

import geep
from geep.engine import Engine

DROP = ("--max-drop", "3", "--lexical", "--criterion", "confidence", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, a classifier that was made faster, and texts of which labels are known elsewhere."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_encoder_and_data(folder, train=240, dev=300)
    training = ("--epochs", "6", "--learning-rate", "1e-3", "--batch-size", "16", "--exit-layers", "1,2,3")
    names = ("train", folder / "data", "-o", folder / "trained", "-m", folder / "encoder", "--device", "cpu")
    run(*names, *training, "--max-drop", "5")
    make_toy_classifier(folder / "classifier")
    texts, _ = toy_task(1300, seed=1)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    fast = ("accelerate", folder / "classifier", "--texts", folder / "texts.jsonl", "-o", folder / "fast")
    run(*fast, "--min-agreement", "0.9", "--device", "cpu")
    (folder / "many.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in labelled()), encoding="utf-8")
    return folder


def labelled() -> dict[str, str]:
    """What a person would say of each of the many texts; some are of words that no model has learned."""
    texts, labels = toy_task(1500, seed=11)
    names = [("red", "green", "blue")[label] for label in labels.tolist()]
    return dict(zip(texts, names, strict=True)) | dict.fromkeys(random_texts(300, seed=21), "red")


def person(path: Path, *, most: int | None = None) -> int:
    """Fill a file of questions, in another order; return how many labels it then has."""
    known = labelled()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    for row in [row for row in rows if row["label"] is None][:most]:
        row["label"] = known[row["text"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(row["label"] is not None for row in rows)


def arguments(place: Path, name: str, *more: str) -> list[Any]:
    asked = ["--to-label", place / f"{name}-ask.jsonl"]
    return ["calibrate", place / name, "--texts", place / "many.jsonl", "--text-column", "body", *asked, *DROP, *more]


@pytest.mark.parametrize("name", ["trained", "fast"])
def test_labels_are_asked_for_given_back_and_certify(place: Path, name: str) -> None:
    path, before = place / f"{name}-ask.jsonl", (place / name / "calibration.json").read_bytes()
    said = run(*arguments(place, name, "--max-labels", "80"))
    assert "No speed is set yet" in said
    assert f'Write it to "label" in {path} (one of: ' in said
    assert (place / name / "calibration.json").read_bytes() == before
    # Asked again before anything was labelled, nothing is lost and nothing is set.
    first = path.read_bytes()
    asked = run(*arguments(place, name, "--max-labels", "80"), "--json")
    assert path.read_bytes() == first
    assert asked == {"to_label": str(path), "num_to_label": len(first.splitlines())}
    # A part of the labels, then all of them: the walk goes further, and all stand in the file.
    some = person(path, most=3)
    found = run(*arguments(place, name, "--max-labels", "80", "--labelled-by", "somebody"), "--json")
    assert some == 3
    for _ in range(3):
        given = person(path)
        found = run(*arguments(place, name, "--max-labels", "80", "--labelled-by", "somebody"), "--json")
        if not found["num_to_label"]:
            break
    assert found["num_labelled"] == given <= 80
    assert not path.with_suffix(".work").exists()
    assert found["num_texts"] > 1000
    assert found["certificate"]["labels_from"] == f"{given} labels from somebody"
    assert found["leavers"][-1]["num_texts"] == found["num_texts"]
    engine = Engine.from_pretrained(place / name, device="cpu")
    assert engine.settings.speed == found["speed"]
    assert engine.certificate is not None
    # Labels written elsewhere, in another place's file: the same ones, the same result.
    elsewhere = place / f"{name}-elsewhere.jsonl"
    path.replace(elsewhere)
    again = run(*arguments(place, name, "--max-labels", "80", "--labels", str(elsewhere)), "--json")
    assert (again["speed"], again["num_labelled"]) == (found["speed"], given)
    assert again["certificate"]["labels_from"] == f"{given} labels from {elsewhere.name}"
    shown = run(*arguments(place, name, "--max-labels", "80", "--labels", str(elsewhere)))
    assert f"on many.jsonl, with {given} labels from {elsewhere.name}." in shown


def test_agreement_is_certified_on_texts_at_once(place: Path) -> None:
    agreed = ("--texts", place / "many.jsonl", "--text-column", "body", "--min-agreement", "0.9", "--device", "cpu")
    found = run("calibrate", place / "fast", *agreed, "--conditional", "--json")
    assert found["promise"]["conditional"]
    assert found["num_texts"] > 1000
    assert "among the texts answered by any depth" in run("calibrate", place / "fast", *agreed, "--conditional")
    # Texts that the folder's exits were learned of certify nothing.
    learned = ("--texts", place / "texts.jsonl", "--min-agreement", "0.99", "--device", "cpu")
    assert "are needed" in run("calibrate", place / "fast", *learned, code=2)


def test_what_cannot_be_done_with_labels_is_said(place: Path) -> None:
    path = place / "wrong.jsonl"
    asked = arguments(place, "trained", "--labels", str(path))
    for row, message in (
        ({"id": "t12", "label": "red"}, '"t12" is of none of the texts'),
        ({"id": geep.data.text_id(toy_task(1500, seed=11)[0][0]), "label": "pink"}, "unknown label 'pink'"),
    ):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert message in run(*asked, code=2)
    assert "nowhere.jsonl" in run(*arguments(place, "trained", "--labels", str(place / "nowhere.jsonl")), code=2)
