"""The ONNX backend: what it has beyond the promises of every backend (test_backends.py): 8 bits, threads, refusals."""

from __future__ import annotations

import ast
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import NUM_LAYERS, alone, make_model, make_tokenizer, random_batch, random_texts, toy_task
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import geep.backends.onnx as onnx_backend
from geep.backends import OnnxBackend, TokenBatch
from geep.engine import Engine, EngineConfig
from geep.modeling import GeepForSequenceClassification

INT8 = EngineConfig(device="cpu", backend="onnx", dtype="int8")
# Of the size of the logits. The sessions compute each token by itself in whole numbers; attention rounds as float32
# does, which may move a value over the border between two 8-bit steps.
BESIDE_OTHERS = 1e-3


def logits_of(backend: Any, batch: TokenBatch, depths: tuple[int, ...] = (1, 2, 3, NUM_LAYERS)) -> Tensor:
    """Logits of all exits, (num_depths, num_texts, num_labels)."""
    live, found = backend.start(batch), []
    for layer in range(1, NUM_LAYERS + 1):
        live = backend.advance(live, layer, len(batch))
        if layer in depths:
            found.append(backend.exit_logits(live, layer, 0, len(batch)))
    return torch.stack(found)


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def build(model: GeepForSequenceClassification, dtype: str = "int8", *, num_threads: int = 1) -> OnnxBackend:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return OnnxBackend.build(model, dtype=dtype)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def trained() -> GeepForSequenceClassification:
    """A model that has learned the toy task."""
    model, tokenizer = make_model(), make_tokenizer()
    texts, labels = toy_task(600, seed=1)
    inputs, target = tokenizer(texts, padding=True, return_tensors="pt"), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for step in range(120):
            rows = torch.arange(step * 50, (step + 1) * 50) % len(texts)
            output = model(**{name: rows_of[rows] for name, rows_of in inputs.items()}, output_exits=True)
            loss = sum(F.cross_entropy(logits, target[rows]) for logits in output.exit_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


# Eight bits


def test_int8_answers_as_float32_does_on_a_task_that_was_learned(trained: GeepForSequenceClassification) -> None:
    texts, labels = toy_task(400, seed=2)
    batch = Engine(trained, make_tokenizer(), config=INT8).tokenize(texts).batch
    exact, rounded = (logits_of(build(trained, dtype), batch) for dtype in ("float32", "int8"))
    assert (exact[-1].argmax(-1) == torch.from_numpy(labels)).float().mean() > 0.9
    assert (rounded.argmax(-1) == exact.argmax(-1)).float().mean() > 0.99
    assert near(rounded, exact, 0.1)
    assert not near(rounded, exact, 1e-4)


def test_int8_logits_do_not_depend_on_the_texts_beside() -> None:
    batch = random_batch(12, seed=1)
    backend = build(make_model())
    by_itself = torch.cat([logits_of(backend, batch.select(np.array([row]))) for row in range(12)], dim=1)
    assert near(logits_of(backend, batch), by_itself, BESIDE_OTHERS)
    assert torch.equal(logits_of(backend, batch), logits_of(backend, batch))


def test_int8_texts_go_through_prefixes_selections_and_mergers_unharmed() -> None:
    batch, backend = random_batch(9, seed=2), build(make_model())
    expected = logits_of(backend, batch)[-1]
    first, second = (backend.start(batch.select(rows)) for rows in (np.arange(5), np.arange(5, 9)))
    first, second = backend.advance(first, 1, 4), backend.advance(second, 1, 4)
    live = backend.concat([second, backend.select(first, np.array([3, 0]))])
    texts = [5, 6, 7, 8, 3, 0]
    for layer in range(2, NUM_LAYERS + 1):
        live = backend.advance(live, layer, 5 if layer > 2 else 6)
    assert near(backend.exit_logits(live, NUM_LAYERS, 1, 5), expected[texts[1:5]], BESIDE_OTHERS)


def test_int8_texts_without_any_token_harm_no_other() -> None:
    batch, backend = random_batch(2, seed=3), build(make_model())
    empty = TokenBatch(batch.input_ids[:0], None, np.zeros(1, dtype=np.int64))
    logits = logits_of(backend, TokenBatch.concat([empty, batch, empty]))
    assert near(logits[:, 1:3], logits_of(backend, batch), BESIDE_OTHERS)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(logits_of(backend, empty)).all()


def run_linear(weight: Tensor, bias: Tensor, x: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    graph = onnx_backend._Graph(onnx, largest)
    graph.linear("x", (weight, bias))
    session = onnx_backend._session(onnxruntime, graph.model({"x": weight.shape[1]}, weight.shape[0]))
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("largest", [127, 64])
def test_an_int8_product_is_that_of_the_rounded_numbers(largest: int) -> None:
    random = np.random.default_rng(4)
    weight = random.standard_normal((6, 32)).astype(np.float32) * np.array(
        [[1e-3], [1], [50], [1], [1], [0]], np.float32
    )
    bias = random.standard_normal(6).astype(np.float32)
    x = random.standard_normal((5, 32)).astype(np.float32) * np.array([[1], [1e-6], [1e4], [0], [1]], np.float32)
    steps_w = np.abs(weight).max(axis=1, keepdims=True) / largest + 1e-38
    steps_x = np.abs(x).max(axis=1, keepdims=True) / 127 + 1e-38
    rounded_w, rounded_x = np.rint(weight / steps_w) * steps_w, np.rint(x / steps_x) * steps_x
    found = run_linear(torch.from_numpy(weight), torch.from_numpy(bias), x, largest)
    assert np.allclose(found, rounded_x @ rounded_w.T + bias, rtol=1e-4, atol=1e-5)
    # The error is that of rounding: half a step of each factor, whatever the other rows hold.
    exact = x.astype(np.float64) @ weight.T + bias
    bound = 32 * (steps_x / 2 * np.abs(weight).max(axis=1) + steps_w.T / 2 * np.abs(x).max(axis=1, keepdims=True))
    assert (np.abs(found - exact) <= 1.1 * bound + 1e-5).all()
    assert np.array_equal(found[3], bias)


def written_graphs(monkeypatch: pytest.MonkeyPatch, dtype: str) -> list[Any]:
    """Graphs of all sessions of a backend; they run as written."""
    written, load = [], onnx_backend._session
    monkeypatch.setattr(onnx_backend, "_session", lambda runtime, model: written.append(model) or load(runtime, model))
    build(make_model(), dtype)
    return [onnx.load_from_string(model).graph for model in written]


@pytest.mark.parametrize(("dtype", "product"), [("float32", "MatMul"), ("int8", "MatMulIntegerToFloat")])
def test_all_four_products_of_a_layer_run_in_the_dtype(
    dtype: str, product: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    graphs = written_graphs(monkeypatch, dtype)
    operators = [node.op_type for graph in graphs for node in graph.node]
    assert len(graphs) == 2 * NUM_LAYERS
    assert operators.count(product) == 4 * NUM_LAYERS
    assert sum("MatMul" in operator for operator in operators) == 4 * NUM_LAYERS
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vnni", "machine", "largest"), [(True, "x86_64", 127), (False, "AMD64", 64), (False, "arm64", 127)]
)
def test_weights_have_7_bits_where_the_cpu_would_overflow(
    vnni: bool, machine: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for graph in written_graphs(monkeypatch, "int8")
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(weights) == 4 * NUM_LAYERS
    # Each output has its own scale: the largest weight of every one is the largest there is.
    assert all((np.abs(weight.astype(int)).max(axis=0) == largest).all() for weight in weights)


# Threads


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_any_number_of_threads_gives_the_same_logits(dtype: str) -> None:
    model, batch = make_model(), random_batch(120, seed=5)
    assert len(batch.input_ids) > 2 * onnx_backend._TILE
    alone_, together = (logits_of(build(model, dtype, num_threads=number), batch) for number in (1, 3))
    assert near(together, alone_, 1e-5 if dtype == "float32" else BESIDE_OTHERS)


def test_calls_may_come_from_several_threads() -> None:
    backend = build(make_model(), num_threads=2)
    batches = [random_batch(30, seed=seed) for seed in range(8)]
    expected = [logits_of(backend, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: logits_of(backend, batch), batches))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# What it knows and what it refuses


@pytest.mark.parametrize("activation", sorted(onnx_backend.ACTIVATIONS))
def test_activations_are_those_of_the_encoder(activation: str) -> None:
    model, batch = make_model(hidden_act=activation), random_batch(4)
    assert near(logits_of(build(model, "float32"), batch), alone(model, batch), 1e-5)


def test_encoders_that_it_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"knows the activations \['gelu'.*got 'silu'; use backend='packed'"):
        build(make_model(hidden_act="silu"))
    with pytest.raises(ValueError, match="got 'modernbert'; use backend='padded'"):
        build(make_model("modernbert"))


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("onnx", "bfloat16", "not run by the onnx backend on cpu, which runs float32 or int8.*or backend='packed'"),
        ("padded", "int8", "not run by the padded backend.*or backend='packed'"),
    ],
)
def test_a_dtype_that_the_backend_does_not_run_is_refused(backend: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu", backend=backend, dtype=dtype))


def test_a_device_other_than_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="onnx backend does not run on meta; use device='cpu'"):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device="meta", backend="onnx"))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package '{package}'.*pip install 'geep\[onnx\]'"):
        build(make_model())


def test_nothing_of_the_extra_is_imported_before_it_is_asked_for() -> None:
    for path in Path(onnx_backend.__file__).parents[1].rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"onnx", "onnxruntime"}, path


# In an engine


@pytest.mark.parametrize(("vnni", "weights"), [(True, ""), (False, " with 7-bit weights")])
def test_an_int8_engine_says_what_it_runs(vnni: bool, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    engine = Engine(make_model(), make_tokenizer(), config=INT8)
    assert engine.dtype == "int8"
    assert engine.deployed_as == f"onnx, int8{weights}, at most 64 tokens"


def test_an_int8_engine_saves_float32_weights(tmp_path: Path) -> None:
    engine = Engine(make_model(), make_tokenizer(), config=INT8)
    engine.save_pretrained(tmp_path)
    again = Engine.from_pretrained(tmp_path, device="cpu", backend="onnx", dtype="int8")
    texts = random_texts(12)
    assert again.predict(texts) == engine.predict(texts)
    assert Engine.from_pretrained(tmp_path, device="cpu").identity == engine.identity
