"""A classifier made faster: it answers as it did, its exits keep the promise, and a killed call goes on."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAX_LENGTH, SEP, VOCAB, loud, make_tokenizer, random_texts, tiny_encoder, toy_task
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from geep.acceleration import Acceleration, Pace, accelerate, accelerating, fitting, looking
from geep.acceleration.accelerating import TextsFor
from geep.acceleration.prospects import prospects
from geep.calibration import TRIAL_SPEEDS, ExitRun, Outcomes, ProfileResult, RoundedTooFarError, profiling
from geep.data import Split
from geep.distilling import FitSettings, FittedHeads
from geep.engine import Engine
from geep.folder import Provenance
from geep.promise import PairedCounts, Promise, TooFewTextsError

SETTINGS = FitSettings(epochs=4, batch_size=64)
# Of a tiny model an exit costs as much as the layers that it saves, so time decides nothing here.
ASKED: dict[str, Any] = {
    "promise": Promise(min_agreement=0.95), "settings": SETTINGS, "device": "cpu", "check_pace": False,
}  # fmt: skip


def toy_split(count: int, *, seed: int, labelled: bool = False) -> Split:
    texts, labels = toy_task(count, seed=seed)
    return Split(texts, labels=labels if labelled else None)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's own BERT classifier, fine-tuned on the toy task by a plain loop."""
    return make_toy_classifier(tmp_path_factory.mktemp("classifier"))


def make_toy_classifier(folder: Path) -> Path:
    """Write it, tokenizer included."""
    torch.manual_seed(0)
    names = dict(enumerate(("red", "green", "blue")))
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=1,
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )
    model, tokenizer = BertForSequenceClassification(config), make_tokenizer()
    texts, labels = toy_task(1500, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        for start in range(0, len(texts), 32):
            rows = slice(start, start + 32)
            inputs = tokenizer(texts[rows], padding=True, return_tensors="pt")
            model(**inputs, labels=torch.from_numpy(labels[rows])).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_late_classifier(folder: Path) -> Path:
    """Write a classifier whose answers hang on layers that are all drawn at random: no exit foretells them."""
    config = tiny_encoder("bert", num_hidden_layers=8).config
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    torch.manual_seed(0)
    classifier, tokenizer = AutoModelForSequenceClassification.from_config(config), make_tokenizer()
    loud(classifier, std=0.5)
    with torch.no_grad():  # half of the texts get either answer
        logits = classifier.eval()(**tokenizer(random_texts(200), padding=True, return_tensors="pt")).logits
        classifier.classifier.bias[1] -= logits.diff(dim=1).median()
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def no_opinion(run: ExitRun, *, multi_label: bool) -> torch.Tensor:
    """The table is taught no label, so it cannot answer in an exit's place."""
    return torch.full_like(run.exit_logits[-1], 1 / run.exit_logits.shape[-1])


TEXTS = toy_split(1300, seed=1)


@pytest.fixture(scope="module")
def made(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Acceleration]:
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, accelerate(classifier, TEXTS, folder, **ASKED)


def test_speed_0_gives_the_classifiers_own_logits(classifier: Path, made: tuple[Path, Acceleration]) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier)
    ours = AutoModelForSequenceClassification.from_pretrained(made[0])
    fresh = toy_split(60, seed=9).texts
    inputs = make_tokenizer()(fresh, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = theirs(**inputs).logits
        assert torch.allclose(ours(**inputs).logits, expected, atol=1e-5)
    engine = Engine.from_pretrained(made[0], device="cpu", speed=0.0)
    assert torch.allclose(engine.run_tokens(engine.tokenize(fresh).batch).logits, expected, atol=1e-5)
    assert engine.label_names == ("red", "green", "blue")


def test_exits_keep_the_promise_on_texts_to_come(made: tuple[Path, Acceleration]) -> None:
    folder, found = made
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.certificate is not None
    assert engine.settings.speed == found.speed > 0
    fresh = toy_split(1500, seed=10).texts
    fast, full = engine.predict_columns(fresh), engine.predict_columns(fresh, speed=0.0)
    assert float(np.mean(np.array(fast.labels) == np.array(full.labels))) > 0.95
    assert float(fast.exit_layers.mean()) < 2
    assert found.after.layers == pytest.approx(float(fast.exit_layers.mean()), abs=0.3)
    assert found.after.agreement >= 0.95
    assert (found.before.layers, found.before.agreement) == (4.0, 1.0)
    assert min(found.before.texts_per_second, found.after.texts_per_second) > 0


def test_what_was_done_is_said(made: tuple[Path, Acceleration]) -> None:
    folder, found = made
    different = len(set(TEXTS.texts))
    assert (found.num_texts, found.copies) == (different, len(TEXTS) - different)
    assert found.num_learned + found.num_chosen + found.num_certified == different
    assert found.num_learned == pytest.approx(0.6 * different, abs=1)
    assert found.num_certified == pytest.approx(0.25 * different, abs=1)
    assert (found.depths, len(found.losses)) == ((1, 2), 2)
    assert found.calibration["certificate"]["promise"]["min_agreement"] == 0.95
    assert Provenance.read(folder).result["speed"] == found.speed
    assert not (folder / "work").exists()
    with pytest.raises(ValueError, match="made of .* by `geep accelerate`, which keeps no texts"):
        _ = Provenance.read(folder).data


def test_a_finished_folder_is_returned_at_once(
    classifier: Path, made: tuple[Path, Acceleration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerating, "fit_exits", None)
    again = accelerate(classifier, TEXTS, made[0], **ASKED)
    assert again.was_finished
    assert {**again.record(), "was_finished": False} == made[1].record()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"promise": Promise(min_agreement=0.9)}, "another promise"),
        ({"texts": toy_split(1300, seed=2)}, "another digests"),
        ({"exit_layers": [1]}, "another exit_layers"),
        ({"head": "mean"}, "another head"),
        ({"max_length": 16}, "another max_length"),
    ],
)
def test_another_request_leaves_a_finished_folder(
    classifier: Path, made: tuple[Path, Acceleration], changes: dict[str, Any], named: str
) -> None:
    before = (made[0] / "calibration.json").read_bytes()
    with pytest.raises(ValueError, match=f"made otherwise: found {named}"):
        accelerate(**{"model": classifier, "texts": TEXTS, "output": made[0], **ASKED, **changes})
    assert (made[0] / "calibration.json").read_bytes() == before


