"""`geep.train`: plain fine-tuning, then exits fitted to its answers; the full model is the one that was fine-tuned."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import make_tokenizer, tiny_encoder, toy_task
from transformers import AutoTokenizer

from geep.acceleration import train, training
from geep.data import DataPlan, Parts, Split
from geep.distilling import FitSettings
from geep.engine import Engine
from geep.folder import Provenance
from geep.modeling import GeepForSequenceClassification
from geep.training import RECIPES, TrainResult, TrainSettings, fine_tune, parts_of

FITTING = FitSettings(epochs=5, batch_size=64)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    encoder.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int, *, seed: int) -> Path:
    texts, labels = toy_task(count, seed=seed)
    rows = [{"text": text, "label": "abc"[label]} for text, label in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> DataPlan:
    folder = tmp_path_factory.mktemp("data")
    return DataPlan(
        str(write_rows(folder / "toy.jsonl", 700, seed=0)),
        holdout=0.4,
        unlabelled=str(write_rows(folder / "more.jsonl", 400, seed=1)),
    )


def settings(recipe: str = "fitted", **changes: Any) -> TrainSettings:
    usual: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 4e-3, "max_length": 32}
    return TrainSettings(recipe, **(usual | changes))


def trained(plan: DataPlan, folder: Path, encoder: str, **options: Any) -> TrainResult:
    usual = {"settings": settings(), "fitting": FITTING, "plan": plan, "device": "cpu"}
    return train(plan.parts(), folder, encoder=encoder, **(usual | options))


@pytest.fixture(scope="module")
def made(plan: DataPlan, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("made") / "model"
    return folder, trained(plan, folder, encoder)


def test_the_full_model_is_the_one_that_was_fine_tuned(
    made: tuple[Path, TrainResult], plan: DataPlan, encoder: str, tmp_path: Path
) -> None:
    parts = replace(plan.parts(), unlabelled=None)
    plain = fine_tune(parts, tmp_path / "plain", encoder=encoder, settings=settings("vanilla"), device="cpu")
    assert (plain.dev, plain.steps) == (made[1].dev, made[1].steps)
    expected = GeepForSequenceClassification.from_pretrained(tmp_path / "plain")
    model = GeepForSequenceClassification.from_pretrained(made[0])
    for name, weight in expected.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    assert (expected.config.exit_layers, model.config.exit_layers) == ([], [1, 2])
    assert (model.config.exit_head, model.config.teacher_head) == ("conv", "mean")
    assert (model.config.text_pairs, AutoTokenizer.from_pretrained(made[0]).model_max_length) == (False, 32)


def test_every_exit_answers_as_the_full_model_does(made: tuple[Path, TrainResult]) -> None:
    folder, result = made
    assert result.exit_agreements is not None
    engine = Engine.from_pretrained(folder, device="cpu")
    texts, _ = toy_task(800, seed=7)
    answers = engine.exit_logits(engine.tokenize(texts).batch).argmax(-1)
    for layer, found in zip(engine.depths[:-1], (answers[:-1] == answers[-1]).float().mean(1).tolist(), strict=True):
        assert found > 0.9
        assert result.exit_agreements[layer] == pytest.approx(found, abs=0.06)


def test_what_was_done_is_noted(made: tuple[Path, TrainResult], plan: DataPlan) -> None:
    folder, result = made
    parts = plan.parts()
    assert parts.unlabelled is not None
    assert result.num_fitted == len(parts.train) + len(parts.unlabelled)
    assert not (folder / "work").exists()
    assert not (folder / "checkpoints").exists()
    record = Provenance.read(folder)
    assert record.about["exit_head"] == "conv"
    assert record.about["fitting"] == asdict(FITTING)
    assert record.result["exit_losses"].keys() == record.result["exit_agreements"].keys() == {"1", "2"}
    again, found = parts_of(folder)
    assert again == plan
    assert found.digests() == parts.digests()


def test_a_finished_folder_is_returned_and_another_request_is_refused(
    made: tuple[Path, TrainResult], plan: DataPlan, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = made
    monkeypatch.setattr(training, "fine_tune", None)
    assert trained(plan, folder, encoder) == replace(result, was_finished=True)
    for changes in (
        {"settings": settings(epochs=1)},
        {"settings": settings("geep", fit_exits=True)},
        {"exit_head": "mean"},
        {"exit_layers": [1]},
        {"fitting": replace(FITTING, seed=1)},
    ):
        with pytest.raises(ValueError, match="trained with other settings or data"):
            trained(plan, folder, encoder, **changes)
    fewer = replace(plan, unlabelled=None)
    with pytest.raises(ValueError, match="trained with other settings or data"):
        trained(fewer, folder, encoder)


def test_a_record_without_later_fields_is_of_the_same_request(
    made: tuple[Path, TrainResult], plan: DataPlan, encoder: str, tmp_path: Path
) -> None:
    record = Provenance.read(made[0])
    older = {name: value for name, value in record.about["fitting"].items() if name != "seed"}
    Provenance({**record.about, "fitting": older}, record.result, record.logs).write(tmp_path)
    assert trained(plan, tmp_path, encoder) == replace(made[1], was_finished=True)


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "where",
    ["training, fine-tune", "texts to learn from", "texts to choose on", "heads of all depths", "saved"],
)
def test_killed_at_any_point_the_same_call_goes_on(
    where: str,
    made: tuple[Path, TrainResult],
    plan: DataPlan,
    encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"

    def stop(what: str, done: int, total: int | None) -> None:
        if where in what and (not what.startswith("training") or done == total):
            raise Stopped

    save = training.save_with_exits

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        if where == "saved":
            patch.setattr(training, "save_with_exits", killed)
        with pytest.raises(Stopped):
            trained(plan, folder, encoder, progress=stop)
    assert not (folder / "training.json").exists()
    said: list[str] = []
    result = trained(plan, folder, encoder, progress=lambda what, *_: said.append(what))
    assert ("training, fine-tune" in said) == (where == "training, fine-tune")
    assert (result.steps, result.dev, result.exit_agreements) == (
        made[1].steps,
        made[1].dev,
        made[1].exit_agreements,
    )
    assert (folder / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()
    assert not (folder / "work").exists()


def test_exits_are_fitted_after_any_recipe(plan: DataPlan, encoder: str, tmp_path: Path) -> None:
    chosen = settings("geep", fit_exits=True, epochs=1)
    trained(plan, tmp_path / "model", encoder, settings=chosen, exit_layers=[1, 3], head="cls")
    parts = replace(plan.parts(), unlabelled=None)
    jointly = replace(chosen, fit_exits=False)
    joint = {"encoder": encoder, "settings": jointly, "exit_layers": [1, 3], "head": "cls", "device": "cpu"}
    train(parts, tmp_path / "joint", **joint)
    assert not (tmp_path / "joint" / "work").exists()
    before, after = (GeepForSequenceClassification.from_pretrained(tmp_path / name) for name in ("joint", "model"))
    assert before.config.exit_layers == after.config.exit_layers == [1, 3]
    assert (before.config.exit_head, after.config.exit_head, after.config.teacher_head) == ("cls", "conv", "cls")
    for name, weight in before.named_parameters():
        if not name.startswith("exits."):
            assert torch.equal(weight, after.get_parameter(name)), name


def test_a_recipe_that_trains_exits_leaves_the_folder_that_it_always_left(
    plan: DataPlan, encoder: str, tmp_path: Path
) -> None:
    """Folders made before exits were fitted are finished with the same request."""
    parts, chosen = replace(plan.parts(), unlabelled=None), settings("geep", epochs=1)
    options = {"encoder": encoder, "settings": chosen, "device": "cpu"}
    first = train(parts, tmp_path / "model", **options)
    record = Provenance.read(tmp_path / "model")
    older = {name: value for name, value in record.about["settings"].items() if name != "fit_exits"}
    Provenance({**record.about, "settings": older}, record.result, record.logs).write(tmp_path / "model")
    assert train(parts, tmp_path / "model", **options) == replace(first, was_finished=True)
    assert set(record.result) == {"steps", "seconds", "dev"}


def test_what_cannot_be_fitted_is_refused_before_anything_is_trained(
    plan: DataPlan, encoder: str, tmp_path: Path
) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            trained(plan, tmp_path / "model", encoder, **options)

    refused("recipe 'geep' fits no exits on them; leave them out, or set fit_exits", settings=settings("geep"))
    refused("recipe 'vanilla' fits no exits", settings=settings("vanilla"))
    refused("Unknown kind of heads 'max'", exit_head="max")
    refused(r"exit_layers must ascend within 1\.\.3", exit_layers=[4])
    refused(r"exit_layers are \[\] and the encoder has 4 layers", exit_layers=[])
    parts = plan.parts()
    with pytest.raises(ValueError, match="no rows for profiling, which say when to stop"):
        train(replace(parts, profile=parts.profile.select(())), tmp_path / "model", encoder=encoder)
    with pytest.raises(ValueError, match="training rows are single texts and the texts without labels pairs"):
        replace(parts, unlabelled=Split(["a"], ["b"]))
    tiny_encoder("bert", num_hidden_layers=1).save_pretrained(tmp_path / "flat")
    make_tokenizer().save_pretrained(tmp_path / "flat")
    with pytest.raises(ValueError, match="the encoder has 1 layers; expected a layer before the last"):
        trained(plan, tmp_path / "model", str(tmp_path / "flat"))
    assert not (tmp_path / "model" / "work" / "fine-tuned").exists()


class OtherProcess:
    """What a process that is not the first one is told by accelerate; while it waits, the first one writes."""

    is_main_process = False
    source: ClassVar[Path]
    folder: ClassVar[Path]

    def wait_for_everyone(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == ["work"]
        (self.folder / "training.json").write_bytes((self.source / "training.json").read_bytes())


def test_of_several_processes_the_first_one_fits_and_the_others_wait(
    made: tuple[Path, TrainResult], plan: DataPlan, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherProcess, "folder", tmp_path / "model", raising=False)
    monkeypatch.setattr(OtherProcess, "source", made[0], raising=False)
    monkeypatch.setattr(training, "PartialState", OtherProcess)
    monkeypatch.setattr(training, "fit_exits", None)
    assert trained(plan, tmp_path / "model", encoder) == made[1]


# Texts without labels


def test_texts_that_have_another_use_are_no_further_texts(
    plan: DataPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = plan.parts()
    assert parts.unlabelled is not None
    assert parts.unlabelled.labels is None
    own = [text for part in (parts.train, parts.profile, parts.calibration) for text in part.texts]
    assert not set(own) & set(parts.unlabelled.texts)
    assert len(set(parts.unlabelled.texts)) == len(parts.unlabelled)
    assert parts.learned == (parts.train, parts.profile, parts.unlabelled)
    # What has labels and what has none teach together, by the full model's answers.
    assert list(parts.teaching.texts) == [*parts.train.texts, *parts.unlabelled.texts]
    assert parts.teaching.labels is None
    assert replace(parts, unlabelled=None).teaching is parts.train
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", 100, seed=0)
    test = write_rows(tmp_path / "set" / "test.jsonl", 60, seed=5)
    asked = DataPlan(str(tmp_path / "set"), unlabelled=str(test))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="Of 60 texts without labels none is left"):
        asked.parts()
    assert "60 of 60 texts without labels are in the test split" in caplog.text
    with pytest.raises(ValueError, match="none is left"):
        replace(asked, unlabelled=str(tmp_path / "set" / "train.jsonl")).parts()


def test_the_rows_are_divided_alike_whatever_further_texts_there_are(plan: DataPlan) -> None:
    with_more, without = plan.parts(), replace(plan, unlabelled=None).parts()
    assert without.unlabelled is None
    assert without.learned == (without.train, without.profile)
    assert {name: with_more.digests()[name] for name in without.digests()} == without.digests()
    assert isinstance(with_more, Parts)


def test_every_recipe_says_where_its_exits_come_from() -> None:
    for name, row in RECIPES.items():
        chosen = TrainSettings(name)
        assert chosen.fits_exits == row.fits_exits
        assert chosen.makes_exits == (name != "vanilla")
        assert TrainSettings(name, fit_exits=True).fits_exits
    assert TrainSettings().recipe == "fitted"
    assert [name for name, row in RECIPES.items() if row.fits_exits] == ["fitted", "tune"]
