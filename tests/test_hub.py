"""The hub is asked once, and shortly; what is in the cache does without it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoTokenizer

from geep.engine import Engine
from geep.folder import HubOptions, reachable
from geep.modeling import GeepForSequenceClassification


class Hub:
    """Answers the one question, or fails; notes how it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.failure: Exception | None = None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi, "model_info", lambda api, name, **options: self.answer(name, options))

    def answer(self, name: str, options: dict[str, Any]) -> None:
        self.asked.append((name, options))
        if self.failure is not None:
            raise self.failure


def status(code: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=code, headers={}, request=None)
    return kind("as the hub says", response=response)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache in which one model is."""
    place = tmp_path / "models--somebody--something"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    make_model().save_pretrained(place / "snapshots" / ("a" * 40))
    make_tokenizer().save_pretrained(place / "snapshots" / ("a" * 40))
    return str(tmp_path)


@pytest.mark.parametrize("failure", [ConnectionError("no network"), TimeoutError("late"), status(503)])
def test_a_hub_that_does_not_answer_is_asked_once_and_by_nobody_else(
    failure: Exception, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failure = failure
    for later in (GeepForSequenceClassification, AutoTokenizer):
        monkeypatch.setattr(later, "from_pretrained", lambda *_, **__: pytest.fail("asked again"))
    with pytest.raises(OSError, match=f"no folder modles/r9, and the .* hub does not answer .*{failure}"):
        Engine.from_pretrained("modles/r9", revision="v2", token="secret")
    assert hub.asked == [("modles/r9", {"revision": "v2", "token": "secret", "timeout": 5})]


def test_what_is_in_the_cache_loads_where_the_hub_does_not_answer(
    hub: Hub, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.failure = ConnectionError("no network")
    with caplog.at_level(logging.INFO):
        engine = Engine.from_pretrained("somebody/something", cache_dir=cache, device="cpu")
    assert len(engine.predict(["w1"])) == 1
    # What transformers asks of tokenizers' own accord has no time of ours.
    assert [options["timeout"] for _, options in hub.asked].count(5) == 1
    assert "somebody/something is taken from the cache" in caplog.text


def test_a_hub_that_answers_is_asked_for_the_model_as_before(hub: Hub, cache: str) -> None:
    options = HubOptions(revision="v2")
    assert reachable("somebody/something", options) == options
    hub.failure = status(404, RepositoryNotFoundError)
    assert reachable("somebody/something", options) == options


def test_nothing_is_asked_of_a_folder_without_network_or_of_no_name(
    hub: Hub, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failure = AssertionError("asked")
    assert reachable(tmp_path, HubOptions()) == HubOptions()
    local = HubOptions(local_files_only=True)
    assert reachable("somebody/something", local) == local
    for name in ("./models/r9", "/models/r9", "~/models/r9", "my/own/models", "my model", "../r9"):
        with pytest.raises(FileNotFoundError, match=f"no model folder {name}"):
            reachable(name, HubOptions())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert reachable("somebody/something", HubOptions()) == HubOptions()
    assert hub.asked == []