def test_the_classifiers_own_folder_is_not_touched(classifier: Path) -> None:
    with pytest.raises(ValueError, match="holds a model already, which is not touched"):
        accelerate(classifier, TEXTS, classifier, **ASKED)


@pytest.mark.parametrize(
    "last", ["features of all depths, texts to choose on", "heads of all depths", "temperatures", "timing"]
)
def test_a_killed_call_goes_on(classifier: Path, made: tuple[Path, Acceleration], last: str, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what.startswith(last):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accelerate(classifier, TEXTS, tmp_path / "out", **ASKED, progress=stop)
    assert not (tmp_path / "out" / "training.json").exists()
    told: list[str] = []
    again = accelerate(classifier, TEXTS, tmp_path / "out", **ASKED, progress=lambda what, *_: told.append(what))
    assert not any("texts to learn from" in what for what in told)  # computed before
    first = (made[1].speed, made[1].losses, made[1].after.layers, made[1].after.agreement)
    assert (again.speed, again.losses, again.after.layers, again.after.agreement) == first
    assert not (tmp_path / "out" / "work").exists()
    same = ("model.safetensors", "calibration.json", "tokenizer.json", "config.json")
    assert all((tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes() for name in same)


def test_too_few_texts_are_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        TooFewTextsError, match="at least 299 are needed. Of 500 different texts 25% certify: with 1,200"
    ):
        accelerate(tmp_path / "nothing", Split([f"text {i}" for i in range(500)]), tmp_path / "out", device="cpu")
    # So many suffice, and no fewer are asked for than certifying takes.
    parts = TextsFor.of(Split([f"text {i}" for i in range(1200)]), None, Promise(min_agreement=0.99), seed=0)
    assert len(parts.certify) >= 299
    assert not (tmp_path / "out").exists()


def test_copies_are_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    few = Split([f"Text {i % 400}" for i in range(4000)] + [f" text  {i}" for i in range(400)])
    with caplog.at_level(logging.WARNING), pytest.raises(TooFewTextsError, match="Of 400 different texts"):
        TextsFor.of(few, None, Promise(min_agreement=0.99), seed=0)
    assert "Of 4400 texts only 400 are different" in caplog.text


def test_texts_are_divided_alike_with_the_same_seed_and_none_twice() -> None:
    texts = toy_split(1300, seed=3)
    one, other, third = (TextsFor.of(texts, None, ASKED["promise"], seed=seed) for seed in (0, 0, 1))
    names = ("learn", "choose", "certify")
    assert all(getattr(one, name).digest() == getattr(other, name).digest() for name in names)
    assert one.learn.digest() != third.learn.digest()
    every = [text for name in names for text in getattr(one, name).texts]
    assert sorted(every) == sorted(set(texts.texts))


def test_labelled_rows_certify_a_loss_of_accuracy(classifier: Path, tmp_path: Path) -> None:
    rows = toy_split(900, seed=4, labelled=True)
    asked = {**ASKED, "promise": Promise(max_accuracy_drop=0.05)}
    found = accelerate(classifier, TEXTS, tmp_path / "out", calibration=rows, **asked)
    assert found.calibration["promise"]["max_accuracy_drop"] == 0.05
    assert found.speed > 0
    different = len(set(rows.texts))
    assert found.num_certified == pytest.approx(different * 2 / 3, abs=2)
    # What certifies was not learned from.
    assert found.num_learned + found.num_chosen == len(set(TEXTS.texts) - set(rows.texts))


def test_what_does_not_belong_together_is_refused(classifier: Path, tmp_path: Path) -> None:
    drop = {**ASKED, "promise": Promise(max_accuracy_drop=0.05)}
    with pytest.raises(ValueError, match="takes labelled rows, found none"):
        accelerate(classifier, TEXTS, tmp_path, **drop)
    with pytest.raises(ValueError, match="takes labelled rows, found none"):
        accelerate(classifier, TEXTS, tmp_path, calibration=toy_split(900, seed=4), **drop)
    pairs = Split(TEXTS.texts, TEXTS.texts)
    with pytest.raises(ValueError, match="texts are pairs and the rows for calibration single texts"):
        accelerate(classifier, pairs, tmp_path, calibration=toy_split(900, seed=4, labelled=True), **drop)
    texts, _ = toy_task(900, seed=4)
    with pytest.raises(ValueError, match=r"label ids 7\.\.7, expected 0\.\.2"):
        accelerate(classifier, TEXTS, tmp_path, calibration=Split(texts, labels=np.full(900, 7)), **drop)
    with pytest.raises(ValueError, match="Found 1 different texts to learn from"):
        accelerate(classifier, Split(["w1"]), tmp_path, calibration=toy_split(900, seed=4, labelled=True), **drop)
    with pytest.raises(ValueError, match="Unknown kind of heads 'max'"):
        accelerate(classifier, TEXTS, tmp_path / "head", **ASKED, head="max")


def test_where_no_speed_passes_the_full_model_stays(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exits that learned nothing are never asked: speed 0, certified as what it is, the full model."""
    honest = fitting.fit_heads

    def spoilt(*arguments: Any, **options: Any) -> FittedHeads:
        fitted = honest(*arguments, **options)
        for head in fitted.heads:
            torch.nn.init.zeros_(head.out.weight)
        return fitted

    monkeypatch.setattr(fitting, "fit_heads", spoilt)
    monkeypatch.setattr(profiling, "label_targets", no_opinion)
    found = accelerate(classifier, TEXTS, tmp_path / "out", **ASKED)
    assert found.speed == 0
    assert (found.after.layers, found.after.agreement) == (4.0, 1.0)
    assert found.calibration["refused"].startswith("No speed that keeps the promise answers any of 325 texts")
    assert found.before.texts_per_second == found.after.texts_per_second
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    assert set(engine.predict_columns(TEXTS.texts[:50]).exit_layers.tolist()) == {4}


@pytest.mark.bfloat16
def test_where_rounding_costs_too_much_float32_is_certified(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = profiling.check_rounded

    def strict(run: ExitRun, dtype: str, **options: Any) -> None:
        honest(run, dtype, **options)
        if dtype == "bfloat16":
            raise RoundedTooFarError("bfloat16 loses everything.")

    monkeypatch.setattr(profiling, "check_rounded", strict)
    found = accelerate(classifier, TEXTS, tmp_path / "out", **ASKED)
    assert "bfloat16 loses everything. It is certified in float32." in caplog.text
    assert found.speed > 0
    assert found.calibration["certificate"]["made_with"]["dtype"] == "float32"
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    assert engine.deployment.dtype == "float32"
    assert engine.certificate is not None


@pytest.mark.bfloat16
def test_a_classifier_is_certified_in_bfloat16(classifier: Path, tmp_path: Path) -> None:
    found = accelerate(classifier, TEXTS, tmp_path / "out", **ASKED)
    assert found.calibration["certificate"]["made_with"]["dtype"] == "bfloat16"
    assert found.calibration["certificate"]["reference"] == "float32"
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    assert (engine.deployment.dtype, engine.settings.speed) == ("bfloat16", found.speed)


def test_nobody_is_left_slower(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A speed that saves layers and no time is not kept, unless the model is for another machine."""
    paces = accelerating._paces

    def slow(*arguments: Any) -> tuple[Pace, Pace]:
        before, after = paces(*arguments)
        return before, after if after.layers == before.layers else replace(after, texts_per_second=0.1)

    monkeypatch.setattr(accelerating, "_paces", slow)
    found = accelerate(classifier, TEXTS, tmp_path / "here", **{**ASKED, "check_pace": True})
    assert found.calibration["refused"].startswith("The speed that keeps the promise runs")
    assert (found.speed, found.calibration["certificate"], found.after.layers) == (0.0, None, 4.0)
    assert Engine.from_pretrained(tmp_path / "here", device="cpu").settings.speed == 0
    assert accelerate(classifier, TEXTS, tmp_path / "there", **ASKED).speed > 0


def test_what_more_would_take_is_said(made: tuple[Path, Acceleration]) -> None:
    nearer, further = made[1].prospects
    assert "at least 0.975" in nearer.promise
    assert "at least 0.99" in further.promise
    assert made[1].after.layers <= nearer.layers <= further.layers <= 4
    needed = [Promise(min_agreement=share).texts_needed for share in (0.975, 0.99)]
    assert nearer.num_texts >= needed[0]
    assert further.num_texts >= needed[1]


def test_so_many_texts_do_certify_what_is_said_of_them(profiled: ProfileResult) -> None:
    held, settings = Outcomes(profiled.engine, profiled.heldout), profiled.engine.settings
    for each, agreement in zip(prospects(held, settings, Promise(min_agreement=0.98)), (0.99, 0.996), strict=True):
        promise = Promise(min_agreement=agreement)
        assert each.promise == str(Promise(min_agreement=agreement))
        assert each.num_texts is not None
        trials = [held.trial(replace(settings, speed=speed), promise) for speed in TRIAL_SPEEDS]
        trial = next(trial for trial in trials if trial.mean_exit_layer == each.layers)
        counts = PairedCounts(each.num_texts, math.ceil(trial.risk * each.num_texts - 1e-9))
        assert promise.risk.bound(counts, 1 - promise.confidence) <= promise.allowed


def test_a_model_that_answers_all_alike_is_kept_as_it_is(classifier: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
        model.classifier.bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    model.save_pretrained(tmp_path / "constant")
    make_tokenizer().save_pretrained(tmp_path / "constant")
    found = accelerate(tmp_path / "constant", TEXTS, tmp_path / "out", **ASKED)
    assert (found.speed, found.calibration["certificate"]) == (0.0, None)
    assert "same answer, 'red'" in found.calibration["refused"]
    assert (found.after.layers, found.after.agreement) == (4.0, 1.0)
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    assert engine.predict_columns(["w1 w2"]).exit_layers.tolist() == [4]


def test_a_classifier_without_tokenizer_is_refused(classifier: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        accelerate(tmp_path, TEXTS, tmp_path / "out", **ASKED)


def test_another_language_is_warned_of(classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = Split([f"\u4e00\u4e8c {chr(0x4E00 + i)}" for i in range(1300)])

    def stop(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        accelerate(classifier, texts, tmp_path / "out", **ASKED, progress=stop)
    assert "100 % of the tokens are unknown" in caplog.text


@pytest.mark.parametrize("late", [False, True])
def test_layers_that_agree_only_at_the_end_are_told_before_the_long_part(
    late: bool, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(looking, "_LEARNED", 150)
    model = make_late_classifier(tmp_path / "late") if late else classifier
    texts = Split(random_texts(2000, seed=3)) if late else toy_split(2000, seed=3)
    # An exit after the first of eight layers, where there is nothing to be foretold.
    asked = {**ASKED, "promise": Promise(min_agreement=0.99), "exit_layers": [1] if late else None}
    told: list[str] = []

    def stop(what: str, done: int, total: int | None) -> None:
        told.append(what)
        if not what.startswith("a first look"):
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        accelerate(model, texts, tmp_path / "out", **asked, progress=stop)
    assert told[0] == "a first look: features of all depths, texts to learn from"
    assert ("agree only at the end" in caplog.text) == late
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, texts, tmp_path / "out", **asked, progress=stop)
    assert not told[0].startswith("a first look")


def test_the_outlook_counts_what_the_surest_texts_would_save() -> None:
    """Of 100 texts one exit at layer 2 of 4 is right about the 40 surest, and then wrong about every other one."""
    full = torch.zeros(100, 2)
    full[:, 0] = 9.0
    own = torch.zeros(100, 2)
    own[:, 0] = torch.linspace(5.0, 1.0, 100)
    own[40::2] = own[40::2].flip(1)  # texts 40, 42, …
    found = looking._outlook(torch.stack([own, full]), (2, 4), Promise(min_agreement=0.99), multi_label=False)
    assert (found.layer, found.agreement, found.is_poor) == (2, pytest.approx(0.7), False)
    assert found.saved == pytest.approx(0.42 * 0.5)  # one text may be wrong
    strict = looking._outlook(torch.stack([own.flip(1), full]), (2, 4), Promise(min_agreement=0.99), multi_label=False)
    assert strict.is_poor


def test_texts_that_are_the_rows_that_certify_are_told(caplog: pytest.LogCaptureFixture) -> None:
    promise, rows = Promise(max_accuracy_drop=0.05), toy_split(900, seed=4, labelled=True)
    more = Split([*rows.texts, *toy_split(300, seed=5).texts])
    with caplog.at_level(logging.WARNING):
        parts = TextsFor.of(more, rows, promise, seed=0)
    assert "texts are among the rows that certify, and are not learned from" in caplog.text
    assert not set(parts.learn.texts) & set(rows.texts)
    with pytest.raises(ValueError, match="Found 0 different texts to learn from"):
        TextsFor.of(Split(rows.texts), rows, promise, seed=0)
    caplog.clear()
    TextsFor.of(TEXTS, rows, promise, seed=0)
    assert not caplog.text


def test_no_texts_at_all_are_too_few() -> None:
    with pytest.raises(TooFewTextsError, match="Of 0 different texts"):
        TextsFor.of(Split([]), None, Promise(min_agreement=0.99), seed=0)
    with pytest.raises(TooFewTextsError, match="Of 1 different texts"):
        TextsFor.of(Split(["", " ", "\n"] * 900), None, Promise(min_agreement=0.99), seed=0)


def test_several_labels_and_pairs_are_accelerated(classifier: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "many")
    make_tokenizer().save_pretrained(tmp_path / "many")
    pairs = Split(TEXTS.texts, TEXTS.texts[::-1])
    found = accelerate(tmp_path / "many", pairs, tmp_path / "out", **{**ASKED, "promise": Promise(min_agreement=0.9)})
    engine = Engine.from_pretrained(tmp_path / "out", device="cpu")
    assert (engine.multi_label, engine.text_pairs, engine.settings.speed) == (True, True, found.speed)
    assert (engine.model.config.exit_head, engine.model.config.separator_id) == ("conv", SEP)
    assert json.loads(json.dumps(asdict(found)))["num_texts"] == 1300
