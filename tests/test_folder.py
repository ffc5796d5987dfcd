"""A model folder on disk and on the hub: it comes back whole or is refused, and nothing is written by halves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import NUM_LAYERS, fit_predictor, make_engine, make_model, make_tokenizer, random_texts
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from test_engine import RULES, TEMPERATURES, TEXTS, assert_alike, every_rule
from torch import nn
from transformers import AutoTokenizer

from geep.engine import Engine, EngineConfig, ExitSettings, load_model
from geep.folder import (
    SETTINGS_FILE,
    TRAINING_FILE,
    CalibrationFile,
    HubOptions,
    Provenance,
    file_of,
    fingerprint,
    publish,
)
from geep.modeling import GeepForSequenceClassification

# Files


def test_a_file_is_published_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "file.bin"
    assert publish(path, b"one") == path
    publish(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("at", ["fsync", "write", "rename"])
def test_a_write_that_fails_leaves_the_old_file_alone(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path / "file.bin", b"old")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    data: Any = b"new"
    if at == "fsync":
        monkeypatch.setattr("geep.folder.files.os.fsync", full)
    elif at == "rename":
        monkeypatch.setattr(Path, "replace", full)
    else:
        data = "no bytes"
    with pytest.raises((OSError, TypeError)):
        publish(path, data)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.bin"]


def test_every_file_of_a_folder_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table, settings and record are flushed before they take their names, and so are the names."""
    flushed: list[int] = []
    monkeypatch.setattr("geep.folder.files.os.fsync", flushed.append)
    make_engine().save_exits(tmp_path)
    Provenance({}, {}, []).write(tmp_path)
    assert len(flushed) == 2 * 3
    assert {each.name for each in tmp_path.iterdir()} == {table_of(tmp_path).name, SETTINGS_FILE, TRAINING_FILE}


def test_a_fingerprint_is_of_names_shapes_values_and_words() -> None:
    class Small(nn.Module):
        def __init__(self, *shape: int, name: str = "weight") -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.arange(6.0).reshape(shape)))

    words = make_tokenizer()
    one = fingerprint(Small(2, 3), words)
    assert one == fingerprint(Small(2, 3), words)
    # bfloat16 holds these numbers exactly: how weights are stored does not matter.
    assert one == fingerprint(Small(2, 3).bfloat16(), words)
    changed = Small(2, 3)
    with torch.no_grad():
        changed.weight[1, 2] += 1e-6
    others = [fingerprint(other, words)["model"] for other in (Small(3, 2), Small(2, 3, name="bias"), changed)]
    assert len({one["model"], *others}) == 4
    more = make_tokenizer()
    more.add_tokens(["novelty"])
    assert fingerprint(Small(2, 3), more) != one
    assert fingerprint(Small(2, 3), more)["model"] == one["model"]


# Settings and records


def test_a_calibration_file_comes_back(tmp_path: Path) -> None:
    files = {"table": "exit_table-0.safetensors", "ranges": None}
    made = CalibrationFile({"speed": 0.5, "criterion": "Maß"}, files, {"model": "m"}, {"bound": 0.1}, {"profile": {}})
    made.write(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / SETTINGS_FILE):
        assert CalibrationFile.read(place) == made
    CalibrationFile({}).write(tmp_path)
    assert CalibrationFile.read(tmp_path) == CalibrationFile({})
    with pytest.raises(FileNotFoundError):
        CalibrationFile.read(tmp_path / "elsewhere")


