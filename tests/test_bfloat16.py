"""bfloat16 on CPUs: the default where the CPU multiplies it, held against the float32 model, and run as certified."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FRESH, HELDOUT, MAX_LENGTH, NUM_LAYERS, TRAIN, alone, make_model, no_gpu, random_batch
from typer.testing import CliRunner

from geep.backends import PackedBackend
from geep.backends.int8 import is_available
from geep.calibration import Calibration, ExitRun, calibrate, profile, quantise, save_refusal
from geep.cli import app
from geep.distilling import FeatureCache
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.evaluation import evaluate
from geep.folder import CalibrationFile
from geep.modeling import HEADS
from geep.promise import NothingCertifiedError, Promise

pytestmark = pytest.mark.bfloat16

PROMISE = Promise(min_agreement=0.95)


@pytest.fixture(scope="module")
def rounded(trained: Engine) -> Engine:
    """The trained model by default, where the CPU multiplies bfloat16."""
    return Engine(trained.model, trained.tokenizer, config=EngineConfig(device="cpu", max_batch_tokens=500))


@pytest.fixture(scope="module")
def certified(rounded: Engine) -> Calibration:
    found = profile(rounded, TRAIN, HELDOUT)
    return calibrate(found.engine, found.heldout, FRESH, PROMISE)


@pytest.fixture
def folder(certified: Calibration, tmp_path: Path) -> Path:
    """A folder that was certified in bfloat16."""
    certified.engine.model.save_pretrained(tmp_path)
    certified.engine.tokenizer.save_pretrained(tmp_path)
    certified.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("head", HEADS)
def test_packed_texts_in_bfloat16_are_near_the_float32_model(head: str) -> None:
    model, batch = make_model(head=head), random_batch(20, seed=1)
    backend = PackedBackend.build(model, dtype="bfloat16")
    live = backend.start(batch)
    for layer in range(1, NUM_LAYERS + 1):
        live = backend.advance(live, layer, 20)
    found = backend.exit_logits(live, NUM_LAYERS, 0, 20)
    expected = alone(model, batch)[-1]
    assert live.hidden.dtype == torch.bfloat16  # logits of the exits may be finer
    assert 0 < (found - expected).abs().mean() < 0.15 * expected.abs().mean()  # the weights are loud
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_head_from_outside_reads_float32() -> None:
    model, batch = make_model(head="conv"), random_batch(6, seed=2)
    backend = PackedBackend.build(model, dtype="bfloat16")
    live = backend.advance(backend.start(batch), 1, 6)
    found = backend.exit_logits(live, 1, 2, 5, head=model.head_at(1))
    assert found.dtype == torch.float32
    own = backend.exit_logits(live, 1, 2, 5).float()
    assert 0 < (found - own).abs().mean() < 0.05 * own.abs().mean()


def test_it_is_the_default_where_the_cpu_multiplies_it(rounded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (rounded.deployment.dtype, rounded.deployment.is_rounded) == ("bfloat16", True)
    assert rounded.deployment.made_with["weight_bits"] == 16
    padded = replace(rounded.config, backend="padded")
    assert Engine(rounded.model, rounded.tokenizer, config=padded).deployment.dtype == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", no_gpu)
    plain = Engine(rounded.model, rounded.tokenizer, config=rounded.config)
    assert (plain.deployment.dtype, plain.deployment.is_rounded) == ("float32", False)


def test_its_float32_model_is_at_hand_to_the_bit(rounded: Engine, trained: Engine) -> None:
    batch = trained.tokenize(FRESH.texts).batch
    expected = trained.run_tokens(batch, settings=ExitSettings()).logits
    assert torch.equal(rounded.in_float32().run_tokens(batch, settings=ExitSettings()).logits, expected)
    found = rounded.run_tokens(batch, settings=ExitSettings()).logits
    assert 0 < (found - expected).abs().max() < 0.1


def test_promises_are_about_the_float32_model(certified: Calibration, rounded: Engine) -> None:
    certificate = certified.engine.certificate
    assert certificate is not None
    assert certified.engine.settings.speed > 0
    assert (certificate.reference, certificate.made_with["dtype"]) == ("float32", "bfloat16")
    run = ExitRun.of(certified.engine, HELDOUT)
    assert run.reference is not None
    found = certified.engine.predict_columns(FRESH.texts)
    full = rounded.in_float32().predict_columns(FRESH.texts)
    assert np.mean(found.probabilities.argmax(1) == full.probabilities.argmax(1)) >= 0.95
    with pytest.raises(ValueError, match="run of an engine in bfloat16 lacks the float32 model's answers"):
        calibrate(certified.engine, replace(run, reference=None), FRESH, PROMISE)


def test_a_folder_runs_in_the_dtype_that_it_was_certified_in(
    folder: Path, trained: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine.from_pretrained(folder, device="cpu")
    assert engine.deployment.dtype == "bfloat16"
    assert engine.certificate is not None
    named = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    assert (named.deployment.dtype, named.certificate) == ("float32", None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", no_gpu)
    with caplog.at_level(logging.WARNING):
        elsewhere = Engine.from_pretrained(folder, device="cpu")
    assert (elsewhere.deployment.dtype, elsewhere.certificate) == ("float32", None)
    assert "The exits are those of bfloat16, which this machine does not run" in caplog.text


def test_a_folder_that_was_certified_in_float32_stays_in_it(trained: Engine, tmp_path: Path) -> None:
    plain = Engine(trained.model, trained.tokenizer, config=replace(trained.config, dtype="float32"))
    found = profile(plain, TRAIN, HELDOUT)
    plain.save_pretrained(tmp_path)
    calibrate(found.engine, found.heldout, FRESH, PROMISE).save(tmp_path)
    assert Engine.from_pretrained(tmp_path, device="cpu").deployment.dtype == "float32"


@pytest.mark.skipif(not is_available(), reason="this build of torch has no 8-bit products")
def test_a_folder_that_was_certified_in_8_bits_stays_in_them(trained: Engine, tmp_path: Path) -> None:
    engine = quantise(Engine(trained.model, trained.tokenizer, config=trained.config), TRAIN)
    found = profile(engine, TRAIN, HELDOUT)
    engine.save_pretrained(tmp_path)
    calibrate(found.engine, found.heldout, FRESH, PROMISE).save(tmp_path)
    again = Engine.from_pretrained(tmp_path, device="cpu")
    assert again.deployment.dtype == "int8"
    assert again.certificate is not None


def test_where_nothing_could_be_certified_nothing_is_rounded(
    folder: Path, certified: Calibration, trained: Engine
) -> None:
    save_refusal(certified.engine, folder, NothingCertifiedError("too few"))
    engine = Engine.from_pretrained(folder, device="cpu")
    assert (engine.deployment.dtype, engine.settings.speed) == ("float32", 0.0)
    batch = engine.tokenize(FRESH.texts).batch
    same = replace(engine.settings, temperatures={})
    expected = trained.run_tokens(batch, settings=ExitSettings()).logits
    assert torch.equal(engine.run_tokens(batch, settings=same).logits, expected)


def test_a_copy_of_a_folder_without_certificate_is_not_rounded_either(
    folder: Path, certified: Calibration, tmp_path: Path
) -> None:
    save_refusal(certified.engine, folder, NothingCertifiedError("too few"))
    Engine.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "copy")
    assert Engine.from_pretrained(tmp_path / "copy", device="cpu").deployment.dtype == "float32"


def test_a_folder_runs_on_the_backend_that_it_was_certified_on(trained: Engine, tmp_path: Path) -> None:
    padded = Engine(trained.model, trained.tokenizer, config=replace(trained.config, backend="padded"))
    found = profile(padded, TRAIN, HELDOUT)
    padded.save_pretrained(tmp_path)
    calibrate(found.engine, found.heldout, FRESH, PROMISE).save(tmp_path)
    for options in ({}, {"dtype": "float32"}):
        again = Engine.from_pretrained(tmp_path, device="cpu", **options)
        assert (again.deployment.backend_name, again.deployment.dtype) == ("padded", "float32")
        assert again.certificate is not None
    named = Engine.from_pretrained(tmp_path, device="cpu", backend="packed")
    assert (named.deployment.backend_name, named.deployment.dtype, named.certificate) == ("packed", "float32", None)


def test_a_certificate_of_an_engine_held_against_itself_counts_no_more(certified: Calibration) -> None:
    known = certified.engine.certificate
    assert known is not None
    assert certified.engine.replace(certificate=replace(known, reference="bfloat16")).certificate is None


def test_heads_are_not_taught_by_rounded_scores(rounded: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32 model's scores, found an engine in bfloat16"):
        FeatureCache.of(rounded, HELDOUT, tmp_path)


@pytest.mark.parametrize("family", ["mpnet", "modernbert", "deberta-v2"])
def test_a_model_that_was_cast_as_a_whole_runs_packed(family: str) -> None:
    model, batch = make_model(family), random_batch(12, seed=3, longest=40)
    expected = alone(model, batch)[-1]
    cast = model.to(torch.bfloat16)
    backend = PackedBackend.build(cast, dtype="bfloat16")
    live = backend.start(batch)
    for layer in range(1, NUM_LAYERS + 1):
        live = backend.advance(live, layer, 12)
    found = backend.exit_logits(live, NUM_LAYERS, 0, 12)
    assert (found - expected).abs().mean() < 0.3 * expected.abs().mean()  # the weights are loud, and embeddings rounded


def test_calibrating_again_takes_the_dtype_of_the_profile(folder: Path, rounded: Engine, tmp_path: Path) -> None:
    found = profile(rounded, TRAIN, HELDOUT)
    found.save(folder)
    assert CalibrationFile.read(folder).record["profile"]["made_with"]["dtype"] == "bfloat16"
    save_refusal(found.engine, folder, NothingCertifiedError("too few"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{text}"}}\n' for text in FRESH.texts), encoding="utf-8")
    (folder / "training.json").write_text('{"about": {"classifier": "elsewhere"}, "result": {}, "logs": []}')
    arguments = ["calibrate", str(folder), "--texts", str(rows), "--min-agreement", "0.95", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    certificate = CalibrationFile.read(folder).certificate
    assert certificate is not None
    assert certificate["made_with"]["dtype"] == "bfloat16"


def test_a_text_of_most_tokens_runs_in_bfloat16(rounded: Engine) -> None:
    texts = ["", "w1 " * (2 * MAX_LENGTH), "w2"]
    found = rounded.predict_columns(texts, speed=0.0)
    expected = rounded.in_float32().predict_columns(texts)
    assert np.allclose(found.probabilities, expected.probabilities, atol=0.05)


def test_rivals_get_it_too(certified: Calibration) -> None:
    found = evaluate(certified.engine, FRESH, max_texts=40, rounds=1, sweep=())
    dtypes = {row.group: row.dtype for row in found.rows}
    assert dtypes["pipeline"] == dtypes["pipeline-sorted"] == "float32"
    assert dtypes["pipeline-bfloat16"] == dtypes["fastbert"] == dtypes["full"] == "bfloat16"
    assert found.row("pipeline").agreement == 1.0
    assert min(row.verified for row in found.rows) > 0.9
