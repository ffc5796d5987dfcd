"""What people see: names, texts and paths stand there as they are, whatever is in them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from geep.acceleration import Acceleration, Pace
from geep.cli import show
from geep.data import BadRow
from geep.promise import Traffic
from geep.scoring import ScoreReport

# Brackets that look like markup, a tag that closes nothing, a name of a picture, a backslash at the end.
NAMES = ["[bold]x[/]", "[/nope]", "[red]", ":tada:", "a[1]\\", "[link=x]y"]
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")


def dataset(name: str) -> tuple[Any, Any]:
    parts = SimpleNamespace(train=[0], profile=[0], calibration=[0], unlabelled=None)
    return SimpleNamespace(name=name, label_names=("a", "b"), test=None), parts


def trained(name: str) -> Any:
    dev: dict[str, Any] = {"num_rows": 3, "micro_f1": None, "score": 1.0, "macro_f1": 1.0, "majority": 0.5}
    return SimpleNamespace(
        was_finished=False,
        steps=1,
        seconds=1.0,
        dev=SimpleNamespace(**dev, best_epoch=1.0),
        learned_nothing=f"always answers {name}",
        exit_agreements={1: 0.75, 2: 1.0},
        num_fitted=1200,
    )


def scored(name: str) -> ScoreReport:
    return ScoreReport(1, [BadRow(2, f"found {name}")], 1, Traffic({4: 1}), 0, 1.0, f"{name}.errors.jsonl")


def answers(name: str) -> list[dict[str, Any]]:
    about = {"score": 0.5, "exit_layer": 1, "predicted_layer": None}
    return [about | {"label": name, "labels": (name,), "text": name, "text_pair": f"second {name}"}]


SHOWN: dict[str, tuple[Callable[[Console, str], None], int]] = {
    "rows": (lambda console, name: show.rows(console, *dataset(name)), 1),
    "trained": (lambda console, name: show.trained(console, trained(name)), 1),
    "scored": (lambda console, name: show.scored(console, scored(name), name, 4), 3),
    "predictions": (lambda console, name: show.predictions(console, answers(name), multi_label=False), 3),
    "several labels": (lambda console, name: show.predictions(console, answers(name), multi_label=True), 3),
}


@names
@pytest.mark.parametrize("what", sorted(SHOWN))
def test_names_and_texts_are_shown_as_they_are(name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown, times = SHOWN[what]
    shown(show.console_for(False), name)
    assert capsys.readouterr().out.count(name) == times


@names
@pytest.mark.parametrize("terminal", [True, False])
def test_work_is_called_as_it_is(name: str, terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=terminal, emoji=False)
    with show.bars(console) as report:
        report(name, 1, 2)
    assert name in capsys.readouterr().out


@names
def test_errors_are_told_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), show.errors(False):
        raise ValueError(f"found {name}, expected another")
    assert f"found {name}, expected another" in capsys.readouterr().err


def test_no_path_is_broken_by_the_width_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["a folder with a long name"] * 6)
    for what in ("rows", "trained", "scored"):
        shown, times = SHOWN[what]
        shown(show.console_for(False), path)
        assert capsys.readouterr().out.count(path) == times
    with pytest.raises(typer.Exit), show.errors(False):
        raise FileNotFoundError(f"There is no file {path}.")
    assert f"There is no file {path}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts_per_second", "refused", "shown"),
    [
        (300.0, None, "3.00x the texts a second. Next: geep predict a[1] FILE"),
        (50.0, None, "On this machine that is slower (0.50x), though fewer layers run: use speed 0 here."),
        (100.0, "no exit pays", "Not faster: no exit pays"),
    ],
)
def test_a_classifier_is_said_to_be_faster_only_where_it_is(
    texts_per_second: float, refused: str | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promise = {"max_accuracy_drop": None, "min_agreement": 0.99}
    certificate = {"num_texts": 400, "risk": 0.0, "bound": 0.0092}
    calibration = {"promise": promise, "certificate": certificate} if refused is None else {"refused": refused}
    found = Acceleration(
        promise="an agreement of at least 0.99",
        speed=0.5,
        before=Pace(4.0, 100.0, 1.0),
        after=Pace(1.5, texts_per_second, 0.995),
        calibration=calibration,
        depths=(1, 2),
        losses=(0.1, 0.2),
        num_texts=2000,
        copies=0,
        num_learned=1200,
        num_chosen=400,
        num_certified=400,
    )
    show.accelerated(show.console_for(False), found, "a[1]")
    assert shown in " ".join(capsys.readouterr().out.split())


def test_fitted_exits_are_said_to_be_near_the_full_model(capsys: pytest.CaptureFixture[str]) -> None:
    show.trained(show.console_for(False), trained("red"))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Exits fitted on 1,200 texts answer as the full model does, on others: layer 1 75.0%, layer 2 100.0%." in said
    )
