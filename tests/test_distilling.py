"""Exits taught by the full model: features are what heads read, heads come near to it, and it does not move."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FRESH, HELDOUT, SEP, TRAIN, make_model, make_tokenizer, random_texts, unlabelled
from torch.nn import functional as F

from geep.data import Split
from geep.distilling import FeatureCache, FitSettings, FittedHeads, fit_heads, with_exits
from geep.engine import Engine, EngineConfig
from geep.modeling import HEADS, GeepForSequenceClassification

KINDS = sorted(HEADS)


def make_engine(**config: Any) -> Engine:
    return Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu", **config))


@pytest.fixture(scope="module")
def caches(trained: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, FeatureCache]:
    folder = tmp_path_factory.mktemp("features")
    parts = {"seen": unlabelled(TRAIN), "heldout": unlabelled(HELDOUT)}
    one, other = (FeatureCache.of(trained, part, folder / name, kind="mean+max") for name, part in parts.items())
    return one, other


@pytest.fixture(scope="module")
def fitted(trained: Engine, caches: tuple[FeatureCache, FeatureCache]) -> FittedHeads:
    return fit_heads(*caches, trained.model.config, settings=FitSettings(batch_size=64, epochs=6))


def test_features_are_what_heads_read(caches: tuple[FeatureCache, FeatureCache], trained: Engine) -> None:
    cache = caches[1]
    assert (len(cache), cache.depths) == (len(HELDOUT), trained.depths[:-1])
    rows = [0, 7, 123]
    for row in rows:
        inputs = trained.tokenizer(HELDOUT.texts[row], return_tensors="pt")
        with torch.no_grad():
            states = trained.model(**inputs, output_hidden_states=True).hidden_states
            full = trained.model(**inputs).logits[0]
        for column, depth in enumerate(cache.depths):
            tokens = states[depth][0]
            expected = torch.cat([tokens.mean(0), tokens.amax(0)])
            assert np.allclose(cache.features[row, column], expected, atol=5e-3)
        assert np.allclose(cache.logits[row], full, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["packed", "padded"])
def test_features_are_the_same_on_every_backend(kind: str, backend: str, tmp_path: Path) -> None:
    texts = Split([*random_texts(20, seed=2), "", "w1"])
    engines = [make_engine(backend=backend), make_engine()]
    for engine in engines:
        engine.model.config.separator_id = SEP
    found, again = (FeatureCache.of(each, texts, tmp_path / str(id(each)), kind=kind) for each in engines)
    assert np.allclose(found.features, again.features, atol=2e-3)
    tokens = engines[0].tokenize(texts.texts).batch.lengths
    shapes = {"cls": (22, 3, 32), "mean": (22, 3, 32), "mean+max": (22, 3, 64)}
    assert found.features.shape == shapes.get(kind, (tokens.sum(), 3, 32))
    assert found.lengths.tolist() == (np.ones(22) if kind in shapes else tokens).tolist()


def test_a_killed_pass_over_texts_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.distilling.features._TOKENS_AT_A_TIME", 40)
    texts, engine = Split(["w1 w2 w3"] * 30), make_engine()
    whole = FeatureCache.of(engine, texts, tmp_path / "whole")
    told: list[int] = []

    def stop(what: str, done: int, total: int | None) -> None:
        told.append(done)
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.of(engine, texts, tmp_path / "cut", progress=stop)
    again = FeatureCache.of(engine, texts, tmp_path / "cut", progress=stop)
    assert told == [8, 16, 24, 30]
    assert again.features.tobytes() == whole.features.tobytes()
    assert again.logits.tobytes() == whole.logits.tobytes()
    told.clear()
    FeatureCache.of(engine, texts, tmp_path / "cut", progress=stop)
    assert told == []  # all there
    # Of other texts, for another head or of another model: anew.
    FeatureCache.of(engine, Split(["w1 w2 w4"] * 30), tmp_path / "whole", progress=lambda *_: told.append(1))
    FeatureCache.of(engine, texts, tmp_path / "whole", kind="mean", progress=lambda *_: told.append(2))
    assert told == [1] * 4 + [2] * 4


def test_a_journal_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    texts, engine = Split(random_texts(5)), make_engine()
    whole = FeatureCache.of(engine, texts, tmp_path)
    before = whole.features.tobytes()
    (tmp_path / "features.json").write_text("{", encoding="utf-8")
    assert FeatureCache.of(engine, texts, tmp_path).features.tobytes() == before
    assert json.loads((tmp_path / "features.json").read_text("utf-8"))["rows"] == 5


def test_fitted_exits_answer_as_the_full_model_which_does_not_move(
    trained: Engine, fitted: FittedHeads, caches: tuple[FeatureCache, FeatureCache]
) -> None:
    batch = trained.tokenize(FRESH.texts).batch
    before = trained.exit_logits(batch)
    after = Engine(with_exits(trained.model, fitted), trained.tokenizer, config=trained.config).exit_logits(batch)
    assert torch.equal(after[-1], before[-1])  # bit for bit
    agreement = [float((each.argmax(-1) == before[-1].argmax(-1)).float().mean()) for each in after[:-1]]
    assert min(agreement) > 0.95
    assert fitted.epochs <= 6


def test_a_head_of_its_own_answers_as_it_was_fitted(fitted: FittedHeads, caches: tuple[FeatureCache, Any]) -> None:
    """The standardised features that it learned from are folded into its weights."""
    held = caches[1]
    (batch,) = held.batches(len(held), torch.device("cpu"))
    with torch.no_grad():
        found = batch.answers(fitted.heads)
    for each, expected in zip(found, fitted.losses, strict=True):
        assert float(F.cross_entropy(each, batch.logits.softmax(-1))) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_every_kind_are_fitted_and_answer_in_an_engine_as_they_did(
    kind: str, trained: Engine, tmp_path: Path
) -> None:
    parts = [unlabelled(part).select(range(count)) for part, count in ((TRAIN, 400), (HELDOUT, 100))]
    seen, held = (FeatureCache.of(trained, part, tmp_path / str(len(part)), kind=kind) for part in parts)
    fitted = fit_heads(seen, held, trained.model.config, settings=FitSettings(batch_size=32, epochs=4))
    (batch,) = held.batches(len(held), torch.device("cpu"))
    with torch.no_grad():
        expected = batch.answers(fitted.heads)
    target = batch.logits.softmax(-1)
    guess = float(F.cross_entropy(target.mean(0).log().expand_as(target), target))
    assert max(fitted.losses) < 0.8 * guess
    engine = Engine(with_exits(trained.model, fitted), trained.tokenizer, config=trained.config)
    found = engine.exit_logits(engine.tokenize(parts[1].texts).batch)
    # Features are kept in half precision.
    assert torch.allclose(found[:-1], expected, atol=0.02 * float(expected.abs().max()))
    assert {module.p for module in engine.model.exits.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


def test_fitting_leaves_torchs_random_numbers_alone(caches: tuple[FeatureCache, FeatureCache], trained: Engine) -> None:
    before = torch.random.get_rng_state()
    fit_heads(*caches, trained.model.config, settings=FitSettings(epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_the_disk_cannot_hold_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("geep.distilling.features.shutil.disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"What 'conv' heads read of the texts takes .* GB.*give fewer texts"):
        FeatureCache.of(make_engine(), Split(random_texts(30)), tmp_path, kind="conv")
    assert list(tmp_path.iterdir()) == []


def test_fitted_exits_are_kept_with_their_model(trained: Engine, fitted: FittedHeads, tmp_path: Path) -> None:
    model = with_exits(trained.model, fitted)
    assert (model.config.exit_head, model.config.teacher_head) == ("mean+max", "mean")
    assert model.encoder is trained.model.encoder
    model.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    again = Engine.from_pretrained(tmp_path, device="cpu", max_batch_tokens=500)
    batch = trained.tokenize(FRESH.texts[:50]).batch
    expected = Engine(model, trained.tokenizer, config=trained.config).exit_logits(batch)
    assert torch.equal(again.exit_logits(batch), expected)
    twice = with_exits(model, fitted)
    assert twice.config.teacher_head == "mean"


@pytest.mark.parametrize("layers", [None, [1], [2, 3]])
def test_a_model_without_exits_gets_some(layers: list[int] | None, tmp_path: Path) -> None:
    model = make_model(exit_layers=[])
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
    texts = Split(random_texts(40))
    cache = FeatureCache.of(engine, texts, tmp_path, exit_layers=layers)
    assert cache.kind == "conv"
    made = with_exits(model, fit_heads(cache, cache, model.config, settings=FitSettings(epochs=1, batch_size=8)))
    assert made.config.depths == (*(layers or [1, 2]), 4)
    batch = engine.tokenize(texts.texts).batch
    after = Engine(made, make_tokenizer(), config=EngineConfig(device="cpu")).exit_logits(batch)
    assert torch.equal(after[-1], engine.exit_logits(batch)[-1])


def test_of_two_layers_the_first_gets_an_exit(tmp_path: Path) -> None:
    engine = Engine(
        make_model(exit_layers=[], num_hidden_layers=2), make_tokenizer(), config=EngineConfig(device="cpu")
    )
    assert FeatureCache.of(engine, Split(random_texts(4)), tmp_path).depths == (1,)


def test_the_same_features_give_the_same_heads(caches: tuple[FeatureCache, FeatureCache], trained: Engine) -> None:
    settings = FitSettings(batch_size=256, epochs=1)
    one, other = (fit_heads(*caches, trained.model.config, settings=settings) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for x, y in zip(one.heads, other.heads, strict=True)
        for a, b in zip(x.parameters(), y.parameters(), strict=True)
    )
    assert fit_heads(*caches, trained.model.config, settings=replace(settings, seed=1)).losses != one.losses


def test_several_labels_are_taught_each_by_itself(caches: tuple[FeatureCache, FeatureCache], trained: Engine) -> None:
    found = fit_heads(*caches, trained.model.config, settings=FitSettings(batch_size=64, epochs=3), multi_label=True)
    logits = torch.from_numpy(np.array(caches[1].logits))
    least = float(F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(-1).mean())
    guess = logits.sigmoid().mean(0).logit().expand_as(logits)
    most = float(F.binary_cross_entropy_with_logits(guess, logits.sigmoid(), reduction="none").sum(-1).mean())
    assert all(least <= loss < most for loss in found.losses)


def test_what_cannot_be_fitted_is_refused(caches: tuple[FeatureCache, FeatureCache], tmp_path: Path) -> None:
    texts = Split(random_texts(4))
    with pytest.raises(ValueError, match=r"Unknown kind of heads 'max'; known: \['attention', 'cls', 'conv'"):
        FeatureCache.of(make_engine(), texts, tmp_path, kind="max")
    with pytest.raises(ValueError, match="no texts to learn from"):
        FeatureCache.of(make_engine(), Split([]), tmp_path)
    for layers in ([2, 1], [0, 1], [4], [1, 1]):
        with pytest.raises(ValueError, match=r"exit_layers must ascend within 1\.\.3"):
            FeatureCache.of(make_engine(), texts, tmp_path, exit_layers=layers)
    other = FeatureCache.of(make_engine(), texts, tmp_path, kind="mean")
    with pytest.raises(ValueError, match="'mean.max' heads at .* and of 'mean' heads"):
        fit_heads(caches[0], other, make_model().config)
    for change in ({"epochs": 0}, {"dropout": 1.0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            FitSettings(**change)  # type: ignore[arg-type]


def test_a_model_that_overflows_teaches_nothing(tmp_path: Path) -> None:
    model: GeepForSequenceClassification = make_model()
    with torch.no_grad():
        model.teacher.out.weight.fill_(3e38)
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
    with pytest.raises(FloatingPointError, match="Text 0 has logits that are not finite"):
        FeatureCache.of(engine, Split(random_texts(4)), tmp_path)


def test_of_more_texts_than_there_is_room_for_some_are_learned_from(trained: Engine, tmp_path: Path) -> None:
    texts = unlabelled(TRAIN).select(range(60))
    whole = FeatureCache.of(trained, texts, tmp_path / "whole")
    room = whole.features.nbytes / 2e9
    cache = FeatureCache.of(trained, texts, tmp_path / "half", max_gigabytes=room)
    assert cache.features.nbytes <= room * 1e9
    assert 20 < len(cache) < 40
    assert len(cache.texts) == len(cache)
    places = [texts.texts.index(text) for text in cache.texts.texts]
    assert np.array_equal(cache.logits, whole.logits[places])
    other = FeatureCache.of(trained, texts, tmp_path / "other", max_gigabytes=room, seed=1)
    assert list(other.texts.texts) != list(cache.texts.texts)
    with pytest.raises(ValueError, match="No text's features fit"):
        FeatureCache.of(trained, texts, tmp_path / "none", max_gigabytes=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_fitted_on_a_gpu_and_answer_in_an_engine_there(kind: str, trained: Engine, tmp_path: Path) -> None:
    parts = [unlabelled(part).select(range(count)) for part, count in ((TRAIN, 400), (HELDOUT, 100))]
    there = Engine(copy.deepcopy(trained.model), trained.tokenizer, config=EngineConfig(device="cuda", dtype="float32"))
    seen, held = (FeatureCache.of(there, part, tmp_path / str(len(part)), kind=kind) for part in parts)
    settings = FitSettings(batch_size=32, epochs=4)
    fitted = fit_heads(seen, held, there.model.config, settings=settings, device="cuda")
    assert {weight.device.type for head in fitted.heads for weight in head.parameters()} == {"cuda"}
    expected = fitted.logits(held)
    engine = Engine(with_exits(there.model, fitted), trained.tokenizer, config=there.config)
    found = engine.exit_logits(engine.tokenize(parts[1].texts).batch)
    assert torch.allclose(found[:-1], expected[:-1], atol=0.02 * float(expected.abs().max()))
