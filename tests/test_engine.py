"""An engine answers like the model alone, in the caller's order, whatever the batches; bad parts are refused.

What it is like on disk and on the hub: test_folder.py.
"""

from __future__ import annotations

import random
import threading
import typing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import islice
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
    on_course,
    random_batch,
    random_texts,
)
from hypothesis import given, settings, strategies as st

from geep.backends import BACKENDS
from geep.engine import Engine, EngineConfig, EngineOptions, ExitSettings, Prediction, Predictions
from geep.engine.tokens import in_parts
from geep.exits import AGREEMENT, AgreementScore, Fusing, follow, profile_exits
from geep.modeling import FAMILIES

# None of them lies on a threshold of `RULES`, where rounding would decide: so every sample of them can be compared.
TEXTS = [*random_texts(40, seed=9), "", ("w1 w2", "w3"), ("w9", ""), *random_texts(6, seed=8, longest=30)]
SCORES = {0: (-0.5, 0.6, 0.0), 1: (-1.0, 0.5, 0.2), 2: (0.3, 0.4, -0.1), 3: (0.5, 0.9, 0.3)}
AGREEMENTS = {depth: AgreementScore(*weights) for depth, weights in SCORES.items()}
FUSING = {1: Fusing(0.7, 1.5), 2: Fusing(1.2, 0.4), 3: Fusing(1.0, 0.0)}
ALL_FUSED = {**FUSING, NUM_LAYERS: Fusing(0.9, 0.8)}
RULES = {
    "continue": ExitSettings(speed=0.3),
    "stop": ExitSettings(speed=0.3, on_miss="stop", quantile=0.7),
    "lexical": ExitSettings(speed=0.2, lexical_exit=True, quantile=0.3),
    "lexical stop": ExitSettings(speed=0.1, lexical_exit=True, on_miss="stop", quantile=0.9),
    "margin": ExitSettings(speed=0.4, criterion="margin", quantile=0.05),
    "agreement": ExitSettings(speed=0.3, criterion=AGREEMENT, agreement=AGREEMENTS, lexical_exit=True, quantile=0.05),
    "few checks": ExitSettings(speed=0.4, check_layers=(2,), quantile=0.05),
    "few checks stop": ExitSettings(speed=0.3, check_layers=(1, 3), on_miss="stop", lexical_exit=True),
    "fused": ExitSettings(speed=0.3, criterion=AGREEMENT, agreement=AGREEMENTS, fusing=FUSING, quantile=0.05),
    "all fused": ExitSettings(speed=0.2, fusing=ALL_FUSED, lexical_exit=True, quantile=0.05),
    "all fused stop": ExitSettings(speed=0.3, fusing=ALL_FUSED, on_miss="stop", quantile=0.7),
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
    lexical = found.lexical_logits
    fused = [chosen.answered(each, depth, lexical) for depth, each in zip(depths, logits, strict=True)]
    depths, logits = (0, *depths), torch.stack([lexical, *fused])
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
    sizes = {
        "max_batch_tokens": data.draw(st.sampled_from([1, 17, 64, 300, 10_000])),
        "window_tokens": data.draw(st.sampled_from([1, 50, 200, 100_000])),
    }
    chosen = replace(RULES[rule], temperatures=TEMPERATURES)
    engine = on_course(engines[backend], **sizes).replace(settings=chosen)
    order = data.draw(st.permutations(range(len(TEXTS))))
    picked = order[: data.draw(st.integers(1, len(TEXTS)))]
    batch = engine.tokenize([TEXTS[i] for i in picked]).batch
    run = engine.run_tokens(batch)
    logits, layers, near = expected[rule]
    sure = ~near[list(picked)]
    assert sure.mean() > 0.9 or len(picked) < 10
    assert run.exit_layers[sure].tolist() == layers[list(picked)][sure].tolist()
    assert torch.allclose(run.logits[sure], logits[list(picked)][sure], atol=5e-5)


class Counting:
    """A backend that counts how often each layer and each exit runs."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.layers, self.exits = backend, Counter[int](), Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def advance(self, live: Any, layer: int, *arguments: Any, **options: Any) -> Any:
        self.layers[layer] += 1
        return self.backend.advance(live, layer, *arguments, **options)

    def exit_logits(self, live: Any, layer: int, *arguments: Any, **options: Any) -> Any:
        self.exits[layer] += 1
        return self.backend.exit_logits(live, layer, *arguments, **options)


@every_rule
def test_in_a_call_of_one_batch_no_layer_and_no_exit_runs_twice(rule: str, tiny_engine: Engine) -> None:
    batch = tiny_engine.tokenize(TEXTS).batch
    chosen = replace(RULES[rule], temperatures=TEMPERATURES)
    counts = {}
    for tokens in (len(batch.input_ids), 1):
        counting = Counting(tiny_engine.course.backend)
        engine = on_course(tiny_engine, backend=counting, max_batch_tokens=tokens).replace(settings=chosen)
        engine.run_tokens(batch)
        counts[tokens] = counting
    together, pooled = counts.values()
    assert max(*together.layers.values(), *together.exits.values()) == 1
    assert max(pooled.layers.values()) > 1


class Picking(Counting):
    """A backend that lets answered texts run along as long as it is told, and counts how often it picks texts out."""

    def __init__(self, backend: Any, keeps_above: float) -> None:
        super().__init__(backend)
        self.keeps_above, self.picked = keeps_above, 0

    def select(self, live: Any, rows: Any) -> Any:
        self.picked += 1
        return self.backend.select(live, rows)


@every_rule
@every_backend
@pytest.mark.parametrize("keeps_above", [0.0, 0.5, 0.8])
def test_answered_texts_that_run_along_change_no_answer(
    rule: str, backend: str, keeps_above: float, engines: dict[str, Engine], expected: dict[str, Expected]
) -> None:
    batch = engines[backend].tokenize(TEXTS).batch
    chosen = replace(RULES[rule], temperatures=TEMPERATURES)
    picking = Picking(engines[backend].course.backend, keeps_above)
    at_once = Picking(picking.backend, 1.0)
    for each in (picking, at_once):
        found = on_course(engines[backend], backend=each, max_batch_tokens=10_000).replace(settings=chosen)
        run = found.run_tokens(batch)
        logits, layers, near = expected[rule]
        assert run.exit_layers[~near].tolist() == layers[~near].tolist()
        assert torch.allclose(run.logits[~near], logits[~near], atol=5e-5)
        assert max(*each.layers.values(), *each.exits.values()) == 1
    assert picking.picked <= at_once.picked
    if not keeps_above:
        assert not picking.picked
    elif rule == "continue":
        assert at_once.picked


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
        if not backend.supports(model.encoder.config):
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
    guess = tiny_engine.planner.plan(batch, tiny_engine.settings).lexical_logits
    first = AGREEMENTS[1].uncertainty(tiny_engine.exit_logits(batch)[0], guess).numpy()
    assert np.array_equal(run.exit_layers == 1, first < 0.2)
    assert set(run.exit_layers.tolist()) - {1} <= set(checks or (2, 3)) | {4}


def test_exit_logits_are_those_of_every_exit(engines: dict[str, Engine]) -> None:
    for engine in engines.values():
        batch = engine.tokenize(TEXTS).batch
        told: list[tuple[str, int, int | None]] = []
        found = on_course(engine, max_batch_tokens=100).exit_logits(
            batch, what="some texts", progress=lambda *step, told=told: told.append(step)
        )
        assert torch.allclose(found, alone(engine.model, batch), atol=5e-5)
        assert len(told) > 1
        assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
        assert told[-1] == ("some texts", len(batch.input_ids), len(batch.input_ids))


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


# Columns


NAMES = ("red", "green", "blue", "grey")
# Few different logits, so that labels tie, and some beyond what float32 tells from 0 and 1.
LOGITS = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), st.floats(-200, 200, width=32))
TABLES = st.integers(1, 4).flatmap(lambda labels: st.lists(st.lists(LOGITS, min_size=labels, max_size=labels)))


def columns_of(
    table: list[list[float]], *, num_labels: int, multi_label: bool = False, predicted: bool = True, **options: Any
) -> Predictions:
    numbers = np.arange(len(table), dtype=np.int64)
    return Predictions.of_logits(
        torch.tensor(table, dtype=torch.float32).reshape(len(table), num_labels),
        multi_label=multi_label,
        label_names=NAMES[:num_labels],
        exit_layers=numbers % 5,
        predicted_layers=numbers % 3 if predicted else None,
        truncated=numbers % 2 == 1,
        **options,
    )


@settings(deadline=None)
@given(
    table=TABLES,
    multi_label=st.booleans(),
    predicted=st.booleans(),
    top_k=st.sampled_from([None, 1, 2, 3, 9]),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_columns_equal_the_records(
    table: list[list[float]], multi_label: bool, predicted: bool, top_k: int | None, threshold: float
) -> None:
    num_labels = len(table[0]) if table else 3
    names = NAMES[:num_labels]
    found = columns_of(
        table, num_labels=num_labels, multi_label=multi_label, predicted=predicted, top_k=top_k, threshold=threshold
    )
    records = list(found)
    assert len(found) == len(records) == len(table)
    for row, (record, logits) in enumerate(zip(records, table, strict=True)):
        scaled = torch.tensor(logits, dtype=torch.float32)
        probabilities = (scaled.sigmoid() if multi_label else scaled.softmax(-1)).tolist()
        assert found.probabilities[row].tolist() == pytest.approx(probabilities, abs=1e-6)
        given_ = dict(zip(names, found.probabilities[row].tolist(), strict=True))
        # Python's sort is stable: of equally likely labels the first of the model's comes first.
        ranked = sorted(names, key=lambda name: -given_[name])
        expected = {name: given_[name] for name in (names if top_k is None else ranked[:top_k])}
        assert list(record.scores.items()) == list(expected.items())
        assert record.label == ranked[0] == found.labels[row] == names[found.label_ids[row]]
        assert record.score == given_[ranked[0]] == found.scores[row]
        holding = tuple(name for name in names if given_[name] >= threshold) if multi_label else (ranked[0],)
        assert record.labels == holding
        assert tuple(np.array(names)[found.label_flags[row]]) == holding
        assert (record.exit_layer, record.truncated) == (row % 5, row % 2 == 1)
        assert record.predicted_layer == (row % 3 if predicted else None)
        # Numbers of Python, which JSON takes.
        assert [type(value) for value in (record.exit_layer, record.score, record.truncated)] == [int, float, bool]


def test_records_are_had_by_place_and_by_slice() -> None:
    found = columns_of([[float(number), 0.0] for number in range(7)], num_labels=2)
    records = list(found)
    assert [found[place] for place in range(7)] == records
    assert [found[place] for place in range(-7, 0)] == records
    for part in (slice(2, 5), slice(None, None, 2), slice(None, None, -1), slice(9, 20), slice(-3, None)):
        assert found[part] == records[part]
    for place in (7, -8):
        with pytest.raises(IndexError):
            found[place]
    assert list(reversed(found)) == records[::-1]
    assert records[3] in found
    assert found.index(records[3]) == 3
    # As arrays, columns are compared one by one; as a whole they are the same only if they are the same object.
    assert found == found
    assert found != columns_of([], num_labels=2)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans())
def test_parts_are_joined_in_order(sizes: list[int], predicted: bool) -> None:
    random = np.random.default_rng(0)
    parts = [
        columns_of(random.normal(size=(size, 3)).tolist(), num_labels=3, predicted=predicted, top_k=2, threshold=0.25)
        for size in sizes
    ]
    joined = Predictions.join(parts)
    assert list(joined) == [record for part in parts for record in part]
    assert (joined.predicted_layers is None) == (not predicted)
    assert (joined.top_k, joined.threshold, joined.label_names) == (2, 0.25, NAMES[:3])


def test_no_texts_have_empty_columns(tiny_engine: Engine) -> None:
    for found in (tiny_engine.predict_columns([]), tiny_engine.predict_columns(iter(())), columns_of([], num_labels=3)):
        assert list(found) == []
        assert len(found) == 0
        shapes = (found.labels, found.scores, found.label_ids, found.exit_layers, found.truncated)
        assert [column.shape for column in shapes] == [(0,)] * 5
        assert found.probabilities.shape == found.label_flags.shape == (0, 3)
    assert list(tiny_engine.predict_stream([])) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"threshold": float("nan")}, "threshold must lie in"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, tiny_engine: Engine) -> None:
    for texts in ([], ["w1"]):
        with pytest.raises(ValueError, match=message):
            tiny_engine.predict(texts, **options)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_an_engine_answers_in_columns_as_in_records(problem_type: str) -> None:
    engine = make_engine(make_model(problem_type=problem_type))
    whole = engine.predict(TEXTS)
    columns = engine.predict_columns(TEXTS)
    assert list(columns) == whole
    assert columns.label_names == engine.label_names
    assert columns.predicted_layers is not None
    few = engine.predict(TEXTS, top_k=2, threshold=0.2)
    for short, full in zip(few, whole, strict=True):
        assert list(short.scores.items()) == sorted(full.scores.items(), key=lambda item: -item[1])[:2]
        assert (short.label, short.score) == (full.label, full.score)
        if problem_type == "multi_label_classification":
            assert short.labels == tuple(name for name, score in full.scores.items() if score >= 0.2)
        else:
            assert short.labels == (full.label,)
    if problem_type == "multi_label_classification":
        assert {len(answer.labels) for answer in few} > {1}


# Streams


PART = 5


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.engine.tokens.TEXTS_PER_CALL", PART)


class Source:
    """An iterator that counts what was taken from it."""

    def __init__(self, texts: list[Any]) -> None:
        self.texts, self.taken = texts, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.taken == len(self.texts):
            raise StopIteration
        self.taken += 1
        return self.texts[self.taken - 1]


@pytest.mark.parametrize("count", [0, 1, PART - 1, PART, PART + 1, 4 * PART + 2])
def test_texts_may_come_from_any_iterable(small_parts: None, tiny_engine: Engine, count: int) -> None:
    texts = random_texts(count, seed=9)
    expected = tiny_engine.predict(texts)
    assert len(expected) == count
    for source in (Source(texts), (text for text in texts), tuple(texts), np.array(texts, dtype=object)):
        assert_alike(tiny_engine.predict(source), expected)
    assert_alike([record for part in tiny_engine.predict_stream(Source(texts)) for record in part], expected)
    joined = tiny_engine.predict_columns(Source(texts))
    assert joined.labels.tolist() == [answer.label for answer in expected]
    assert joined.exit_layers.tolist() == [answer.exit_layer for answer in expected]


def test_a_stream_takes_texts_as_they_are_needed(
    small_parts: None, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = Source(random_texts(6 * PART + 2, seed=9)), []
    run = Engine.run_tokens

    def watched(self: Engine, batch: Any, **options: Any) -> Any:
        seen.append(source.taken)
        return run(self, batch, **options)

    monkeypatch.setattr(Engine, "run_tokens", watched)
    answered = 0
    stream = tiny_engine.predict_stream(source)
    assert source.taken == 0
    for part in stream:
        # The part that runs, and the one that is tokenised meanwhile.
        assert source.taken <= answered + 2 * PART
        answered += len(part)
    assert answered == 6 * PART + 2
    assert seen == [min((number + 2) * PART, 6 * PART + 2) for number in range(7)]


def test_a_stream_that_is_left_takes_no_more_and_ends_its_thread(small_parts: None, tiny_engine: Engine) -> None:
    source = Source(random_texts(6 * PART, seed=9))
    stream = tiny_engine.predict_stream(source)
    assert len(next(stream)) == PART
    stream.close()  # type: ignore[attr-defined]
    assert source.taken == 2 * PART
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("geep-tokenize")]


def test_a_stream_may_never_end(small_parts: None, tiny_engine: Engine) -> None:
    def forever() -> Iterator[str]:
        while True:
            yield "w1 w2"

    stream = tiny_engine.predict_stream(forever())
    assert [len(next(stream)) for _ in range(3)] == [PART] * 3


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("\ud800", ValueError, "Text 12 holds half a character"),
        (3, TypeError, "Text 12 is int; expected a string"),
        (("a", None), TypeError, "Text 12 is tuple"),
    ],
)
def test_a_bad_text_of_an_iterator_is_named_by_its_place(
    small_parts: None, tiny_engine: Engine, bad: Any, error: type[Exception], message: str
) -> None:
    texts: list[Any] = [*random_texts(12, seed=9), bad, *random_texts(9, seed=9)]
    for made in (texts, Source(texts)):
        with pytest.raises(error, match=message):
            tiny_engine.predict(made)


def test_a_list_with_a_bad_text_is_refused_before_anything_runs(
    small_parts: None, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "run_tokens", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(TypeError, match="Text 22 is NoneType"):
        tiny_engine.predict([*random_texts(22, seed=9), None])  # type: ignore[list-item]


def test_logits_that_are_not_finite_name_their_text_by_its_place(small_parts: None) -> None:
    engine = make_engine(table=False)
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[20] = torch.nan
    texts = ["w1"] * 13 + [WORDS[20 - 5]] + ["w2"] * 4
    with pytest.raises(FloatingPointError, match="Text 13 has logits that are not finite"):
        engine.predict(iter(texts))


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
        make_engine(make_model(is_decoder=True), config=EngineConfig(device="cpu", backend="packed"), table=False)


class SlowTokenizer:
    """A tokenizer that is not written in Rust, in front of one that is."""

    is_fast = False

    def __init__(self) -> None:
        self.fast = make_tokenizer()

    def __call__(self, *parts: str, **options: Any) -> Any:
        options.pop("verbose", None)
        return self.fast(*parts, **options)

    def __deepcopy__(self, memo: Any) -> SlowTokenizer:
        return SlowTokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def test_a_tokenizer_in_python_gives_the_same_tokens() -> None:
    engine = make_engine(config=EngineConfig(device="cpu", max_length=9), table=False)
    slow = Engine(make_model(), SlowTokenizer(), config=EngineConfig(device="cpu", max_length=9))  # type: ignore[arg-type]
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
    monkeypatch.setattr("geep.engine.tokens.TEXTS_PER_CALL", 5)
    assert [prediction.label for prediction in engine.predict(texts)] == expected
    with pytest.raises(ValueError, match="Text 17 holds half a character"):
        engine.predict([*texts[:17], "\ud800", *texts[17:]])


# Copies


def test_replace_leaves_the_original_as_it_was(tiny_engine: Engine) -> None:
    before, predictor = tiny_engine.predict(TEXTS), tiny_engine.predictor
    other = tiny_engine.replace(settings=ExitSettings(speed=0.0))
    assert other.settings.speed == 0
    assert other.model is tiny_engine.model
    assert {prediction.exit_layer for prediction in other.predict(TEXTS)} == {NUM_LAYERS}
    assert tiny_engine.settings.speed == 0.5
    assert tiny_engine.predictor is predictor
    assert_alike(tiny_engine.predict(TEXTS), before)


def test_the_options_are_the_fields_of_the_config() -> None:
    """`EngineOptions` repeats them for type checkers, which see no further than the file."""
    assert typing.get_type_hints(EngineOptions) == typing.get_type_hints(EngineConfig)
    assert EngineOptions.__annotations__.keys() == {field.name for field in fields(EngineConfig)}
    assert not EngineOptions.__required_keys__


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_batch_token"):
        Engine.from_pretrained(tmp_path, max_batch_token=5)


def test_random_batches_without_special_meaning_run_like_texts(tiny_engine: Engine) -> None:
    batch = random_batch(30, seed=3, shortest=2)
    run = tiny_engine.run_tokens(batch)
    logits, layers, near = expected_run(tiny_engine, batch, tiny_engine.settings)
    assert run.exit_layers[~near].tolist() == layers[~near].tolist()
    assert torch.allclose(run.logits[~near], logits[~near], atol=5e-5)


def test_tokens_do_not_depend_on_the_parts_in_which_they_are_made(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    singles = random_texts(11, seed=8)
    mixed: list[Any] = [*singles, *zip(singles, singles[::-1], strict=True), *singles, ""]
    for texts in (singles, mixed, []):
        whole = tiny_engine.tokenize(texts)
        with monkeypatch.context() as patch:
            patch.setattr("geep.engine.tokens.TEXTS_PER_CALL", 4)
            parts = tiny_engine.tokenize(texts)
        assert np.array_equal(parts.batch.input_ids, whole.batch.input_ids)
        assert np.array_equal(parts.batch.lengths, whole.batch.lengths)
        assert np.array_equal(parts.truncated, whole.truncated)
        assert (parts.batch.token_type_ids is None) == (whole.batch.token_type_ids is None)
        if whole.batch.token_type_ids is not None:
            assert np.array_equal(parts.batch.token_type_ids, whole.batch.token_type_ids)


def test_beside_a_gpu_parts_are_smaller_and_answers_the_same(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geep.engine.tokens.TEXTS_PER_CALL", 12)
    texts, asked = random_texts(25, seed=9), []
    expected, usual = tiny_engine.predict(texts), list(tiny_engine.predict_stream(texts))

    def on_gpu(texts: Any, pairs: Any, device_type: str) -> Any:
        asked.append(device_type)
        return in_parts(texts, pairs, "cuda")

    monkeypatch.setattr("geep.engine.engine.in_parts", on_gpu)
    for source in (texts, iter(texts)):
        parts = list(tiny_engine.predict_stream(source))
        assert [len(part) for part in parts] == [*[3] * 8, 1]
        assert_alike([prediction for part in parts for prediction in part], expected)
    assert [len(part) for part in usual] == [12, 12, 1]
    assert asked == [tiny_engine.model.device.type] * 2


def test_what_came_before_a_bad_text_in_a_stream_is_answered(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geep.engine.tokens.TEXTS_PER_CALL", 4)
    texts: list[Any] = [*random_texts(10, seed=9), 3]
    stream = tiny_engine.predict_stream(iter(texts))
    assert [len(part) for part in islice(stream, 2)] == [4, 4]
    with pytest.raises(TypeError, match="Text 10 is int"):
        next(stream)


# --------------------------------------------------------------------------------------------------------------------
# Answers are those of plain Hugging Face, and what would make them others is refused
# --------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_others_hold_is_never_touched() -> None:
    tokenizer = make_tokenizer()
    engine = Engine(make_model(), tokenizer, config=EngineConfig(device="cpu", max_length=5))
    text = " ".join(WORDS[:20])
    assert engine.tokenize([text]).batch.lengths.tolist() == [5]
    assert len(tokenizer(text)["input_ids"]) == 22
    tokenizer(text, truncation=True, max_length=9)  # what another holder sets is not seen by the engine
    assert engine.tokenize([text]).batch.lengths.tolist() == [5]


def test_engines_of_one_tokenizer_cut_each_at_its_own_length_whatever_the_threads() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    engines = [Engine(model, tokenizer, config=EngineConfig(device="cpu", max_length=n)) for n in (4, 9, 16)]
    texts = [" ".join(WORDS[:30])] * 50

    def lengths(engine: Engine) -> set[int]:
        return {int(length) for _ in range(20) for length in engine.tokenize(texts).batch.lengths}

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lengths, engines)) == [{4}, {9}, {16}]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta-v2", "albert"])
@pytest.mark.parametrize("listed", [True, False])
def test_pairs_get_segment_ids_where_the_tokenizer_lists_them(family: str, listed: bool) -> None:
    tokenizer, model = make_tokenizer(), make_model(family)
    if not listed:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    found = Engine(model, tokenizer, config=EngineConfig(device="cpu")).predict(pairs)
    for (first, second), answer in zip(pairs, found, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(first, second, return_tensors="pt")).logits[0].softmax(-1)
        assert list(answer.scores.values()) == pytest.approx(expected.tolist(), abs=2e-5)


def test_segment_ids_without_a_row_in_the_encoder_are_refused() -> None:
    engine = Engine(make_model("roberta", type_vocab_size=1), make_tokenizer(), config=EngineConfig(device="cpu"))
    assert len(engine.predict(["w1"])) == 1
    with pytest.raises(ValueError, match="segment ids up to 1, the encoder has rows for 0..0"):
        engine.predict([("w1", "w2")])


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["brand-new"])
    with pytest.raises(ValueError, match=r"token ids up to 200, the encoder has embeddings for 0\.\.199"):
        Engine(make_model(), tokenizer, config=EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("names", "said"),
    [({0: "a", 1: "b", 2: "a"}, "several labels the name"), ({1: "a", 2: "b", 3: "c"}, "expected 0..2")],
)
def test_label_names_that_do_not_name_each_label_are_refused(names: dict[int, str], said: str) -> None:
    model = make_model()
    model.config.id2label = names
    with pytest.raises(ValueError, match=said):
        Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
