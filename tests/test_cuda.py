"""The CUDA backend: on CPU tensors it equals the packed one and Hugging Face; on a GPU nothing waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    NUM_LAYERS,
    SEP,
    alone,
    make_engine,
    make_model,
    make_tokenizer,
    on_course,
    random_batch,
    random_texts,
)
from hypothesis import given, settings, strategies as st
from test_backends import built_run, close, one_walk
from torch import Tensor
from transformers import AutoConfig

from geep.backends import BACKENDS, CudaBackend, CudaOptions, PackedBackend, TokenBatch
from geep.backends.cuda import compiled
from geep.backends.graphs import BucketShape, LayerGraphs, TextPlaces, _Bucket, bucket_sizes, max_texts, max_tiles
from geep.backends.mixers import TILE, DotProduct
from geep.backends.staging import Staging
from geep.backends.tiles import Tiles, attend_tiles, plan_tiles, tile_bias
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.engine.deployment import default_backend
from geep.modeling import HEADS, GeepForSequenceClassification, Spans

CPU = torch.device("cpu")
# Of the largest logit; on a CPU half precision stays within a third of these.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SHORT = st.lists(st.integers(0, TILE), max_size=24)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(test: Any) -> Any:
    for mark in needs_gpu:
        test = mark(test)
    return test


def ints(values: list[int]) -> Any:
    return np.array(values, dtype=np.int64)


def batch_of(lengths: list[int], seed: int = 0) -> TokenBatch:
    """Texts of these lengths; longer ones than the usual tiny encoder takes need max_position_embeddings."""
    random = np.random.default_rng(seed)
    return TokenBatch(random.integers(5, 200, sum(lengths)), None, ints(lengths))


@pytest.fixture(scope="module")
def long_model() -> GeepForSequenceClassification:
    return make_model(head="cls", max_position_embeddings=300)


# Tiles


@given(SHORT)
def test_tiles_hold_every_token_once_and_split_no_text(lengths: list[int]) -> None:
    plan = plan_tiles(ints(lengths))
    tokens, texts = sum(lengths), np.repeat(np.arange(len(lengths)), lengths)
    assert len(set(plan.slot.tolist())) == tokens == len(plan.slot)
    assert plan.source[plan.slot].tolist() == list(range(tokens))
    assert plan.text[plan.slot].tolist() == texts.tolist()
    assert (plan.text >= 0).sum() == tokens
    assert (plan.slot // TILE).tolist() == plan.tile[texts].tolist()
    assert len(plan.source) % TILE == 0
    # Next-fit: two neighbours together hold more than one tile would.
    per_tile = np.bincount(plan.slot // TILE, minlength=len(plan.source) // TILE)
    assert (per_tile > 0).all()
    assert all(a + b > TILE for a, b in zip(per_tile, per_tile[1:], strict=False))


@given(SHORT, st.data())
def test_a_prefix_of_texts_lies_in_a_prefix_of_tiles(lengths: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(lengths)))
    whole, part = plan_tiles(ints(lengths)), plan_tiles(ints(lengths[:kept]))
    assert part.tile.tolist() == whole.tile[:kept].tolist()
    assert part.slot.tolist() == whole.slot[: sum(lengths[:kept])].tolist()


def test_a_text_longer_than_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 128 tokens, got one of 129; use attention='auto'"):
        plan_tiles(ints([3, 129]))


def tiles_of(lengths: list[int]) -> Tiles:
    plan = plan_tiles(ints(lengths))
    source, text, slot = (torch.from_numpy(row).int() for row in (plan.source, plan.text, plan.slot))
    return Tiles(plan.tile, source, slot, tile_bias(text, torch.float32))


@settings(deadline=None, max_examples=40)
@given(SHORT, st.data())
def test_attention_in_tiles_is_attention_in_each_text(lengths: list[int], data: st.DataObject) -> None:
    torch.manual_seed(0)
    kept = data.draw(st.integers(0, len(lengths)))
    tokens = sum(lengths[:kept])
    qkv = torch.randn(sum(lengths), 3 * 16)[:tokens]
    tiles = tiles_of(lengths) if kept == len(lengths) else tiles_of(lengths).prefix(kept, tokens)
    parts = []
    for part in qkv.split(lengths[:kept]):
        query, key, value = part.view(-1, 3, 4, 4).permute(1, 2, 0, 3)
        weights = (query @ key.transpose(1, 2) / 2).softmax(-1)
        parts.append((weights @ value).transpose(0, 1).reshape(-1, 16))
    expected = torch.cat(parts) if parts else qkv[:, :16]
    assert torch.allclose(attend_tiles(qkv, tiles, 4, DotProduct()), expected, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.one_of(st.integers(0, 20), st.sampled_from([1, 127, 128, 129, 200])), min_size=1, max_size=8))
def test_any_lengths_give_the_packed_answers(lengths: list[int]) -> None:
    # Hypothesis has no module fixtures; the model is small.
    model = make_model(max_position_embeddings=300)
    batch = batch_of(lengths)
    with torch.no_grad():
        ours, packed = (backend.build(model, dtype="float32") for backend in (CudaBackend, PackedBackend))
        found, expected = (
            backend.exit_logits(built_run(backend, batch), 4, 0, len(lengths)) for backend in (ours, packed)
        )
    assert close(found, expected)
    assert (ours.start(batch).tiles is not None) == (max(lengths) <= TILE)


@torch.no_grad()
def test_texts_around_the_size_of_a_tile_equal_hugging_face(long_model: GeepForSequenceClassification) -> None:
    built = CudaBackend.build(long_model, dtype="float32")
    for lengths in ([1, 128, 127, 2], [129, 1, 128]):
        batch = batch_of(lengths)
        logits = built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, len(lengths))
        assert close(logits, alone(long_model, batch)[-1])


@torch.no_grad()
def test_attention_can_be_forced() -> None:
    model = make_model(max_position_embeddings=300)
    runs = CudaBackend.build(model, dtype="float32", options=CudaOptions(attention="runs"))
    assert runs.start(batch_of([3])).tiles is None
    with pytest.raises(ValueError, match="at most 128"):
        CudaBackend.build(model, dtype="float32", options=CudaOptions(attention="tiles")).start(batch_of([129]))
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16 on a CUDA device.*float32 on cpu"):
        CudaBackend.build(model, dtype="float32", options=CudaOptions(attention="varlen"))


def test_large_batches_of_long_texts_leave_tiles_where_there_is_varlen() -> None:
    options = CudaOptions(graph_tokens=100, varlen_from=48)
    without = CudaBackend.build(make_model(max_position_embeddings=300), dtype="float32", options=options)
    beside = replace(without, varlen=lambda *_: None)

    def in_tiles(backend: CudaBackend, *lengths: int) -> bool:
        return backend.start(batch_of([*lengths])).tiles is not None

    assert in_tiles(beside, 50, 50)  # no larger than what graphs replay
    assert not in_tiles(beside, 50, 51)
    assert not in_tiles(beside, 20, 76, 48)
    assert in_tiles(beside, 20, 76, 47)
    assert in_tiles(without, 50, 51)
    assert not in_tiles(without, 20, 129)


# One upload


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), min_size=1, max_size=4), st.integers(1, 3))
def test_rows_arrive_whole_and_stay_when_buffers_are_used_again(rows: list[list[int]], num_buffers: int) -> None:
    staging = Staging(CPU, num_buffers)
    sent = [[ints(row) + shift for row in rows] for shift in (0, 0, 0)]
    sent += [[ints([7] * 40)], [ints(row) for row in rows]]
    arrived = [staging.upload(each) for each in sent]
    for rows_sent, rows_found in zip(sent, arrived, strict=True):
        assert [row.tolist() for row in rows_found] == [row.tolist() for row in rows_sent]
        assert all(row.dtype == torch.int32 and row.storage_offset() % 4 == 0 for row in rows_found)


def test_buffers_grow_and_are_kept() -> None:
    staging = Staging(CPU)
    for size in (5, 3, 9, 40, 2, 2):
        staging.upload([np.zeros(size, dtype=np.int64)])
    assert [len(buffer.host) for buffer in staging._buffers] == [16, 64]


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run some work in several threads at once, each with its number, and wait for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_several_threads_may_upload() -> None:
    staging, wrong = Staging(CPU), []

    def work(value: int) -> None:
        for size in range(1, 200):
            (row,) = staging.upload([np.full(size, value)])
            if not bool((row == value).all()):
                wrong.append(value)

    in_threads(work)
    assert wrong == []


# Graphs, replayed on the CPU by running their layer


def test_buckets_are_few_and_close() -> None:
    sizes = bucket_sizes(4096)
    assert sizes[0] == 128
    assert sizes[-1] == 4096
    assert all(1 < b / a <= 1.5 for a, b in zip(sizes, sizes[1:], strict=False))
    assert bucket_sizes(1000) == [128, 192, 256, 384, 512, 768]
    assert bucket_sizes(100) == []


def with_graphs(model: GeepForSequenceClassification, record_after: int = 0) -> CudaBackend:
    return CudaBackend.build(model, dtype="float32", options=CudaOptions(graphs=True, record_after=record_after))


def replays_of(backend: CudaBackend, kind: type) -> dict[int, list[Any]]:
    """Of each bucket the layers (int) or the exits (nn.Module) that were recorded, where there are any."""
    assert backend.graphs is not None
    found = {
        size: [what for what in bucket.replays if isinstance(what, kind)]
        for size, bucket in backend.graphs._buckets.items()
    }
    return {size: each for size, each in found.items() if each}


# Every head on single texts, and the one that tells two texts apart on pairs.
HEADS_AND_SEPARATORS = [*((head, None) for head in sorted(HEADS)), ("conv", SEP)]


def batch_for(separator_id: int | None, count: int, **options: Any) -> TokenBatch:
    """Random texts; where there is a separator it stands at any place in them."""
    batch = random_batch(count, pairs=separator_id is not None, **options)
    if separator_id is not None:
        starts, random = np.cumsum(batch.lengths) - batch.lengths, np.random.default_rng(count)
        batch.input_ids[starts + random.integers(0, batch.lengths)] = separator_id
    return batch


@pytest.mark.parametrize(("head", "separator_id"), HEADS_AND_SEPARATORS)
@torch.no_grad()
def test_replays_on_buffers_full_of_leftovers_change_nothing(head: str, separator_id: int | None) -> None:
    model = make_model(head=head, separator_id=separator_id).double()  # in float32 heads of loud weights round
    batch = batch_for(separator_id, 50, seed=1)  # hundreds of tokens: several buckets on the way down
    expected = alone(model, batch)
    built = with_graphs(model, record_after=1)
    assert sum(one_walk(model, built, batch, expected, seed) for seed in range(10)) > 100
    assert replays_of(built, int).keys() >= {128, 256}
    assert replays_of(built, torch.nn.Module).keys() >= {128, 256}


@pytest.mark.parametrize(("head", "separator_id"), HEADS_AND_SEPARATORS)
@torch.no_grad()
def test_replayed_exits_answer_any_range_while_texts_leave_and_batches_take_turns(
    head: str, separator_id: int | None
) -> None:
    model = make_model(head=head, separator_id=separator_id).double()  # in float32 heads of loud weights round
    built = with_graphs(model)
    batches = [batch_for(separator_id, count, seed=count, longest=9) for count in (9, 12)]
    expected = [alone(model, batch) for batch in batches]
    walks: Any = [[built.start(batch), len(batch)] for batch in batches]
    for layer in range(1, NUM_LAYERS + 1):
        for walk, wanted in zip(walks, expected, strict=True):
            live = walk[0] = built.advance(walk[0], layer, walk[1])
            for start, stop in ((0, walk[1]), (1, walk[1]), (0, 1), (2, walk[1] - 1)):
                found = built.exit_logits(live, layer, start, stop)
                assert close(found, wanted[layer - 1, start:stop])
            walk[1] -= 1
        # The second batch lies in the bucket now, the first is asked the usual way.
        assert close(built.exit_logits(walks[0][0], layer, 0, walks[0][1]), expected[0][layer - 1, : walks[0][1]])
    assert sum(map(len, replays_of(built, torch.nn.Module).values())) >= NUM_LAYERS


@torch.no_grad()
def test_an_exit_replays_only_for_texts_that_lie_in_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(head="cls"), random_batch(12, seed=3)
    built, expected = with_graphs(model), alone(model, batch)
    assert built.graphs is not None
    replayed: list[bool] = []
    replay = LayerGraphs.exit_logits

    def noted(self: LayerGraphs, *args: Any) -> Tensor | None:
        found = replay(self, *args)
        replayed.append(found is not None)
        return found

    monkeypatch.setattr(LayerGraphs, "exit_logits", noted)
    live = built.start(batch)
    assert built.exit_logits(live, 1, 0, 12) is not None  # no layer has run
    live = built.advance(live, 1, 12)
    first = built.exit_logits(live, 1, 0, 12)
    kept = first.clone()
    chosen = built.select(live, np.arange(12)[::-1].copy())
    assert close(built.exit_logits(chosen, 1, 0, 12), expected[0].flip(0))
    assert replayed == [False, True, False]
    following = built.advance(live, 2, 12)
    assert close(built.exit_logits(following, 2, 0, 12), expected[1])
    assert torch.equal(first, kept)  # what was handed out is not written to
    assert close(built.exit_logits(live, 1, 3, 7), expected[0, 3:7])  # the bucket has gone on
    assert replayed == [False, True, False, True, False]
    # Another head is read as it is, and an exit in the place of an old one is no old one.
    assert built.exit_logits(following, 2, 0, 12, head=Sums()).shape == (12, 1)
    assert len(replayed) == 5
    model.exits[1] = model.exits[0]
    assert close(
        built.exit_logits(following, 2, 0, 12),
        model.exits[0].forward_packed(
            following.hidden, Spans(following.offsets, len(following.hidden), following.longest)
        ),
    )


class Sums(torch.nn.Module):
    """A head that is none of the model's: the sum over each text."""

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        sizes = spans.lengths.tolist()
        return torch.stack([part.sum()[None] for part in hidden.split(sizes)])


