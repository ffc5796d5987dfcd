"""Labels of changed answers alone certify what those of all would; files of labels come back in any order and part."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FRESH, HELDOUT, TRAIN, make_engine, make_model, random_texts, split, unlabelled
from numpy.typing import NDArray

from geep.calibration import ExitRun, Outcomes, ProfileResult, Route, calibrate, kept_run, labels_wanted, profile
from geep.calibration.certifying import MAX_LABELS, walked
from geep.cli import calibrate as command
from geep.data import SomeLabels, Split, read_labels, text_id, unseen, write_to_label
from geep.engine import Engine, ExitSettings
from geep.exits import answer_of
from geep.promise import PairedCounts, Promise, Trial, walk

DROP = Promise(max_accuracy_drop=0.02)
QUICK: dict[str, Any] = {"criterion": "confidence", "lexical_exit": False}  # fewer settings to choose from
MANY = unseen(split(2500, seed=5), TRAIN, HELDOUT)
NAMES = ("red", "green", "blue")


def some(rows: list[int], labels: list[int], by: str = "") -> SomeLabels:
    return SomeLabels(np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64), by)


def answer_all(texts: Split, rows: tuple[int, ...], by: str = "a person") -> SomeLabels:
    """What somebody gives back who labels all that is asked."""
    assert texts.labels is not None
    return SomeLabels(np.array(rows, dtype=np.int64), texts.labels[list(rows)], by)


@pytest.fixture(scope="module")
def disputed(profiled: ProfileResult) -> Engine:
    """An engine whose exits, worn and without the table's help, sometimes answer otherwise than the full model."""
    model, random = copy.deepcopy(profiled.engine.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in model.exits:
            head.out.weight += 3 * head.out.weight.std() * torch.randn(head.out.weight.shape, generator=random)
    engine = Engine(model, profiled.engine.tokenizer, config=profiled.engine.config)
    found = profile(engine, TRAIN, HELDOUT, criterion="confidence").engine
    return found.replace(settings=replace(found.settings, fusing={}))


# What is certified


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
def test_labels_of_changed_answers_judge_like_labels_of_all(
    multi_label: bool, quantised: bool, conditional: bool
) -> None:
    kind = "multi_label_classification" if multi_label else "single_label_classification"
    engine = make_engine(make_model(problem_type=kind))
    run = ExitRun.of(engine, Split(random_texts(400, seed=3)))
    if quantised:  # some answers of the full model are not those of the last exit
        run = replace(run, reference=run.exit_logits[-1] + 0.8 * torch.randn(run.exit_logits[-1].shape))
    labels = answer_of(run.exit_logits[1], multi_label=multi_label)
    labels = labels.float() if multi_label else labels
    every = Outcomes(engine, replace(run, labels=labels))
    promise = replace(Promise(max_accuracy_drop=0.3), conditional=conditional)
    for speed in (0.0, 0.2, 0.6, 1.0):
        settings = replace(engine.settings, speed=speed, lexical_exit=speed == 0.6, check_layers=(2, 3))
        lacking = Outcomes(engine, run, SomeLabels.none()).lacking(settings)
        assert len(lacking) or not (quantised or speed > 0.5)
        assert speed or quantised or not len(lacking)
        few = Outcomes(engine, run, SomeLabels(lacking, labels.numpy()[lacking]))
        assert few.trial(settings, promise) == every.trial(settings, promise)
        if len(lacking):
            part = Outcomes(engine, run, SomeLabels(lacking[1:], labels.numpy()[lacking[1:]]))
            assert part.lacking(settings).tolist() == lacking[:1].tolist()
            with pytest.raises(ValueError, match=r"1 texts that speed .* have no label, expected one for each"):
                part.trial(settings, promise)


def test_few_labels_certify_many_texts(disputed: Engine) -> None:
    engine, texts, known, asked = disputed, unlabelled(MANY), SomeLabels.none(), []
    for _ in range(9):
        found = calibrate(engine, unlabelled(HELDOUT), texts, DROP, labels=known, max_labels=60, **QUICK)
        if not found.to_label:
            break
        asked.append(found.to_label)
        assert not set(known.rows.tolist()) & set(found.to_label)
        known = known.join(answer_all(MANY, found.to_label))
    assert 0 < found.num_labelled == len(known) <= 60
    assert found.num_texts == len(MANY)
    assert found.walk.speed > 0
    certificate = found.engine.certificate
    assert certificate is not None
    assert certificate.num_texts == len(MANY)
    assert certificate.labels_from == f"{len(known)} labels from a person"
    assert certificate.bound <= DROP.allowed
    # What was lost on all texts is what was said, though no label of the others was seen.
    assert MANY.labels is not None
    full, fast = (found.engine.predict_columns(MANY.texts, speed=speed).labels for speed in (0.0, None))
    right = [np.array([name[-1] for name in answers]) == MANY.labels.astype(str) for answers in (full, fast)]
    assert certificate.risk == pytest.approx(right[0].mean() - right[1].mean(), abs=1e-9)
    # The same labels in another round of the same call: the same result, and another digest with other labels.
    again = calibrate(engine, unlabelled(HELDOUT), texts, DROP, labels=known, max_labels=60, **QUICK)
    assert again.walk == found.walk
    wrong = replace(known, labels=(known.labels + 1) % 3)
    other = calibrate(engine, unlabelled(HELDOUT), texts, DROP, labels=wrong, max_labels=60, **QUICK).engine.certificate
    assert other is None or other.texts != certificate.texts


def test_labels_are_found_again_where_texts_are_left_out(disputed: Engine) -> None:
    """Positions are those of the texts given, not of those that nothing was learned on."""
    engine, learned = disputed, unlabelled(TRAIN).select(range(100))
    mixed = learned.join(unlabelled(MANY))
    alone = calibrate(engine, HELDOUT, unlabelled(MANY), DROP, labels=SomeLabels.none(), **QUICK)
    found = calibrate(engine, HELDOUT, mixed, DROP, labels=SomeLabels.none(), **QUICK)
    assert found.left_out == 100
    assert alone.to_label
    assert [row - 100 for row in found.to_label] == list(alone.to_label)
    given = answer_all(MANY, alone.to_label)
    shifted = replace(given, rows=given.rows + 100)
    expected = calibrate(engine, HELDOUT, unlabelled(MANY), DROP, labels=given, **QUICK)
    assert calibrate(engine, HELDOUT, mixed, DROP, labels=shifted, **QUICK).walk == expected.walk


def test_labels_that_are_of_no_use_are_refused(disputed: Engine) -> None:
    engine, texts, none = disputed, unlabelled(FRESH), SomeLabels.none()
    for arguments, message in (
        ((texts, Promise(min_agreement=0.98), none), "promise of agreement, which needs none"),
        ((FRESH, DROP, none), "have labels, and some were given beside them"),
        ((texts, DROP, some([0, len(texts)], [1, 1])), rf"the label of text {len(texts)} \(from 0\) of {len(texts)}"),
        ((texts, DROP, some([0], [7])), r"label ids 7..7, expected 0..2"),
    ):
        fresh, promise, labels = arguments
        with pytest.raises(ValueError, match=message):
            calibrate(engine, HELDOUT, fresh, promise, labels=labels, progress=lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"takes as many labels, expected at most 0; allow more .*--max-labels"):
        calibrate(engine, HELDOUT, unlabelled(MANY), DROP, labels=none, max_labels=0, **QUICK)


# How often it is wrong


def world(count: int, random: np.random.Generator) -> tuple[ExitRun, NDArray[np.int64]]:
    """Texts of a model whose loss at a speed s is known: first exit's answers change a share u / 4 at uncertainty u.

    The full model is right four times in five, so that a changed answer spoils four times as often as it repairs. The
    drop at speed s is (.8 - .2) s² / 8.
    """
    labels = random.integers(0, 2, count)
    full = np.where(random.random(count) < 0.8, labels, 1 - labels)
    unsure = random.random(count)
    first = np.where(random.random(count) < unsure / 4, 1 - full, full)

    def logits(answers: NDArray[np.int64], uncertainty: NDArray[np.float64]) -> torch.Tensor:
        margin = np.log((1 - uncertainty / 2) / (uncertainty / 2)) / 2
        sign = np.where(answers == 1, 1.0, -1.0)
        return torch.from_numpy(np.stack([-sign * margin, sign * margin], axis=1)).float()

    silent = logits(full, np.full(count, 0.9999))
    batch = ENGINE.tokenize(["w1"] * count).batch
    exits = torch.stack([logits(first, np.clip(unsure, 1e-6, 0.999)), silent, silent, silent])
    return ExitRun(batch, exits, None), labels


ENGINE = make_engine(make_model(num_labels=2), table=False)
ORDER = tuple(ExitSettings(speed=speed, criterion="confidence") for speed in np.linspace(0.05, 1, 20).tolist())


def asked_for(run: ExitRun, labels: NDArray[np.int64], promise: Promise, most: int) -> float:
    """The speed that is kept when all is labelled that is asked for, round by round."""
    known = SomeLabels.none()
    for most_now in (most // 2, most):
        outcomes = Outcomes(ENGINE, run, known)
        rows = labels_wanted(outcomes, [ORDER], [walked(outcomes, ORDER, promise)], most=most_now).rows
        assert len(known) + len(rows) <= most_now
        known = known.join(SomeLabels(rows, labels[rows]))
    return walked(Outcomes(ENGINE, run, known), ORDER, promise).speed


def taken_for_all(run: ExitRun, labels: NDArray[np.int64], promise: Promise, most: int) -> float:
    """What must not be done: texts without a label count as answered well."""
    every, known = Outcomes(ENGINE, replace(run, labels=torch.from_numpy(labels))), np.arange(len(run)) < most

    def trial(settings: ExitSettings) -> Trial:
        found = every.judged(settings)
        assert found.spoilt is not None
        assert found.repaired is not None
        counts = PairedCounts(len(run), 0, int((found.spoilt & known).sum()), int((found.repaired & known).sum()))
        return Trial.of(promise, counts, speed=settings.speed, mean_exit_layer=1.0)

    return walk(trial, ORDER).speed


@pytest.mark.parametrize(
    ("way", "most", "holds"), [(asked_for, 500, True), (asked_for, 60, True), (taken_for_all, 60, False)]
)
def test_promises_by_few_labels_are_broken_no_more_often_than_they_say(
    way: Callable[..., float], most: int, holds: bool
) -> None:
    promise, random, rounds = Promise(max_accuracy_drop=0.02), np.random.default_rng(0), 120
    kept = np.array([way(*world(1000, random), promise, most) for _ in range(rounds)])
    broken = float((0.6 * kept**2 / 8 > promise.allowed).mean())
    if holds:
        assert broken <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds)
        assert kept.mean() > 0.15  # and it is no empty promise
    else:
        assert broken > 0.5


# Files


def test_exits_are_run_once_while_somebody_labels(
    profiled: ProfileResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, texts = profiled.engine, FRESH.select(range(40))
    first = kept_run(engine, texts, tmp_path, what="all exits")
    assert first.labels is None  # those of the texts are not read: they may be no one's
    kept_run(engine, texts.select(range(39)), tmp_path, what="all exits")
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(ExitRun, "of", lambda *_, **__: pytest.fail("ran"))
        again = kept_run(engine, texts, tmp_path, what="all exits")
    assert torch.equal(again.exit_logits, first.exit_logits)
    assert (again.digest, again.made_by, again.texts_from) == (first.digest, first.made_by, first.texts_from)
    other = Engine(engine.model, engine.tokenizer, config=replace(engine.config, max_length=9))
    kept_run(other, texts, tmp_path, what="all exits")
    assert len(list(tmp_path.iterdir())) == 3


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_labels_come_back_in_any_order_number_and_format(tmp_path: Path) -> None:
    texts = Split(["a b", "c", "d, \u2028 e", "c", "", "f"])
    path = write_to_label(tmp_path / "new" / "ask.jsonl", texts, [0, 1, 2, 3], known=some([5], [2]), label_names=NAMES)
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    # A copy is asked once, what is known stands in it, and no answer of a model does.
    assert [(row["text"], row["label"]) for row in rows] == [
        ("f", "blue"),
        ("a b", None),
        ("c", None),
        ("d, \u2028 e", None),
    ]
    assert all(row.keys() == {"id", "text", "label"} for row in rows)
    known = read_labels(path, texts, label_names=NAMES, multi_label=False)
    assert (known.rows.tolist(), known.labels.tolist(), known.labelled_by) == ([5], [2], "ask.jsonl")
    back = tmp_path / "back.csv"
    with back.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "sure", "id"])
        writer.writerows([["green", "yes", rows[2]["id"]], ["", "no", rows[1]["id"]], ["red", "", rows[3]["id"]]])
    found = read_labels(back, texts, label_names=NAMES, multi_label=False, labelled_by="Jo")
    assert (found.rows.tolist(), found.labels.tolist(), found.labelled_by) == ([1, 2, 3], [1, 0, 1], "Jo")
    both = known.join(found)
    assert (both.rows.tolist(), both.labels.tolist()) == ([1, 2, 3, 5], [1, 0, 1, 2])
    assert both.labelled_by == "ask.jsonl and Jo"
    assert both.at(np.array([0, 2, 5])).rows.tolist() == [1, 2]
    assert both.at(np.array([0, 2, 5])).labels.tolist() == [0, 2]
    # Nothing is lost on the way through another file, of the texts in another order.
    turned = texts.select([5, 4, 3, 2, 1, 0])
    again = write_to_label(path, texts, [0], known=both, label_names=NAMES)
    turned_back = read_labels(again, turned, label_names=NAMES, multi_label=False)
    assert dict(zip(turned_back.rows.tolist(), turned_back.labels.tolist(), strict=True)) == {0: 2, 2: 1, 3: 0, 4: 1}