def test_provenance_comes_back_and_says_what_it_was_made_of(tmp_path: Path) -> None:
    made = Provenance({"data": {"source": "trec", "seed": 3}}, {"steps": 7}, [{"loss": 0.5}])
    assert made.write(tmp_path) == tmp_path / TRAINING_FILE
    assert Provenance.read(tmp_path) == made
    assert made.data == {"source": "trec", "seed": 3}
    with pytest.raises(ValueError, match="trained without plan="):
        Provenance({"data": None}, {}, []).data  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"no folder finished by `geep train`"):
        Provenance.read(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", ["", "[]", "3", '{"about": {}}', "\udcff"])
def test_damaged_provenance_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / TRAINING_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is no record of a training"):
        Provenance.read(tmp_path)


# Model folders


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
    assert {"config.json", "model.safetensors", table_of(tmp_path).name, "calibration.json"} <= names
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
def test_a_damaged_calibration_is_refused(content: str, folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    stored = CalibrationFile.read(model)
    rest = json.dumps({"files": stored.files, "belongs_to": stored.belongs_to, "certificate": None})
    content = content.replace('{"settings"', rest[:-1] + ', "settings"')
    if "agreement" not in content:
        content = content.replace('"temperatures": {}', '"temperatures": {}, "agreement": {}')
    (model / "calibration.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"calibration\.json (is|are) damaged .*run `geep (profile|calibrate)` "):
        Engine.from_pretrained(model, device="cpu")


@pytest.mark.parametrize("name", ["../table.safetensors", "/etc/passwd", "table.bin", "", 3])
def test_a_calibration_names_files_beside_itself_alone(name: object, tmp_path: Path) -> None:
    CalibrationFile({}, {"table": name}).write(tmp_path)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="damaged"):
        CalibrationFile.read(tmp_path)


@pytest.mark.bfloat16
def test_rounded_weights_are_not_saved_but_their_table_is(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = EngineConfig(device="cpu", dtype="bfloat16", backend="padded")
    base = Engine(model, tokenizer, config=config)
    engine = base.replace(predictor=fit_predictor(base), settings=ExitSettings(speed=0.5))
    with pytest.raises(ValueError, match="rounded weights are not saved"):
        engine.save_pretrained(tmp_path)
    engine.save_exits(tmp_path)
    texts = random_texts(20, seed=3)
    again = Engine.from_pretrained(tmp_path, device="cpu", dtype="bfloat16", backend="padded")
    assert [found.label for found in again.predict(texts)] == [found.label for found in engine.predict(texts)]


@pytest.fixture(scope="module")
def folder(tiny_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that no test may change."""
    path = tmp_path_factory.mktemp("folder") / "model"
    tiny_engine.save_pretrained(path, record={"found": "by hand"})
    return path


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="weights of .* are damaged"):
        Engine.from_pretrained(model, device="cpu")

    weights.write_bytes(whole)
    tensors = load_file(weights)
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("teacher.")}
    save_file(lacking, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \d+ tensors, such as 'teacher"):
        Engine.from_pretrained(model, device="cpu")

    tensors["teacher.out.bias"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'teacher\.out\.bias' holds NaN"):
        Engine.from_pretrained(model, device="cpu", exits=False)


def test_a_folder_that_is_not_there_is_said_to_be_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="There is no model folder"):
            Engine.from_pretrained(name)


def test_without_exits_a_folder_is_the_full_model(folder: Path) -> None:
    plain = Engine.from_pretrained(folder, device="cpu", exits=False)
    assert plain.predictor is None
    assert plain.settings == ExitSettings()
    assert {answer.exit_layer for answer in plain.predict(TEXTS)} == {NUM_LAYERS}


def test_saved_exits_leave_no_older_table(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    make_engine(table=False, settings=ExitSettings(speed=0.2)).save_exits(model)
    assert not list(model.glob("exit_table*"))
    assert CalibrationFile.read(model).settings["speed"] == 0.2


def table_of(folder: Path) -> Path:
    """The one table in a folder."""
    (found,) = folder.glob("exit_table-*.safetensors")
    return found


# The hub


GIVEN = {"revision": "v2", "token": "secret", "cache_dir": "/cache", "local_files_only": True}


def test_only_options_that_were_given_are_handed_on() -> None:
    assert HubOptions().keywords() == {}
    assert HubOptions(**GIVEN).keywords() == GIVEN  # type: ignore[arg-type]
    assert HubOptions(token=False).keywords() == {"token": False}


@pytest.mark.parametrize("options", [{}, {"revision": "v2"}, GIVEN, GIVEN | {"cache_dir": Path("/cache")}])
def test_a_model_of_the_hub_is_asked_for_with_the_options_given(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, tokenizer, table and settings all come from the same revision, cache and network."""
    asked: dict[str, dict[str, Any]] = {}
    load = GeepForSequenceClassification.from_pretrained
    load_tokenizer = AutoTokenizer.from_pretrained

    def model(name: str, *, dtype: Any, output_loading_info: bool, **rest: Any) -> Any:
        asked[f"model {name}"] = rest
        return load(folder, dtype=dtype, output_loading_info=output_loading_info)

    def tokenizer(name: str, **rest: Any) -> Any:
        asked[f"tokenizer {name}"] = rest
        return load_tokenizer(folder)

    def cached(name: str, file: str, *, _raise_exceptions_for_missing_entries: bool, **rest: Any) -> str | None:
        assert not _raise_exceptions_for_missing_entries
        asked[f"{file} {name}"] = rest
        return str(folder / file)

    monkeypatch.setattr(GeepForSequenceClassification, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    found = Engine.from_pretrained("somebody/something", device="cpu", **options)
    assert found.predictor is not None
    assert found.settings.to_dict() == CalibrationFile.read(folder).settings
    names = ("model", "tokenizer", table_of(folder).name, SETTINGS_FILE)
    expected = {name: str(value) if name == "cache_dir" else value for name, value in options.items()}
    # Whatever the options, no code of the checkpoint is run.
    safe: dict[str, dict[str, Any]] = {name: {"trust_remote_code": False} for name in ("model", "tokenizer")}
    safe["model"]["ignore_mismatched_sizes"] = True
    assert asked == {f"{name} somebody/something": expected | safe.get(name, {}) for name in names}


def test_a_name_that_is_no_folder_is_said_to_be_none_before_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(name: str, **options: Any) -> Any:
        assert "There is no folder modles/r9; asking" in caplog.text
        raise OSError("no network")

    monkeypatch.setattr(GeepForSequenceClassification, "from_pretrained", ask)
    with pytest.raises(OSError, match="no folder modles/r9, and as a model of the hub it cannot be had: no network"):
        Engine.from_pretrained("modles/r9")


def test_files_of_a_folder_need_no_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: pytest.fail("asked the hub"))
    assert file_of(folder, SETTINGS_FILE, HubOptions(revision="v2")) == folder / SETTINGS_FILE
    assert file_of(str(folder), "nothing.bin") is None


def test_a_model_of_the_hub_may_have_no_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: None)
    assert file_of("somebody/something", SETTINGS_FILE) is None
    assert not caplog.records

    def gone(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("transformers.utils.hub.cached_file", gone)
    assert file_of("somebody/something", SETTINGS_FILE) is None
    assert "no network" in caplog.text


class Hub:
    """The two calls that an upload makes; what was uploaded is kept in a folder."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.calls = place, []
        hub = self

        def create_repo(self: HfApi, repo_id: str, **options: Any) -> Any:
            hub.calls.append(("create", repo_id, self.token, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
            hub.calls.append(("upload", repo_id, self.token, options))
            shutil.copytree(folder_path, hub.place)
            return "https://huggingface.co/me/something/commit/1"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


def test_what_is_pushed_to_the_hub_loads_again(
    tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    address = tiny_engine.push_to_hub(
        "something", token="secret", private=True, revision="dev", commit_message="Better exits"
    )
    assert address == "https://huggingface.co/me/something/commit/1"
    assert hub.calls == [
        ("create", "something", "secret", {"private": True, "exist_ok": True}),
        ("upload", "me/something", "secret", {"revision": "dev", "commit_message": "Better exits"}),
    ]
    loaded = Engine.from_pretrained(hub.place, device="cpu")
    assert loaded.settings == tiny_engine.settings
    assert_alike(loaded.predict(TEXTS), tiny_engine.predict(TEXTS))


def test_rounded_weights_are_not_pushed_and_no_repository_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    engine = make_engine(table=False)
    nn.Module.to(engine.model, torch.bfloat16)
    with pytest.raises(ValueError, match="rounded weights are not saved"):
        engine.push_to_hub("something")
    assert hub.calls == []


def test_a_model_alone_is_loaded_in_float32(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.float32
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