@torch.no_grad()
def test_exits_of_more_texts_than_a_bucket_takes_are_read_as_usual() -> None:
    model = make_model()
    built = with_graphs(model)
    batch = batch_of([2] * (max_texts(128) + 1))
    live = built.advance(built.start(batch), 1, len(batch))
    assert close(built.exit_logits(live, 1, 0, len(batch)), alone(model, batch)[0])
    assert replays_of(built, int) == {128: [1]}
    assert replays_of(built, torch.nn.Module) == {}


@torch.no_grad()
def test_a_prefix_of_a_large_batch_may_go_on_in_a_bucket() -> None:
    # Its last tile names tokens of texts that are gone, more than the bucket has.
    model = make_model(max_position_embeddings=300)
    batch = batch_of([60] * 40)
    built = CudaBackend.build(
        model, dtype="float32", options=CudaOptions(graphs=True, record_after=0, graph_tokens=256)
    )
    live = built.advance(built.start(batch), 1, 40)
    for layer, kept in ((2, 3), (3, 1)):
        live = built.advance(live, layer, kept)
        expected = alone(model, batch.select(np.arange(kept)))
        assert close(built.exit_logits(live, layer, 0, kept), expected[layer - 1])
    assert replays_of(built, int) == {128: [3], 192: [2]}


