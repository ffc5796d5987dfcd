"""A certificate speaks of one engine: whatever is otherwise, it says nothing; it is kept whole or not at all."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FRESH, HELDOUT, MAX_LENGTH, TRAIN, make_engine, make_model, make_tokenizer, unlabelled
from rich.console import Console
from tokenizers.normalizers import BertNormalizer

from geep.backends import int8
from geep.calibration import (
    Calibration,
    ExitRun,
    Outcomes,
    ProfileResult,
    calibrate,
    profile,
    quantise,
    save_refusal,
)
from geep.cli import show
from geep.engine import Certificate, Engine, EngineConfig, ExitSettings
from geep.folder import CalibrationFile, fingerprint
from geep.promise import Promise, TooFewTextsError

PROMISE = Promise(min_agreement=0.95)


@pytest.fixture(scope="module")
def certified(profiled: ProfileResult) -> Calibration:
    fresh = replace(FRESH, origin="the development split of a task")
    return calibrate(profiled.engine, HELDOUT, fresh, PROMISE)


@pytest.fixture(scope="module")
def folder(certified: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified model's folder that no test may change."""
    path = tmp_path_factory.mktemp("certified") / "model"
    engine = certified.engine
    engine.model.save_pretrained(path)
    engine.tokenizer.save_pretrained(path)
    certified.save(path)
    return path


def certificate_of(engine: Engine) -> Certificate:
    assert engine.certificate is not None
    return engine.certificate


# --------------------------------------------------------------------------------------------------------------------
# What it says
# --------------------------------------------------------------------------------------------------------------------


def test_a_certificate_says_what_was_certified_of_what_and_on_what(certified: Calibration) -> None:
    found, engine = certificate_of(certified.engine), certified.engine
    assert engine.settings.speed > 0
    assert (found.promise, found.reference) == (PROMISE, "float32")
    assert found.num_texts == len(FRESH)
    assert found.texts == ExitRun.of(engine, FRESH).digest != ExitRun.of(engine, unlabelled(FRESH)).digest
    assert found.texts_from == "the development split of a task"
    kept = certified.walk.kept
    assert kept is not None
    assert found.risk == kept.risk <= found.bound == kept.bound <= PROMISE.allowed
    assert found.made_with == engine.made_with
    assert set(found.made_with) == {
        "model", "tokenizer", "table", "ranges", "settings", "speed",
        "backend", "device", "dtype", "weight_bits", "max_length",
    }  # fmt: skip


def test_what_was_not_certified_has_no_certificate(profiled: ProfileResult) -> None:
    assert profiled.engine.certificate is None
    assert make_engine().certificate is None


@pytest.mark.parametrize(
    "change",
    [
        {"speed": 0.123},
        {"speed": 0.0},
        {"quantile": 0.31},
        {"on_miss": "stop"},
        {"check_layers": (1,)},
        {"criterion": "entropy"},
        {"temperatures": {4: 2.0}},
    ],
)
def test_any_other_setting_drops_it_and_the_old_one_brings_it_back(
    change: dict[str, Any], certified: Calibration
) -> None:
    other = certified.engine.replace(settings=replace(certified.engine.settings, **change))
    assert other.certificate is None
    assert other.replace(settings=certified.engine.settings).certificate == certified.engine.certificate


def test_another_table_drops_it(certified: Calibration, trained: Engine) -> None:
    table = profile(trained, HELDOUT, TRAIN, kind="counts").engine.predictor
    assert certified.engine.replace(predictor=table).certificate is None


# --------------------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------------------