def test_pairs_and_several_labels_come_back(tmp_path: Path) -> None:
    texts = Split(["a", "a"], ["b", "c"])
    path = write_to_label(tmp_path / "ask.jsonl", texts, [0, 1], known=SomeLabels.none(), label_names=NAMES)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(row["text"], row["text_pair"]) for row in rows] == [("a", "b"), ("a", "c")]
    assert rows[0]["id"] != rows[1]["id"] == text_id(("a", "c"))
    rows[0]["label"], rows[1]["label"] = ["red", "blue"], []  # none of them is a label, too
    found = read_labels(write(path, rows), texts, label_names=NAMES, multi_label=True)
    assert found.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    write_to_label(path, texts, [], known=found, label_names=NAMES)
    assert [json.loads(line)["label"] for line in path.read_text("utf-8").splitlines()] == [["red", "blue"], []]


def test_labels_that_cannot_be_placed_are_refused(tmp_path: Path) -> None:
    texts, path = Split(["a", "b"]), tmp_path / "back.jsonl"
    first, second = map(text_id, texts.texts)
    for rows, message in (
        ([{"id": "t0", "label": "red"}], r'1 rows that give no label to one of the 2 texts.*\n  line 1: id "t0" is of'),
        ([{"id": first, "text": "b", "label": "red"}], r'line 1: the text "b" is not the one that id'),
        ([{"id": first, "label": "red"}, {"id": first, "label": "blue"}], "line 2: .* another label than in line 1"),
        ([{"id": first, "label": "red"}, {"id": second, "label": "pink"}], "line 2: unknown label 'pink'.*'red'"),
        ([{"id": first, "label": {"is": 1}}], "line 1: a label must be"),
        ([{"text": "a", "label": "red"}], "no text column 'id'"),
        ([{"id": first, "label": ["red"]}], "lists of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labels(write(path, rows), texts, label_names=NAMES, multi_label=False)
    # Tools change blanks; the same label may be given twice; rows without one are still to come.
    kept = [{"id": first, "text": " A ", "label": "red"}, {"id": first, "label": "red"}, {"id": second, "label": None}]
    assert read_labels(write(path, kept), texts, label_names=NAMES, multi_label=False).rows.tolist() == [0]
    assert not len(read_labels(write(path, kept[2:]), texts, label_names=NAMES, multi_label=False))
    with pytest.raises(ValueError, match=r"Text 1 \(from 0\) has two labels"):
        some([0, 1], [0, 1]).join(some([1], [2]))
    for wrong, message in (
        (([1, 1], [0, 0]), "must increase"),
        (([-1], [0]), "must increase"),
        (([1], []), "one a row"),
    ):
        with pytest.raises(ValueError, match=message):
            some(*wrong)


def test_the_command_asks_for_as_many_labels_as_the_function() -> None:
    assert command._MOST_LABELS == MAX_LABELS


def test_one_walk_keeps_the_whole_error_probability_where_labels_are_few() -> None:
    careful, daring = Route.all_to(DROP)
    assert sum(1 - route.each.confidence for route in (careful, daring)) == pytest.approx(1 - DROP.confidence)
    (few,) = Route.all_to(DROP, few_labels=True)
    assert few.each == DROP
    assert (few.weighed.needs_labels, careful.weighed.needs_labels, daring.weighed.needs_labels) == (False, False, True)
    for promise in (replace(DROP, conditional=True), Promise(min_agreement=0.99)):
        assert [route.each for route in Route.all_to(promise)] == [promise]