@torch.no_grad()
def test_hidden_states_that_lie_in_the_buffer_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    load = _Bucket.load

    def counted(self: _Bucket, hidden: Tensor, places: TextPlaces) -> None:
        loads.append(len(hidden))
        load(self, hidden, places)

    monkeypatch.setattr(_Bucket, "load", counted)
    model, batch = make_model(), random_batch(12, seed=3)
    built = with_graphs(model)
    built_run(built, batch)  # all is recorded
    loads.clear()
    live = built.start(batch)
    for layer, kept in ((1, 12), (2, 12), (3, 11), (4, 5)):
        live = built.advance(live, layer, kept)
        built.exit_logits(live, layer, 0, kept)
    assert loads == [len(batch.input_ids)]
    assert close(built.exit_logits(live, 4, 0, 5), alone(model, batch)[-1, :5])
    # A prefix stays while it fills half of a buffer, though one of its size has a smaller one.
    alike = batch_of([30] * 12)
    for _ in range(2):  # at the second walk all is recorded
        loads.clear()
        live, sizes = built.advance(built.start(alike), 1, 12), []
        for layer, kept in ((2, 8), (3, 5), (4, 4)):
            live = built.advance(live, layer, kept)
            sizes.append(len(live.hidden))
    assert sizes == [240, 150, 120]
    assert loads == [360, 150]
    assert close(built.exit_logits(live, 4, 0, 4), alone(model, alike)[-1, :4])
    loads.clear()
    # Another batch in the same buffer: its texts are copied, and the first batch's are, when it goes on.
    first, second = built.start(batch), built.start(random_batch(12, seed=4))
    first, second = built.advance(first, 1, 12), built.advance(second, 1, 12)
    first = built.advance(first, 2, 12)
    assert len(loads) == 3
    assert close(built.exit_logits(first, 2, 0, 12), alone(model, batch)[1])