def test_it_comes_back_with_its_folder_and_nothing_is_said(
    folder: Path, certified: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    found = Engine.from_pretrained(folder, device="cpu")
    assert found.certificate == certified.engine.certificate
    assert "does not cover" not in caplog.text
    assert CalibrationFile.read(folder).certificate is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "padded"}, "backend padded in place of packed"),
        ({"max_length": 9}, f"max_length 9 in place of {MAX_LENGTH}"),
    ],
)
def test_an_engine_that_runs_otherwise_has_none_and_says_why(
    options: dict[str, Any], said: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Engine.from_pretrained(folder, device="cpu", **options)
    assert found.certificate is None
    assert f"does not cover this engine, which has {said}" in caplog.text
    # Nor is it written down.
    found.save_exits(tmp_path)
    assert CalibrationFile.read(tmp_path).certificate is None


def test_another_speed_has_none(folder: Path, certified: Calibration) -> None:
    assert Engine.from_pretrained(folder, device="cpu", speed=0.9).certificate is None
    same = Engine.from_pretrained(folder, device="cpu", speed=certified.engine.settings.speed)
    assert same.certificate == certified.engine.certificate


def test_a_profile_leaves_no_certificate_of_the_table_before(
    folder: Path, profiled: ProfileResult, tmp_path: Path, certified: Calibration
) -> None:
    certified.save(tmp_path)
    profiled.save(tmp_path)
    assert CalibrationFile.read(tmp_path).certificate is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_config.hidden_act", "relu"),
        ("encoder_config.num_attention_heads", 4),
        ("encoder_config.layer_norm_eps", 0.5),
        ("exit_head", "cls"),
        ("id2label", {"0": "b", "1": "a", "2": "c"}),
        ("problem_type", "multi_label_classification"),
    ],
)
def test_exits_of_a_model_with_another_config_are_refused(
    field: str, value: object, folder: Path, tmp_path: Path
) -> None:
    """The same weights answer otherwise under another switch."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    place = config
    for part in field.split(".")[:-1]:
        place = place[part]
    place[field.split(".")[-1]] = value
    if field == "id2label":
        config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="belongs to another model than the folder's"):
        Engine.from_pretrained(model, device="cpu")
    assert Engine.from_pretrained(model, device="cpu", exits=False).certificate is None


@pytest.mark.parametrize("field", ["classifier_dropout", "initializer_range", "transformers_version", "dtype"])
def test_what_no_answer_depends_on_changes_nothing(field: str, folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    config[field] = {"transformers_version": "5.0.0", "dtype": "bfloat16"}.get(field, 0.33)
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    assert Engine.from_pretrained(model, device="cpu").certificate is not None


def test_settings_without_a_table_belong_to_their_model_too(trained: Engine, tmp_path: Path) -> None:
    other = make_model()
    other.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    calibrate(trained, HELDOUT, FRESH, PROMISE).save(tmp_path)
    with pytest.raises(ValueError, match="belongs to another model than the folder's"):
        Engine.from_pretrained(tmp_path, device="cpu")


def test_a_reader_between_two_publications_finds_the_later_one(
    certified: Calibration, trained: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read before, its table is gone when it is looked for: then the file names another."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    new = profile(trained, HELDOUT, TRAIN, kind="counts").engine
    read = CalibrationFile.read.__func__  # type: ignore[attr-defined]
    published = []

    def publish_after(cls: type[CalibrationFile], path: str | Path) -> CalibrationFile:
        found: CalibrationFile = read(cls, path)
        if not published:
            published.append(found)
            new.save_exits(model)
        return found

    monkeypatch.setattr(CalibrationFile, "read", classmethod(publish_after))
    found = Engine.from_pretrained(model, device="cpu", max_batch_tokens=500)
    assert found.made_with == new.made_with
    (table,) = model.glob("exit_table-*")
    table.unlink()
    with pytest.raises(FileNotFoundError, match="has no exit_table-.*copy all files of the folder"):
        Engine.from_pretrained(model, device="cpu")


def test_writers_take_turns(certified: Calibration, trained: Engine, folder: Path, tmp_path: Path) -> None:
    """Whoever writes last, its table is there: the other's clean-up has not taken it."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    writers = [certified.engine, profile(trained, HELDOUT, TRAIN, kind="counts").engine]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(writers[number % 2].save_exits, model) for number in range(24)]:
            done.result()
    found = Engine.from_pretrained(model, device="cpu", max_batch_tokens=500)
    assert found.made_with in [each.made_with for each in writers]
    assert len(list(model.glob("exit_table-*"))) == 1


def test_saving_the_same_exits_again_keeps_how_they_were_found(certified: Calibration, tmp_path: Path) -> None:
    certified.save(tmp_path, profile={"quality": 1}, asked={"max_drop": 0.5})
    before = CalibrationFile.read(tmp_path)
    assert before.record["profile"] == {"quality": 1}
    assert before.record["calibration"]["asked"] == {"max_drop": 0.5}
    certified.engine.save_exits(tmp_path)
    assert CalibrationFile.read(tmp_path) == before
    certified.engine.replace(settings=replace(certified.engine.settings, speed=0.9)).save_exits(tmp_path)
    assert CalibrationFile.read(tmp_path).record == {}


def test_a_refusal_leaves_no_certificate(certified: Calibration, tmp_path: Path) -> None:
    at_zero = certified.engine.replace(settings=replace(certified.engine.settings, speed=0.0))
    sure = at_zero.replace(certificate=replace(certificate_of(certified.engine), made_with=at_zero.made_with))
    assert sure.certificate is not None
    save_refusal(sure, tmp_path, TooFewTextsError("too few"))
    assert CalibrationFile.read(tmp_path).certificate is None


