"""An engine answers like the model alone, in the caller's order, whatever the batches; bad parts are refused."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    MAX_LENGTH,
    NUM_LAYERS,
    WORDS,
    alone,
    fit_predictor,
    make_engine,
    make_model,
    make_tokenizer,
    random_batch,
    random_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from geep.backends import BACKENDS
from geep.engine import Engine, EngineConfig, ExitSettings, Prediction
from geep.exits import AGREEMENT, AgreementScore, follow, profile_exits
from geep.modeling import FAMILIES

TEXTS = [*random_texts(40, seed=7), "", ("w1 w2", "w3"), ("w9", ""), *random_texts(6, seed=8, longest=30)]
SCORES = {0: (-0.5, 0.6, 0.0), 1: (-1.0, 0.5, 0.2), 2: (0.3, 0.4, -0.1), 3: (0.5, 0.9, 0.3)}
AGREEMENTS = {depth: AgreementScore(*weights) for depth, weights in SCORES.items()}
RULES = {
    "continue": ExitSettings(speed=0.3),
    "stop": ExitSettings(speed=0.3, on_miss="stop", quantile=0.7),
    "lexical": ExitSettings(speed=0.2, lexical_exit=True, quantile=0.3),
    "lexical stop": ExitSettings(speed=0.1, lexical_exit=True, on_miss="stop", quantile=0.9),
    "margin": ExitSettings(speed=0.4, criterion="margin", quantile=0.05),
    "agreement": ExitSettings(speed=0.3, criterion=AGREEMENT, agreement=AGREEMENTS, lexical_exit=True, quantile=0.05),
    "few checks": ExitSettings(speed=0.4, check_layers=(2,), quantile=0.05),
    "few checks stop": ExitSettings(speed=0.3, check_layers=(1, 3), on_miss="stop", lexical_exit=True),
    "no checks": ExitSettings(speed=0.3, check_layers=(), lexical_exit=True),
}
TEMPERATURES = {0: 1.1, 1: 1.3, 2: 0.9, 3: 0.7, NUM_LAYERS: 1.2}
Expected = tuple[torch.Tensor, np.ndarray, np.ndarray]
every_rule = pytest.mark.parametrize("rule", list(RULES))
every_backend = pytest.mark.parametrize("backend", list(BACKENDS))


def expected_run(engine: Engine, batch: Any, chosen: ExitSettings) -> Expected:
    """Logits and exit layers by the rule on a profile, each text run by Hugging Face's layers alone.

    The last value tells which texts are so near the threshold that rounding may decide.
    """
    depths, logits = engine.depths, alone(engine.model, batch)
    found = engine.predictor.predict(
        torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths), speed=chosen.speed, quantile=chosen.quantile
    )
    depths, logits = (0, *depths), torch.cat([found.lexical_logits[None], logits])
    temperatures = [chosen.temperature(depth) for depth in depths]
    scores = [chosen.agreement[depth] for depth in depths[:-1]] if chosen.agreement else None
    profile = profile_exits(
        logits, depths, criterion=chosen.criterion, temperatures=temperatures, agreement=scores,
        multi_label=engine.multi_label,
    )  # fmt: skip
    asked = [depth for depth in depths if chosen.check_layers is None or depth in (0, *chosen.check_layers, depths[-1])]
    predicted = np.array([next(a for a in asked if a >= layer) for layer in found.exit_layers.tolist()])
    predicted = np.searchsorted(depths, predicted)
    profile.uncertainty[:, ~np.isin(depths, asked)] = 1.0
    if chosen.lexical_exit:
        predicted = np.where(profile.uncertainty[:, 0] < chosen.speed, 0, predicted)
    column = follow(profile, predicted, speed=chosen.speed, on_miss=chosen.on_miss)
    scaled = logits / torch.tensor(temperatures)[:, None, None]
    near = (np.abs(profile.uncertainty - chosen.speed) < 1e-5).any(1)
    return scaled[torch.from_numpy(column), torch.arange(len(batch))], np.array(depths)[column], near


# Answers


@every_rule
@every_backend
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_run_is_the_rule_on_the_models_own_exits(
    rule: str, backend: str, engines: dict[str, Engine], expected: dict[str, Expected], data: st.DataObject
) -> None:
    config = EngineConfig(
        max_batch_tokens=data.draw(st.sampled_from([1, 17, 64, 300, 10_000])),
        window_tokens=data.draw(st.sampled_from([1, 50, 200, 100_000])),
    )
    chosen = replace(RULES[rule], temperatures=TEMPERATURES)
    engine = with_config(engines[backend], config).replace(settings=chosen)
    order = data.draw(st.permutations(range(len(TEXTS))))
    picked = order[: data.draw(st.integers(1, len(TEXTS)))]
    batch = engine.tokenize([TEXTS[i] for i in picked]).batch
    run = engine.run_tokens(batch)
    logits, layers, near = expected[rule]
    sure = ~near[list(picked)]
    assert sure.mean() > 0.9 or len(picked) < 10
    assert run.exit_layers[sure].tolist() == layers[list(picked)][sure].tolist()
    assert torch.allclose(run.logits[sure], logits[list(picked)][sure], atol=5e-5)


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    """The same model and table on every backend."""
    made = {name: make_engine(config=EngineConfig(device="cpu", backend=name), table=False) for name in BACKENDS}
    predictor = fit_predictor(made["packed"])
    return {name: engine.replace(predictor=predictor) for name, engine in made.items()}


@pytest.fixture(scope="module")
def expected(engines: dict[str, Engine]) -> dict[str, Expected]:
    engine = engines["packed"]
    batch = engine.tokenize(TEXTS).batch
    return {name: expected_run(engine, batch, replace(rule, temperatures=TEMPERATURES)) for name, rule in RULES.items()}


def with_config(engine: Engine, config: EngineConfig) -> Engine:
    other = engine.replace()
    other.config = config
    return other


def test_the_rules_above_use_every_kind_of_exit(engines: dict[str, Engine]) -> None:
    seen = set()
    for rule in RULES.values():
        batch = engines["packed"].tokenize(TEXTS).batch
        run = engines["packed"].run_tokens(batch, settings=replace(rule, temperatures=TEMPERATURES))
        seen |= set(run.exit_layers.tolist())
        assert (run.exit_layers >= run.predicted_layers).all()
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_predictions_equal_the_model_run_on_each_text_alone(family: str) -> None:
    model = make_model(family)
    for name, backend in BACKENDS.items():
        if not backend.supports(family):
            continue
        engine = Engine(
            model, make_tokenizer(), config=EngineConfig(device="cpu", backend=name, max_batch_tokens=90),
            settings=ExitSettings(speed=0.4),
        )  # fmt: skip
        found = engine.predict(TEXTS)
        logits = alone(model, engine.tokenize(TEXTS).batch)
        for text, prediction in enumerate(found):
            scores = logits[engine.depths.index(prediction.exit_layer), text].softmax(-1)
            assert list(prediction.scores.values()) == pytest.approx(scores.tolist(), abs=2e-5)
            assert prediction.score == max(prediction.scores.values())
            assert prediction.label == max(prediction.scores, key=lambda label: prediction.scores[label])
            assert prediction.predicted_layer is None
            assert not prediction.truncated
        assert len({prediction.exit_layer for prediction in found}) > 1


def test_speed_0_is_the_full_model(tiny_engine: Engine) -> None:
    found = tiny_engine.predict(TEXTS, speed=0)
    expected = alone(tiny_engine.model, tiny_engine.tokenize(TEXTS).batch)[-1] / TEMPERATURES[NUM_LAYERS]
    assert [prediction.exit_layer for prediction in found] == [NUM_LAYERS] * len(TEXTS)
    scores = torch.tensor([list(prediction.scores.values()) for prediction in found])
    assert torch.allclose(scores, expected.softmax(-1), atol=1e-5)


@every_rule
def test_neighbours_do_not_matter(rule: str, tiny_engine: Engine) -> None:
    engine = tiny_engine.replace(settings=RULES[rule])
    whole = engine.predict(TEXTS)
    singly = [engine.predict([text])[0] for text in TEXTS]
    doubled = engine.predict([*TEXTS, *TEXTS])
    shuffled = list(range(len(TEXTS)))
    random.Random(0).shuffle(shuffled)
    mixed = engine.predict([TEXTS[i] for i in shuffled])
    assert_alike(whole, singly)
    assert_alike([*whole, *whole], doubled)
    assert_alike([whole[i] for i in shuffled], mixed)


def assert_alike(one: list[Prediction], two: list[Prediction]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert replace(left, score=0, scores={}) == replace(right, score=0, scores={})
        assert list(left.scores.values()) == pytest.approx(list(right.scores.values()), abs=2e-5)


def test_several_labels_have_probabilities_of_their_own() -> None:
    engine = make_engine(make_model(problem_type="multi_label_classification"))
    for prediction, text in zip(engine.predict(TEXTS), TEXTS, strict=True):
        batch = engine.tokenize([text]).batch
        if prediction.exit_layer:
            place = engine.depths.index(prediction.exit_layer)
            logits = alone(engine.model, batch)[place, 0] / TEMPERATURES[prediction.exit_layer]
            assert list(prediction.scores.values()) == pytest.approx(logits.sigmoid().tolist(), abs=2e-5)


def test_layers_that_are_given_take_the_place_of_the_prediction(tiny_engine: Engine) -> None:
    batch = tiny_engine.tokenize(TEXTS).batch
    layers = np.random.default_rng(0).integers(1, NUM_LAYERS + 1, len(TEXTS))
    run = tiny_engine.run_tokens(batch, exit_layers=layers, settings=ExitSettings(speed=0.5, on_miss="stop"))
    assert run.exit_layers.tolist() == run.predicted_layers.tolist() == layers.tolist()
    logits = alone(tiny_engine.model, batch)
    assert torch.allclose(run.logits, logits[torch.from_numpy(layers) - 1, torch.arange(len(TEXTS))], atol=5e-5)
    with pytest.raises(ValueError, match=r"No exit at layers \[7\]"):
        tiny_engine.run_tokens(batch, exit_layers=np.full(len(TEXTS), 7))


@pytest.mark.parametrize("checks", [None, (2,), (3,)])
def test_layers_that_are_given_lose_no_text_between_the_checks(
    checks: tuple[int, ...] | None, tiny_engine: Engine
) -> None:
    batch = tiny_engine.tokenize(TEXTS).batch
    chosen = ExitSettings(speed=0.2, check_layers=checks, criterion=AGREEMENT, agreement=AGREEMENTS)
    run = tiny_engine.run_tokens(batch, exit_layers=np.ones(len(TEXTS), dtype=np.int64), settings=chosen)
    assert bool(run.logits.isfinite().all())
    guess = tiny_engine.plan(batch).lexical_logits
    first = AGREEMENTS[1].uncertainty(tiny_engine.exit_logits(batch)[0], guess).numpy()
    assert np.array_equal(run.exit_layers == 1, first < 0.2)
    assert set(run.exit_layers.tolist()) - {1} <= set(checks or (2, 3)) | {4}


def test_exit_logits_are_those_of_every_exit(engines: dict[str, Engine]) -> None:
    for engine in engines.values():
        batch = engine.tokenize(TEXTS).batch
        shares: list[float] = []
        found = with_config(engine, EngineConfig(max_batch_tokens=100)).exit_logits(batch, report=shares.append)
        assert torch.allclose(found, alone(engine.model, batch), atol=5e-5)
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


# Input


def test_an_empty_list_gives_an_empty_list(tiny_engine: Engine) -> None:
    assert tiny_engine.predict([]) == []
    assert tiny_engine.exit_logits(tiny_engine.tokenize([]).batch).shape == (4, 0, 3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", r"one string; write predict\(\[text\]\)"),
        (["a", 3], "Text 1 is int"),
        ([None], "Text 0 is NoneType"),
        ([("a", "b", "c")], "Text 0 is tuple; expected a string or a pair"),
        ([("a", None)], "Text 0 is tuple"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(tiny_engine: Engine, texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tiny_engine.predict(texts)


def test_strings_and_pairs_may_be_mixed(tiny_engine: Engine) -> None:
    texts = ["w1 w2", ("w1", "w2"), "w3", ("w3", "w4 w5"), ["w6", "w7"]]
    batch = tiny_engine.tokenize(texts).batch
    expected = [make_tokenizer()(*([text] if isinstance(text, str) else text)) for text in texts]
    assert batch.input_ids.tolist() == [token for row in expected for token in row["input_ids"]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [part for row in expected for part in row["token_type_ids"]]
    assert_alike(tiny_engine.predict(texts), [tiny_engine.predict([text])[0] for text in texts])


def test_long_texts_are_cut_and_say_so(tiny_engine: Engine) -> None:
    fits = " ".join(["w1"] * (MAX_LENGTH - 2))
    long = " ".join(random.Random(0).choices(WORDS, k=30_000))
    assert len(long) > 100_000
    texts = [fits, f"{fits} w2", long, "w1", (fits, fits), "x" * 100_000]
    found = tiny_engine.predict(texts)
    # A word of 100 kB is one unknown token.
    assert [prediction.truncated for prediction in found] == [False, True, True, False, True, False]
    assert tiny_engine.tokenize(texts).batch.lengths.max() == MAX_LENGTH
    start = " ".join(long.split()[: MAX_LENGTH - 2])
    assert_alike([replace(found[2], truncated=False)], tiny_engine.predict([start]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_longest_text_fits_the_position_table(family: str) -> None:
    engine = Engine(make_model(family), make_tokenizer(), config=EngineConfig(device="cpu"))
    assert engine.predict([" ".join(["w1"] * 500)])[0].truncated
    expected = MAX_LENGTH - (2 if FAMILIES[family].positions_after_pad else 0)
    assert engine.tokenize(["w1 " * 500]).batch.lengths.tolist() == [expected]


def test_a_shorter_limit_is_kept() -> None:
    engine = make_engine(config=EngineConfig(device="cpu", max_length=5), table=False)
    assert engine.tokenize(["w1 w2 w3", "w1 w2 w3 w4"]).truncated.tolist() == [False, True]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\x00", "🙂" * 50, "[PAD] [PAD]", "[CLS]", "\u202e w1"])
def test_odd_texts_are_answered(tiny_engine: Engine, text: str) -> None:
    (prediction,) = tiny_engine.predict([text])
    assert 0 < prediction.score <= 1


@pytest.mark.parametrize("text", ["\ud800", ("w1", "w2 \udfff"), "é\udc80"])
def test_half_a_character_is_refused_and_named(tiny_engine: Engine, text: Any) -> None:
    with pytest.raises(ValueError, match="Text 1 holds half a character"):
        tiny_engine.predict(["w1 é 🙂", text])


def test_calls_from_several_threads_give_the_same(tiny_engine: Engine) -> None:
    parts = [random_texts(60, seed=seed, longest=80) for seed in range(16)]
    expected = [tiny_engine.predict(part) for part in parts]
    for _ in range(5):
        # A tokenizer that no call has set up yet.
        fresh = Engine(
            tiny_engine.model, make_tokenizer(), predictor=tiny_engine.predictor, settings=tiny_engine.settings
        )
        with ThreadPoolExecutor(8) as pool:
            for found, wanted in zip(pool.map(fresh.predict, parts), expected, strict=True):
                assert_alike(found, wanted)


# Parts that do not fit


def test_weights_that_are_not_finite_are_refused() -> None:
    for value in (torch.nan, torch.inf):
        model = make_model()
        with torch.no_grad():
            model.exits[1].out.bias[0] = value
        with pytest.raises(ValueError, match=r"'exits\.1\.out\.bias' holds NaN"):
            make_engine(model, table=False)


@every_backend
def test_logits_that_are_not_finite_name_their_text(backend: str) -> None:
    engine = make_engine(config=EngineConfig(device="cpu", backend=backend), table=False)
    with torch.no_grad():  # after the check: finite weights that overflow
        engine.model.get_input_embeddings().weight[20] = torch.nan
    word = WORDS[20 - 5]
    assert len(engine.predict(["w1", "w2"])) == 2
    with pytest.raises(FloatingPointError, match="Text 2 has logits that are not finite"):
        engine.predict(["w1", "w2", f"w3 {word}", "w4"])


def test_a_table_for_other_exits_is_refused(tiny_engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3, 4\], the model has exits at \[1, 4\]"):
        Engine(make_model(exit_layers=(1,)), make_tokenizer(), predictor=tiny_engine.predictor)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ExitSettings(speed=0.5, on_miss="stop"), "on_miss='stop' needs an exit table"),
        (ExitSettings(speed=0.5, lexical_exit=True), "lexical_exit=True needs an exit table"),
    ],
)
def test_settings_that_need_a_table_are_refused_without(chosen: ExitSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_model(), make_tokenizer(), settings=chosen)
    with pytest.raises(ValueError, match=message):
        make_engine(table=False).replace(settings=chosen)
    engine = make_engine(table=False)
    batch = engine.tokenize(["w1"]).batch
    with pytest.raises(ValueError, match=message):
        engine.run_tokens(batch, settings=chosen)


def test_a_speed_asked_for_later_needs_the_table_as_well() -> None:
    # At speed 0 nothing is predicted, so the engine may be made; stopping blindly at the first exit may not follow.
    engine = Engine(make_model(), make_tokenizer(), settings=ExitSettings(on_miss="stop"))
    assert engine.predict(["w1"])[0].exit_layer == NUM_LAYERS
    with pytest.raises(ValueError, match="on_miss='stop' needs an exit table"):
        engine.predict(["w1"], speed=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "Unknown backend 'magic'.*packed"),
        ({"dtype": "int4"}, "dtype must be one of .*float32"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
        ({"window_tokens": 0}, "window_tokens must be at least 1"),
        ({"max_length": 2}, "max_length must be at least 3"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1.1}, "speed must lie in"),
        ({"speed": float("nan")}, "speed must lie in"),
        ({"criterion": "luck"}, "Unknown criterion 'luck'"),
        ({"on_miss": "panic"}, "on_miss must be"),
        ({"quantile": 0.0}, "quantile must lie"),
        ({"check_layers": (3, 1)}, "check_layers must be layers from 1 up, in ascending order"),
        ({"check_layers": (0, 1)}, "check_layers must be layers from 1 up"),
        ({"check_layers": (1, 1)}, "check_layers must be layers from 1 up"),
        ({"temperatures": {1: 0.0}}, "temperatures must be positive"),
        ({"temperatures": {1: float("nan")}}, "temperatures must be positive"),
    ],
)
def test_exit_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitSettings(**changes)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ExitSettings(check_layers=(1, 4)), r"check_layers names layers \[4\].*exits at \[1, 2, 3\]"),
        (ExitSettings(criterion=AGREEMENT), r"no scores for the exits at layers \[1, 2, 3\]; run `geep profile`"),
        (
            ExitSettings(criterion=AGREEMENT, agreement={n: AGREEMENTS[n] for n in (1, 2, 3)}, lexical_exit=True),
            r"no scores for the exits at layers \[0\]",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    chosen: ExitSettings, message: str, tiny_engine: Engine
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_engine.replace(settings=chosen)


def test_a_device_or_dtype_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="float16 is not run by the packed backend on cpu"):
        make_engine(config=EngineConfig(device="cpu", dtype="float16"), table=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device; use device='cpu'"):
            make_engine(config=EngineConfig(device="cuda"), table=False)
    with pytest.raises(ValueError, match="use backend='padded'"):
        make_engine(make_model("modernbert"), config=EngineConfig(device="cpu", backend="packed"), table=False)


class SlowTokenizer:
    """A tokenizer that is not written in Rust, in front of one that is."""

    is_fast = False

    def __init__(self) -> None:
        self.fast = make_tokenizer()

    def __call__(self, *parts: str, **options: Any) -> Any:
        options.pop("verbose", None)
        return self.fast(*parts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def test_a_tokenizer_in_python_gives_the_same_tokens() -> None:
    engine = make_engine(config=EngineConfig(device="cpu", max_length=9), table=False)
    slow = make_engine(config=EngineConfig(device="cpu", max_length=9), table=False)
    slow.tokenizer = SlowTokenizer()  # type: ignore[assignment]
    texts: list[Any] = [*random_texts(20, seed=3, longest=14), ("a b", "c d e f g h i j k l"), "", ("a", "")]
    ours, theirs = engine.tokenize(texts), slow.tokenize(texts)
    assert np.array_equal(ours.batch.input_ids, theirs.batch.input_ids)
    assert np.array_equal(ours.batch.lengths, theirs.batch.lengths)
    assert np.array_equal(ours.truncated, theirs.truncated)
    assert ours.truncated.any()
    assert not ours.truncated.all()
    assert ours.batch.token_type_ids is not None
    assert theirs.batch.token_type_ids is not None
    assert np.array_equal(ours.batch.token_type_ids, theirs.batch.token_type_ids)


def test_tokens_equal_those_of_hugging_faces_call() -> None:
    engine = make_engine(config=EngineConfig(device="cpu", max_length=9), table=False)
    texts = random_texts(30, seed=5, longest=14)
    expected = engine.tokenizer(texts, truncation=True, max_length=9)["input_ids"]
    batch = engine.tokenize(texts).batch
    assert [row.tolist() for row in np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1])] == expected


def test_texts_are_tokenised_ahead_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    texts = random_texts(23, seed=9)
    expected = [prediction.label for prediction in engine.predict(texts)]
    monkeypatch.setattr("geep.engine._TEXTS_PER_CALL", 5)
    assert [prediction.label for prediction in engine.predict(texts)] == expected
    with pytest.raises(ValueError, match="Text 17 holds half a character"):
        engine.predict([*texts[:17], "\ud800", *texts[17:]])


# Copies and folders


def test_replace_leaves_the_original_as_it_was(tiny_engine: Engine) -> None:
    before, predictor = tiny_engine.predict(TEXTS), tiny_engine.predictor
    other = tiny_engine.replace(settings=ExitSettings(speed=0.0))
    assert other.settings.speed == 0
    assert other.model is tiny_engine.model
    assert {prediction.exit_layer for prediction in other.predict(TEXTS)} == {NUM_LAYERS}
    assert tiny_engine.settings.speed == 0.5
    assert tiny_engine.predictor is predictor
    assert_alike(tiny_engine.predict(TEXTS), before)


@every_rule
def test_a_saved_engine_answers_the_same(rule: str, tiny_engine: Engine, tmp_path: Path) -> None:
    engine = tiny_engine.replace(settings=replace(RULES[rule], temperatures=TEMPERATURES))
    engine.save_pretrained(tmp_path, record={"found": "by hand"})
    loaded = Engine.from_pretrained(tmp_path, device="cpu")
    assert loaded.settings == engine.settings
    assert_alike(loaded.predict(TEXTS), engine.predict(TEXTS))
    assert json.loads((tmp_path / "calibration.json").read_text("utf-8"))["record"] == {"found": "by hand"}
    assert Engine.from_pretrained(str(tmp_path), speed=0.05, device="cpu").settings == replace(
        engine.settings, speed=0.05
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "exit_table.safetensors", "calibration.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".partial"))]


def test_a_saved_engine_without_a_table_answers_the_same(tmp_path: Path) -> None:
    engine = make_engine(table=False)
    engine.save_pretrained(tmp_path)
    loaded = Engine.from_pretrained(tmp_path, device="cpu")
    assert loaded.predictor is None
    assert_alike(loaded.predict(TEXTS), engine.predict(TEXTS))


def test_a_folder_that_was_never_calibrated_is_the_full_model(tiny_engine: Engine, tmp_path: Path) -> None:
    tiny_engine.model.save_pretrained(tmp_path)
    tiny_engine.tokenizer.save_pretrained(tmp_path)
    loaded = Engine.from_pretrained(tmp_path, device="cpu")
    assert loaded.settings == ExitSettings()
    assert {prediction.exit_layer for prediction in loaded.predict(TEXTS)} == {NUM_LAYERS}


def test_a_table_of_another_model_or_tokenizer_is_refused(tiny_engine: Engine, tmp_path: Path) -> None:
    tiny_engine.save_pretrained(tmp_path)
    model = make_model()
    with torch.no_grad():
        model.teacher.out.bias += 0.01
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model"):
        Engine.from_pretrained(tmp_path, device="cpu")
    tiny_engine.model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["novelty"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        Engine.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"settings": null}',
        '{"settings": {}}',
        '{"settings": {"speed": 2, "temperatures": {}}}',
        '{"settings": {"speed": "0.5", "temperatures": {}}}',
        '{"settings": {"speed": NaN, "temperatures": {}}}',
        '{"settings": {"haste": 0.5, "temperatures": {}}}',
        '{"settings": {"temperatures": {"one": 1}}}',
        '{"settings": {"temperatures": {"1": -1}}}',
        '{"settings": {"temperatures": {}, "criterion": "luck"}}',
        '{"settings": {"temperatures": {}, "criterion": []}}',
        '{"settings": {"temperatures": {}, "check_layers": 3}}',
        '{"settings": {"temperatures": {}, "agreement": {"1": [0.5]}}}',
        '{"settings": {"temperatures": {}, "agreement": {"1": [0.5, NaN, 1]}}}',
        "\udcff",
    ],
)
def test_a_damaged_calibration_is_refused(content: str, tiny_engine: Engine, tmp_path: Path) -> None:
    tiny_engine.settings.save(tmp_path)
    assert ExitSettings.load(tmp_path) == tiny_engine.settings
    (tmp_path / "calibration.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"calibration\.json is damaged .*run `geep calibrate` again"):
        ExitSettings.load(tmp_path)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_batch_token"):
        Engine.from_pretrained(tmp_path, max_batch_token=5)


def test_random_batches_without_special_meaning_run_like_texts(tiny_engine: Engine) -> None:
    batch = random_batch(30, seed=3, shortest=2)
    run = tiny_engine.run_tokens(batch)
    logits, layers, near = expected_run(tiny_engine, batch, tiny_engine.settings)
    assert run.exit_layers[~near].tolist() == layers[~near].tolist()
    assert torch.allclose(run.logits[~near], logits[~near], atol=5e-5)


def test_rounded_weights_are_not_saved_but_their_table_is(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no AVX-512 BF16, and there is no GPU")
    base = Engine(model, tokenizer, config=EngineConfig(device="cpu", dtype="bfloat16"))
    engine = base.replace(predictor=fit_predictor(base), settings=ExitSettings(speed=0.5))
    with pytest.raises(ValueError, match="rounded weights are not saved"):
        engine.save_pretrained(tmp_path)
    engine.save_exits(tmp_path)
    texts = random_texts(20, seed=3)
    again = Engine.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert [found.label for found in again.predict(texts)] == [found.label for found in engine.predict(texts)]


def test_an_engine_that_runs_otherwise_than_certified_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu"))
    certified = ExitSettings(speed=0.5, certified_on=engine.deployment.deployed_as)
    Engine(make_model(), make_tokenizer(), settings=certified, config=EngineConfig(device="cpu"))
    assert "does not cover" not in caplog.text
    Engine(make_model(), make_tokenizer(), settings=certified, config=EngineConfig(device="cpu", backend="padded"))
    assert "does not cover" in caplog.text