@torch.no_grad()
def test_a_batch_without_a_bucket_runs_as_usual() -> None:
    shape = BucketShape(4, 2, tells_texts_apart=False, dtype=torch.float32, device=CPU)
    graphs = LayerGraphs(lambda layer, hidden, tiles: hidden + layer, shape, max_tokens=256, record_after=1)
    hidden, places = torch.zeros(250, 4), places_of([125, 125])
    assert graphs(1, hidden, hidden, places) is None  # the first use
    found = graphs(1, hidden, hidden, places)
    assert found is not None
    assert bool((found == 1).all())
    assert graphs(1, torch.zeros(257, 4), torch.zeros(257, 4), places) is None
    crowded = places_of([65] * (max_tiles(256) + 1))  # few tokens, many tiles
    assert graphs(1, hidden, hidden, crowded) is None


def places_of(lengths: list[int]) -> TextPlaces:
    return TextPlaces(tiles_of(lengths), torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32), None)


def test_several_threads_may_replay() -> None:
    model = make_model()
    built = with_graphs(model)
    batches = [random_batch(8, seed=seed) for seed in range(4)]
    expected = [alone(model, batch)[-1] for batch in batches]
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                logits = built.exit_logits(built_run(built, batches[which]), NUM_LAYERS, 0, 8)
                if not close(logits, expected[which]):
                    wrong.append(which)

    in_threads(work)
    assert wrong == []