@pytest.mark.parametrize(
    "damage", [{"promise": {}}, {"promise": {"min_agreement": 2}}, {"more": 1}, {"bound": None}, {"num_texts": "many"}]
)
def test_a_damaged_certificate_is_refused(damage: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    stored = CalibrationFile.read(folder)
    assert stored.certificate is not None
    fields = {**stored.certificate, **damage}
    with pytest.raises(ValueError, match="certificate in calibration.json is damaged"):
        Certificate.from_dict(fields)
    assert Certificate.from_dict(json.loads(json.dumps(stored.certificate))).to_dict() == stored.certificate


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_at_any_moment_leaves_the_old_exits_or_the_new(
    certified: Calibration, trained: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, settings and certificate are of one making, wherever writing them ends."""
    new = profile(trained, HELDOUT, TRAIN, kind="counts", criterion="margin").engine
    certified.engine.model.save_pretrained(tmp_path)
    certified.engine.tokenizer.save_pretrained(tmp_path)
    makings = [each.made_with for each in (certified.engine, new)]

    def making_after(step: int) -> dict[str, Any]:
        certified.engine.save_exits(tmp_path)
        steps = iter(range(step))

        def countdown(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if next(steps, None) is None:
                    raise Killed
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", countdown(os.fsync))
            patch.setattr(Path, "replace", countdown(Path.replace))
            patch.setattr(Path, "unlink", countdown(Path.unlink))
            try:
                new.save_exits(tmp_path)
            except Killed:
                pass
            else:
                reached.append(step)
        found = Engine.from_pretrained(tmp_path, device="cpu", max_batch_tokens=500)
        assert (found.certificate is None) == (found.made_with == makings[1])
        return found.made_with

    reached: list[int] = []
    found = []
    while not reached:
        found.append(making_after(len(found)))
    assert all(each in makings for each in found)
    numbers = [makings.index(each) for each in found]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, 1)
    assert len(list(tmp_path.glob("exit_table-*"))) == 1


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_more_than_its_vocabulary() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    one = fingerprint(model, tokenizer)["tokenizer"]
    assert fingerprint(model, make_tokenizer())["tokenizer"] == one

    def changed(change: Callable[[Any], object]) -> str:
        other = copy.deepcopy(tokenizer)
        change(other)
        assert other.get_vocab() == tokenizer.get_vocab()
        return fingerprint(model, other)["tokenizer"]

    def cased(other: Any) -> None:
        other.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)

    def pairs_alike(other: Any) -> None:
        other.model_input_names = ["input_ids", "attention_mask"]

    def from_left(other: Any) -> None:
        other.truncation_side = "left"

    def at_five(other: Any) -> None:
        other.backend_tokenizer.enable_truncation(5)
        other.backend_tokenizer.enable_padding()

    assert len({one, *map(changed, (cased, pairs_alike, from_left))}) == 4
    assert changed(at_five) == one  # where it cuts is a setting of whoever asks it


def test_a_tokenizer_in_python_is_told_by_what_it_does() -> None:
    class Slow:
        is_fast, truncation_side = False, "right"
        model_input_names = ("input_ids",)

        def __init__(self, *, lower: bool) -> None:
            self.lower = lower

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, text: str, pair: str = "") -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in (text.lower() if self.lower else text) + pair]}

    cased, uncased, again = (fingerprint(make_model(), Slow(lower=lower)) for lower in (False, True, True))
    assert cased != uncased == again


# --------------------------------------------------------------------------------------------------------------------
# Full depth in 8 bits
# --------------------------------------------------------------------------------------------------------------------


def off_by(run: ExitRun, share: float) -> ExitRun:
    """A run whose float32 model answered a share of the texts otherwise than the last exit does."""
    reference = run.exit_logits[-1].clone()
    reference[: int(share * len(run))] = reference[: int(share * len(run))].roll(1, dims=-1)
    return replace(run, reference=reference)


def test_the_full_model_of_a_quantised_engine_has_to_pass_as_well(profiled: ProfileResult) -> None:
    engine = profiled.engine
    fresh = ExitRun.of(engine, FRESH)
    lossy = calibrate(engine, profiled.heldout, off_by(fresh, 0.2), PROMISE)
    assert (lossy.engine.settings.speed, lossy.engine.certificate) == (0.0, None)
    first = lossy.walk.trials[0]
    assert (first.speed, first.passed) == (0.0, False)
    assert first.risk == pytest.approx(0.2, abs=0.01)
    near = calibrate(engine, profiled.heldout, off_by(fresh, 0.002), PROMISE)
    assert near.engine.settings.speed > 0
    assert certificate_of(near.engine).reference == "float32"


def test_what_is_not_certified_is_neither_shown_nor_written_as_certified(
    profiled: ProfileResult, certified: Calibration, tmp_path: Path
) -> None:
    lossy = calibrate(profiled.engine, profiled.heldout, off_by(ExitRun.of(profiled.engine, FRESH), 0.2), PROMISE)
    shown = []
    for found in (lossy, certified):
        console = Console(width=200, record=True, file=io.StringIO())
        show.calibrated(console, found)
        shown.append(console.export_text())
    assert "Nothing is certified" in shown[0]
    assert "Certified:" not in shown[0]
    assert f"{lossy.walk.trials[0].risk:.2%} of float32" in shown[0]
    assert "Certified: an agreement of at least 0.95" in shown[1]
    assert "the development split of a task" in shown[1]
    lossy.save(tmp_path)
    assert CalibrationFile.read(tmp_path).certificate is None


@pytest.mark.skipif(not int8.is_available(), reason="this build of torch has no oneDNN")
def test_an_int8_certificate_is_bound_to_its_ranges(trained: Engine) -> None:
    engine = quantise(trained, TRAIN)
    found = calibrate(profile(engine, TRAIN, HELDOUT).engine, HELDOUT, FRESH, PROMISE).engine
    certificate = certificate_of(found)
    assert found.ranges is not None
    assert certificate.made_with["ranges"] == found.ranges.digest
    assert certificate.made_with["weight_bits"] == (8 if int8.largest_weight() == 127 else 7)
    other = int8.ActivationRanges({site: 2 * ranges for site, ranges in found.ranges.sites.items()})
    again = Engine(
        found.model, found.tokenizer, predictor=found.predictor, settings=found.settings, config=found.config,
        identity=found.identity, ranges=other, certificate=certificate,
    )  # fmt: skip
    assert again.certificate is None


# --------------------------------------------------------------------------------------------------------------------
# Without labels
# --------------------------------------------------------------------------------------------------------------------


def test_without_labels_scores_are_the_full_models_own(trained: Engine) -> None:
    """Fitted to the full model's own answers, its temperature would run to its bound and every score to 1."""
    found = profile(trained, TRAIN, unlabelled(HELDOUT))
    assert not found.scores_calibrated
    assert found.record()["scores_calibrated"] is False
    temperatures = found.engine.settings.temperatures
    assert temperatures[trained.depths[-1]] == pytest.approx(1, abs=1e-3)
    scores = (
        found.engine.replace(settings=replace(found.engine.settings, speed=0.0)).predict_columns(FRESH.texts).scores
    )
    plain = trained.predict_columns(FRESH.texts).scores
    assert np.allclose(scores, plain, atol=1e-3)
    assert (plain < 0.99).any()
    # An exit's scores are as near to the full model's as a temperature brings them.
    held = Outcomes(found.engine, found.heldout)
    full = torch.softmax(held.full_logits, -1)
    answers = held.answers(replace(found.engine.settings, speed=1.0))
    for column, depth in enumerate(held.depths[:-1]):

        def loss(temperature: float, column: int = column) -> float:
            return float(torch.nn.functional.cross_entropy(answers[column] / temperature, full))

        best = temperatures[depth]
        assert loss(best) <= min(loss(best * 1.05), loss(best / 1.05))


def test_with_labels_scores_are_calibrated(profiled: ProfileResult) -> None:
    assert profiled.scores_calibrated
    assert profiled.record()["scores_calibrated"] is True


def test_settings_come_back_with_their_digest(profiled: ProfileResult) -> None:
    settings = replace(profiled.engine.settings, check_layers=(1, 3), speed=0.1 + 0.2)
    again = ExitSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert again.digest == settings.digest != replace(settings, speed=0.3).digest
    assert settings.fusing
    # A folder from before answers were fused.
    older = {name: value for name, value in settings.to_dict().items() if name != "fusing"}
    assert ExitSettings.from_dict(json.loads(json.dumps(older))) == replace(settings, fusing={})


def test_numbers_of_numpy_are_settings_as_well(certified: Calibration) -> None:
    settings = replace(certified.engine.settings, speed=np.float32(0.3), temperatures={np.int64(1): np.float64(1.5)})
    assert certified.engine.replace(settings=settings).certificate is None
    assert json.loads(json.dumps(settings.to_dict()))["temperatures"] == {"1": 1.5}
    with pytest.raises(TypeError, match="speed must be a number, got '0.3'"):
        replace(settings, speed="0.3")


def test_an_engine_in_memory_may_be_given_its_certificate(certified: Calibration) -> None:
    engine = certified.engine
    parts = {"predictor": engine.predictor, "settings": engine.settings, "certificate": engine.certificate}
    again = Engine(engine.model, engine.tokenizer, config=EngineConfig(device="cpu"), **parts)  # type: ignore[arg-type]
    assert again.certificate == engine.certificate