# Texts that end: their first token alone


def backends_for(model: GeepForSequenceClassification) -> dict[str, Any]:
    return {
        "packed": PackedBackend.build(model, dtype="float32"),
        "padded": BACKENDS["padded"].build(model, dtype="float32"),
        "cuda": CudaBackend.build(model, dtype="float32"),
    }


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("name", ["packed", "padded", "cuda"])
@torch.no_grad()
def test_texts_that_end_give_the_same_logits(head: str, name: str) -> None:
    model = make_model(head=head)
    # Not sorted by length, for a backend must not rely on that.
    batch = random_batch(11, seed=8, longest=30)
    expected = alone(model, batch)
    built = backends_for(model)[name]
    live, num_texts = built.start(batch), 11
    for layer, continuing in ((1, 9), (2, 9), (3, 4), (4, 0)):
        live = built.advance(live, layer, num_texts, continuing=continuing)
        if continuing < num_texts:
            logits = built.exit_logits(live, layer, continuing, num_texts)
            assert close(logits, expected[layer - 1, continuing:num_texts])
        if continuing:  # those that go on are whole
            assert live.lengths[:continuing].tolist() == batch.lengths[:continuing].tolist()
            assert close(built.exit_logits(live, layer, 0, continuing), expected[layer - 1, :continuing])
            kept = built.select(live, np.arange(continuing)[::-1].copy())
            assert close(built.exit_logits(kept, layer, 0, continuing), expected[layer - 1, :continuing].flip(0))
        num_texts = continuing


@torch.no_grad()
def test_only_an_exit_that_reads_the_first_token_alone_gets_it_alone() -> None:
    batch = random_batch(6, seed=9)
    for head in sorted(HEADS):
        model = make_model(head=head)
        built = PackedBackend.build(model, dtype="float32")
        live = built.advance(built.start(batch), 1, 6, continuing=2)
        rows = int(batch.lengths[:2].sum()) + (4 if head == "cls" else int(batch.lengths[2:].sum()))
        assert len(live.hidden) == rows


@pytest.mark.parametrize("name", ["packed", "cuda"])
@torch.no_grad()
def test_empty_texts_may_end(name: str) -> None:
    model = make_model(head="cls")
    some = random_batch(3, seed=4)
    empty = TokenBatch(some.input_ids[:0], None, np.zeros(1, dtype=np.int64))
    batch = TokenBatch.concat([some.select(ints([0])), empty, some.select(ints([1])), empty, some.select(ints([2]))])
    built = backends_for(model)[name]
    whole = built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 5)
    live = built.start(batch)
    for layer in range(1, NUM_LAYERS + 1):
        live = built.advance(live, layer, 5, continuing=0 if layer == NUM_LAYERS else None)
    assert close(built.exit_logits(live, NUM_LAYERS, 0, 5), whole)


class Told:
    """A backend that notes how many texts it was told to end."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.ended = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def advance(self, live: Any, layer: int, num_texts: int, *, continuing: int | None = None) -> Any:
        self.ended += 0 if continuing is None else num_texts - continuing
        return self.backend.advance(live, layer, num_texts, continuing=continuing)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("on_miss", ["stop", "continue"])
@pytest.mark.parametrize("name", ["packed", "cuda"])
def test_the_engine_lets_texts_end_where_their_answer_is_final(head: str, on_miss: Any, name: str) -> None:
    model = make_model(head=head)
    usual = make_engine(
        model, config=EngineConfig(device="cpu", backend="padded"), table=False, settings=ExitSettings()
    )
    batch = usual.tokenize(random_texts(60, seed=11)).batch
    asked = np.random.default_rng(0).integers(1, NUM_LAYERS + 1, 60)
    # A speed at which a third of all answers would do.
    logits = usual.exit_logits(batch)
    unsure = torch.stack([ExitSettings().uncertainty(part, 1, multi_label=False) for part in logits])
    chosen = ExitSettings(speed=float(unsure.quantile(1 / 3)), on_miss=on_miss)
    expected = usual.run_tokens(batch, settings=chosen, exit_layers=asked)
    told = Told(backends_for(model)[name])
    engine = on_course(usual, backend=told)
    found = engine.run_tokens(batch, settings=chosen, exit_layers=asked)
    assert found.exit_layers.tolist() == expected.exit_layers.tolist()
    assert close(found.logits, expected.logits)
    final = (expected.exit_layers == NUM_LAYERS) if on_miss == "continue" else (expected.exit_layers > 0)
    # Where texts that are answered run along, some of them reach the end.
    runs_along = told.keeps_above < 1 and on_miss == "continue"
    assert told.ended >= final.sum() if runs_along else told.ended == final.sum()
    assert 0 < (expected.exit_layers == NUM_LAYERS).sum() < 60


# Half precision


@torch.inference_mode()
def test_bfloat16_stays_near_float32() -> None:
    model = make_model(head="cls", num_attention_heads=2)
    batch = batch_of([1, 5, 30, 64, 17])
    expected = alone(model, batch)[-1]
    built = CudaBackend.build(model.to(torch.bfloat16), dtype="float32")
    live = built.start(batch)
    for layer in range(1, NUM_LAYERS + 1):
        live = built.advance(live, layer, 5, continuing=0 if layer == NUM_LAYERS else 5)
    found = built.exit_logits(live, NUM_LAYERS, 0, 5).float()
    assert torch.allclose(found, expected, atol=TOLERANCES[torch.bfloat16] * float(expected.abs().max()), rtol=0)


# Compiling


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_one_compilation_serves_all_layers_and_sizes(family: str) -> None:
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layers = CudaBackend.build(make_model(family), dtype="float32").layers
    finish = compiled(layers[0].finish, [layer.weights for layer in layers], backend=count)
    for rows in (5, 9, 200, 2):
        for layer in layers:
            mixed, hidden = torch.randn(rows, 32), torch.randn(rows, 32)
            expected = layer.finish(mixed, hidden, layer.weights)
            assert torch.allclose(finish(mixed, hidden, layer.weights), expected, atol=1e-6)
    assert len([graph for graph in graphs if len(graph.graph.nodes) > 1]) == 1


# The engine


def test_the_default_backend_depends_on_encoder_and_device() -> None:
    known, other = AutoConfig.for_model("modernbert"), AutoConfig.for_model("bert", is_decoder=True)
    assert [default_backend(config, torch.device("cuda")) for config in (known, other)] == ["cuda", "padded"]
    assert [default_backend(config, CPU) for config in (known, other)] == ["packed", "padded"]


def test_a_device_that_the_backend_does_not_run_on_is_refused() -> None:
    assert not CudaBackend.dtypes("mps")
    with pytest.raises(ValueError, match="device='meta' is none that torch can use here"):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device="meta", backend="cuda"))


def test_compile_is_for_the_cuda_backend() -> None:
    with pytest.raises(ValueError, match="compile=True is for the cuda backend, found 'packed'"):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu", compile=True))
    config = EngineConfig(device="cpu", backend="cuda", compile=False)
    built = Engine(make_model(), make_tokenizer(), config=config).deployment.backend
    assert isinstance(built, CudaBackend)
    assert built.options == CudaOptions(compile=False, graphs=False)


# On a GPU


@contextmanager
def no_wait_allowed() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gpu_model(dtype: torch.dtype, **changes: Any) -> GeepForSequenceClassification:
    return make_model(max_position_embeddings=300, **changes).to("cuda", dtype)


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        CudaOptions(attention="tiles", compile=False, graphs=False),
        CudaOptions(attention="varlen", compile=False, graphs=False),
        CudaOptions(attention="runs", compile=False, graphs=False),
        CudaOptions(compile=True, graphs=False),
        CudaOptions(compile=False, graphs=True, record_after=0),
        CudaOptions(compile=True, graphs=True, record_after=0),
    ],
    ids=["tiles", "varlen", "runs", "compile", "graphs", "compile-graphs"],
)
@torch.inference_mode()
def test_a_gpu_gives_the_answers_of_float32_on_the_cpu(dtype: torch.dtype, options: CudaOptions) -> None:
    if dtype == torch.float32 and options.attention == "varlen":
        pytest.skip("varlen takes half precision only")
    # Heads of 8 are below what flash kernels take in some releases.
    model = make_model(head="cls", max_position_embeddings=300, num_attention_heads=2)
    batch = batch_of([1, 5, 90, 128, 30, 30, 17, 64, 2])
    expected = alone(model, batch)
    built = CudaBackend.build(model.to("cuda", dtype), dtype="float32", options=options)
    for _ in range(3):  # the second time compiled code and graphs are there
        live = built.start(batch)
        for layer, num_texts, continuing in ((1, 9, 9), (2, 9, 7), (3, 7, 7), (4, 7, 0)):
            live = built.advance(live, layer, num_texts, continuing=continuing)
            first = continuing if continuing < num_texts else 0
            found = built.exit_logits(live, layer, first, num_texts).float().cpu()
            wanted = expected[layer - 1, first:num_texts]
            assert torch.allclose(found, wanted, atol=TOLERANCES[dtype] * max(1.0, float(wanted.abs().max())), rtol=0)


@on_gpu
@pytest.mark.parametrize(("head", "separator_id"), HEADS_AND_SEPARATORS)
@torch.inference_mode()
def test_exits_recorded_on_a_gpu_give_the_answers_of_the_cpu(head: str, separator_id: int | None) -> None:
    model = make_model(head=head, separator_id=separator_id, num_attention_heads=2)
    batch = batch_for(separator_id, 14, seed=1, longest=30)
    expected = alone(model, batch)
    built = CudaBackend.build(
        model.to("cuda"), dtype="float32", options=CudaOptions(compile=False, graphs=True, record_after=0)
    )
    for _ in range(2):
        live = built.start(batch)
        for layer, kept in ((1, 14), (2, 14), (3, 9), (4, 2)):
            live = built.advance(live, layer, kept)
            found = built.exit_logits(live, layer, 1, kept).cpu()
            wanted = expected[layer - 1, 1:kept]
            # Heads of loud weights round; this is a thousandth of the largest logit.
            assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)
    assert len({head for each in replays_of(built, torch.nn.Module).values() for head in each}) == NUM_LAYERS


@on_gpu
@torch.inference_mode()
def test_texts_beyond_a_tile_equal_the_cpu() -> None:
    model = make_model(max_position_embeddings=300, num_attention_heads=2)
    batch = batch_of([200, 5, 129, 60])
    expected = alone(model, batch)[-1]
    built = CudaBackend.build(model.to("cuda", torch.bfloat16), dtype="float32", options=CudaOptions(compile=False))
    found = built.exit_logits(built_run(built, batch), NUM_LAYERS, 0, 4).float().cpu()
    assert torch.allclose(found, expected, atol=0.1 * float(expected.abs().max()), rtol=0)


@on_gpu
@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("longest", [100, 200])
@torch.inference_mode()
def test_a_staircase_that_stops_waits_for_nothing(head: str, longest: int) -> None:
    model = gpu_model(torch.bfloat16, head=head, num_attention_heads=2)
    options = CudaOptions(compile=False, record_after=0)
    built = CudaBackend.build(model, dtype="float32", options=options)
    batch = batch_of([longest, 7, 60, 33, 12, 5])

    def staircase() -> list[Tensor]:
        answers, live = [], built.start(batch)
        for layer, num_texts, continuing in ((1, 6, 5), (2, 5, 5), (3, 5, 2), (4, 2, 0)):
            live = built.advance(live, layer, num_texts, continuing=continuing)
            if continuing < num_texts:
                answers.append(built.exit_logits(live, layer, continuing, num_texts).float())
        return answers

    expected = staircase()  # buffers are made and graphs recorded
    torch.cuda.synchronize()
    with no_wait_allowed():
        found = staircase()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_gpu
def test_a_run_that_stops_fetches_its_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(head="cls", num_attention_heads=2)
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cuda", compile=False, max_batch_tokens=300))
    batch = engine.tokenize(random_texts(200, seed=5)).batch
    layers = np.random.default_rng(0).integers(1, NUM_LAYERS + 1, 200)
    chosen = ExitSettings(speed=0.5, on_miss="stop")
    once = engine.run_tokens(batch, settings=chosen, exit_layers=layers)
    fetched: list[int] = []
    fetch = Tensor.cpu

    def counting(self: Tensor) -> Tensor:
        fetched.append(len(self))
        torch.cuda.set_sync_debug_mode("default")  # this one may wait
        return fetch(self)

    monkeypatch.setattr(Tensor, "cpu", counting)
    with no_wait_allowed():
        again = engine.run_tokens(batch, settings=chosen, exit_layers=layers)
    assert fetched == [200]
    assert torch.equal(once.logits, again.logits)
