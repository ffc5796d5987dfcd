"""Data sets that have names: their rows, the hub's through the real `datasets` library, and what is said without it.

The hub itself is not asked. What it answers is what its pages and programs that load these sets say of columns,
classes and files.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from geep import data
from geep.cli import app

TEXT, NUMBER = Value("string"), Value("int64")
HUB = {name: source.rows for name, source in data.DATASETS.items() if isinstance(source.rows, data.HubSet)}
FOLDER_ONLY = [name for name, source in data.DATASETS.items() if source.rows is None]
PAPERS = {
    *("chnsenticorp", "book_review", "shopping", "lcqmc", "weibo", "thucnews"),
    *("ag_news", "amazon_full", "dbpedia", "yahoo_answers", "yelp_full", "yelp_polarity"),
}

POLARITY = ClassLabel(names=["negative", "positive"])
TOPICS = [
    *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
    *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
]
KINDS = [
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building"),
    *("NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
]

# By name: what the hub's columns are, two rows of them, and the texts and labels that should come of it.
CASES: list[tuple[str, dict[str, Any], dict[str, list[Any]], list[str], list[str]]] = [
    ("ag_news", {"text": TEXT, "label": ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])},
     {"text": ["a b", "c"], "label": [3, 0]}, ["a b", "c"], ["Sci/Tech", "World"]),
    ("dbpedia", {"label": ClassLabel(names=KINDS), "title": TEXT, "content": TEXT},
     {"label": [13, 0], "title": ["E. D. Abbott", ""], "content": [" of Portsmouth", "x"]},
     ["E. D. Abbott of Portsmouth", "x"], ["WrittenWork", "Company"]),
    ("yahoo_answers",
     {"id": NUMBER, "topic": ClassLabel(names=TOPICS), "question_title": TEXT, "question_content": TEXT,
      "best_answer": TEXT},
     {"id": [0, 1], "topic": [4, 9], "question_title": ["why?", "who"], "question_content": ["", "so"],
      "best_answer": ["because", None]},
     ["why? because", "who so"], ["Computers & Internet", "Politics & Government"]),
    ("yelp_full",
     {"label": ClassLabel(names=["1 star", "2 star", "3 stars", "4 stars", "5 stars"]), "text": TEXT},
     {"label": [1, 4], "text": ["bad", "good"]}, ["bad", "good"], ["2 stars", "5 stars"]),
    ("yelp_polarity", {"text": TEXT, "label": ClassLabel(names=["1", "2"])},
     {"text": ["bad", "good"], "label": [0, 1]}, ["bad", "good"], ["negative", "positive"]),
    ("amazon_full", {"class_index": NUMBER, "review_title": TEXT, "review_text": TEXT},
     {"class_index": [1, 5], "review_title": ["Broke", None], "review_text": ["at once", "fine"]},
     ["Broke at once", "fine"], ["1 star", "5 stars"]),
    ("sst2", {"idx": Value("int32"), "sentence": TEXT, "label": POLARITY},
     {"idx": [0, 1], "sentence": ["dull", "fun"], "label": [0, 1]}, ["dull", "fun"], ["negative", "positive"]),
    ("trec", {"text": TEXT, "label": NUMBER, "label_coarse": NUMBER, "label_coarse_original": TEXT},
     {"text": ["How far ?", "Who ?"], "label": [40, 3], "label_coarse": [5, 3],
      "label_coarse_original": ["NUM", "HUM"]}, ["How far ?", "Who ?"], ["NUM", "HUM"]),
    ("chnsenticorp", {"text": TEXT, "label": POLARITY},
     {"text": ["差", "好"], "label": [0, 1]}, ["差", "好"], ["negative", "positive"]),
    ("chnsenticorp", {"text": TEXT, "label": NUMBER},
     {"text": ["差", "好"], "label": [0, 1]}, ["差", "好"], ["negative", "positive"]),
    ("lcqmc", {"sentence1": TEXT, "sentence2": TEXT, "score": Value("int32")},
     {"sentence1": ["甲", "乙"], "sentence2": ["丙", "丁"], "score": [1, 0]},
     ["甲", "乙"], ["same meaning", "different meaning"]),
    ("lcqmc", {"sentence1": TEXT, "sentence2": TEXT, "score": Value("float64")},
     {"sentence1": ["甲", "乙"], "sentence2": ["丙", "丁"], "score": [1.0, 0.0]},
     ["甲", "乙"], ["same meaning", "different meaning"]),
    ("shopping", {"cat": TEXT, "label": NUMBER, "text": TEXT},
     {"cat": ["书籍", "平板"], "label": [1, 0], "text": ["好", "差"]}, ["好", "差"], ["positive", "negative"]),
    ("weibo", {"label": NUMBER, "review": TEXT},
     {"label": [1, 0], "review": ["[哈哈]", "[怒]"]}, ["[哈哈]", "[怒]"], ["positive", "negative"]),
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Lets the library load tables of memory in the place of the hub's; gives what it is asked."""

    def serve(columns: dict[str, Any], rows: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def load(path: str, **options: Any) -> Dataset:
            asked.append({"path": path, **options})
            return Dataset.from_dict(dict(rows), Features(columns))

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return serve


# --- The rows


def test_the_papers_twelve_have_names_and_every_row_is_told() -> None:
    assert data.DATASETS.keys() == PAPERS | {"sst2", "trec", "reuters-r8", "reuters-r52", "20newsgroups"}
    for name, source in data.DATASETS.items():
        assert all((source.title, source.licence, source.published, source.split))
        assert source.language in ("English", "Chinese")
        assert len(set(source.labels)) == len(source.labels) >= 2
        assert ("None of the papers' twelve" in source.split) == (name not in PAPERS)


@pytest.mark.parametrize("name", HUB)
def test_a_row_of_the_hub_fits_together(name: str) -> None:
    source, rows = data.DATASETS[name], HUB[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", rows.hub_id)
    assert source.hub_id == rows.hub_id
    assert rows.revision is None or re.fullmatch("[0-9a-f]{40}", rows.revision)
    assert "train" in rows.splits
    assert rows.splits.keys() <= {"train", "dev", "test"}
    assert len(set(rows.splits.values())) == len(rows.splits)
    assert (rows.pair is not None) == source.pairs
    for spelling in rows.spellings:
        assert len(set(spelling)) == len(source.labels)
    assert name in {case[0] for case in CASES}, "a row needs a case that tells what the hub's columns are"


# --- Sets of the hub


@pytest.mark.parametrize(("name", "columns", "rows", "texts", "labels"), CASES)
def test_a_set_of_the_hub_is_read_by_its_row(
    name: str,
    columns: dict[str, Any],
    rows: dict[str, list[Any]],
    texts: list[str],
    labels: list[str],
    hub: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    asked = hub(columns, rows)
    found = data.load_dataset(name, cache_dir=tmp_path)
    assert found.name == name
    assert found.label_names == tuple(sorted(labels))
    for part in (found.train, found.dev, found.test):
        if part is not None:
            assert list(part.texts) == texts
            assert [found.label_names[label] for label in part.labels.tolist()] == labels  # type: ignore[union-attr]
            assert part.text_pairs == (["丙", "丁"] if name == "lcqmc" else None)
    facts = HUB[name]
    assert (found.dev is not None, found.test is not None) == ("dev" in facts.splits, "test" in facts.splits)
    common = {"path": facts.hub_id, "revision": facts.revision, "cache_dir": str(tmp_path)}
    assert asked == [{**common, "split": split} for split in facts.splits.values()]


def test_the_secret_labels_of_sst2_are_never_read() -> None:
    assert "test" not in HUB["sst2"].splits.values()


def test_rows_of_the_hub_without_a_text_are_left_out_and_counted(
    hub: Callable[..., list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["a", None, "b", "  ", "c"] * 500
    hub(
        {"cat": TEXT, "label": NUMBER, "text": TEXT},
        {"cat": ["x"] * 2500, "label": [0, 1, 1, 1, 0] * 500, "text": texts},
    )
    with caplog.at_level(logging.WARNING):
        found = data.load_dataset("shopping")
    assert list(found.train.texts) == ["a", "b", "c"] * 500
    assert found.train.labels.tolist() == [0, 1, 0] * 500  # type: ignore[union-attr]
    assert "1000 of 2500 rows have no text and are left out" in caplog.text
    pairs = {"sentence1": ["a", "", "c"], "sentence2": ["d", "e", None], "score": [0, 1, 1]}
    hub({"sentence1": TEXT, "sentence2": TEXT, "score": NUMBER}, pairs)
    with pytest.raises(ValueError, match=r"C-MTEB/LCQMC/train has the labels \['different meaning'\] only"):
        data.load_dataset("lcqmc")


@pytest.mark.parametrize(
    ("columns", "rows", "found"),
    [
        ({"text": TEXT, "labels": NUMBER}, {"text": ["a"], "labels": [0]}, r"the columns \['text', 'labels'\]"),
        ({"text": TEXT, "label": NUMBER}, {"text": ["a"], "label": [4]}, "the label 4 in 'label'"),
        ({"text": TEXT, "label": TEXT}, {"text": ["a"], "label": [None]}, "the label None in 'label'"),
        (
            {"text": TEXT, "label": ClassLabel(names=["World", "Sport"])},
            {"text": ["a", "b"], "label": [0, 1]},
            "the label 1 in 'label'",
        ),
    ],
)
def test_a_set_that_has_changed_on_the_hub_is_refused(
    columns: dict[str, Any], rows: dict[str, list[Any]], found: str, hub: Callable[..., list[dict[str, Any]]]
) -> None:
    hub(columns, rows)
    message = rf"fancyzhx/ag_news/train has {found}.* expected .*changed on the hub.*--data-dir FOLDER.*FOLDER/ag_news"
    with pytest.raises(ValueError, match=message):
        data.load_dataset("ag_news")


# Files of repositories without a card that says which file is which part: the library has to find out by itself.
LAYOUTS: dict[str, dict[str, str]] = {
    "weibo": {"weibo_senti_100k.csv": 'label,review\n1,"好, [哈哈]"\n0,差\n'},
    "amazon_full": {
        "train.csv": "class_index,review_title,review_text\n5,好,[哈哈]\n1,,差\n",
        "test.csv": "class_index,review_title,review_text\n5,好,[哈哈]\n1,,差\n",
        "README.md": "---\nlicense: apache-2.0\n---\nReviews.\n",
    },
    "trec": {
        **{
            f"{part}.jsonl": "".join(
                json.dumps({"text": text, "label": 1, "label_coarse_original": label}) + "\n"
                for text, label in (("好, [哈哈]", "NUM"), ("差", "ABBR"))
            )
            for part in ("train", "test")
        },
        "train_5500.label": "NUM:dist How far ?\n",
        "TREC_10.label": "NUM:dist How far ?\n",
        "question_types.txt": "ABBR\n",
        "prepare.py": "raise SystemExit('never run')\n",
        "README.md": "# TREC\n",
    },
}


# Old versions of the library leave CSV files to be closed with the reader.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", [*LAYOUTS, "shopping"])
def test_the_library_finds_the_parts_of_repositories_as_they_lie(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, on a folder with the files that the hub's repository has."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for file, content in LAYOUTS.get(name, {}).items():
        (folder / file).write_text(content, "utf-8")
    if name == "shopping":
        (folder / "data").mkdir()
        rows = {"cat": ["书籍"] * 2, "label": [1, 0], "text": ["好, [哈哈]", "差"]}
        Dataset.from_dict(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        (folder / "online_shopping_10_cats.csv").write_text("cat,label,review\n书籍,1,好\n", "utf-8")
    real = datasets.load_dataset

    def load(path: str, *, revision: str | None, **options: Any) -> Any:
        assert path == HUB[name].hub_id
        return real(str(folder), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = data.load_dataset(name, cache_dir=tmp_path / "cache")
    assert list(found.train.texts) == [{"amazon_full": "好 [哈哈]"}.get(name, "好, [哈哈]"), "差"]
    assert (found.test is not None) == ("test" in HUB[name].splits)


# --- Without the library, the network, the set


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"ag_news .*`datasets`, which is not installed.*pip install 'geep\[hub\]'; or give --data-dir FOLDER "
    with pytest.raises(ImportError, match=message):
        data.load_dataset("ag_news")


def test_without_a_network_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = r"lcqmc could not be had .*Couldn't reach 'C-MTEB/LCQMC'.*check the network; or give --data-dir FOLDER "
    with pytest.raises(data.FetchError, match=message + '.*FOLDER/lcqmc holds.*"text", "text_pair", "label"'):
        data.load_dataset("lcqmc")


def test_where_no_network_may_be_asked_the_real_library_asks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(data.FetchError, match=r"trec could not be had .*OfflineModeIsEnabled.*load it once with a net"):
        data.load_dataset("trec", cache_dir=tmp_path, local_files_only=True)
    assert datasets.config.HF_HUB_OFFLINE is False


def test_what_was_loaded_once_is_there_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, on a cache that has the set under the name that it gives to sets of the hub."""
    (tmp_path / "TREC-QC").mkdir()
    (tmp_path / "TREC-QC" / "train.jsonl").write_text(LAYOUTS["trec"]["train.jsonl"], "utf-8")
    (tmp_path / "TREC-QC" / "test.jsonl").write_text(LAYOUTS["trec"]["test.jsonl"], "utf-8")
    datasets.load_dataset(str(tmp_path / "TREC-QC"), cache_dir=str(tmp_path / "cache"))
    (made,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (config,) = made.iterdir()
    config.rename(made / "default")
    made.rename(made.with_name("SetFit___trec-qc"))
    monkeypatch.setattr(socket, "getaddrinfo", None)
    found = data.load_dataset("trec", cache_dir=tmp_path / "cache", local_files_only=True)
    assert found.label_names == ("ABBR", "NUM")
    assert found.test is not None


@pytest.mark.parametrize("name", FOLDER_ONLY)
def test_a_set_that_is_nowhere_had_without_running_code_is_asked_for_as_a_folder(name: str, tmp_path: Path) -> None:
    published = re.escape(data.DATASETS[name].published)
    with pytest.raises(FileNotFoundError, match=rf"{published}.*--data-dir FOLDER .*FOLDER/{name} holds train"):
        data.load_dataset(name, data_dir=tmp_path)


# --- A folder goes first


def write(path: Path, labels: tuple[object, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"t{number}", "label": label} for number, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.mark.parametrize("name", data.DATASETS)
def test_a_folder_of_that_name_is_read_as_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path / "sets" / name / "train.jsonl", (1, 0))
    write(tmp_path / "here" / name / "train.jsonl", ("a", "b"))
    found = data.load_dataset(name, data_dir=tmp_path / "sets")
    assert (found.name, found.label_names, list(found.train.texts)) == (name, ("0", "1"), ["t0", "t1"])
    monkeypatch.chdir(tmp_path / "here")
    assert data.load_dataset(name).label_names == ("a", "b")
    assert data.load_dataset(name, data_dir=tmp_path / "sets").label_names == ("0", "1")


def test_a_folder_beside_that_holds_no_rows_is_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable[..., list[dict[str, Any]]]
) -> None:
    """`geep train ag_news -o ag_news`, twice: the second time the model lies there."""
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "config.json").write_text("{}", "utf-8")
    monkeypatch.chdir(tmp_path)
    asked = hub(*CASES[0][1:3])
    assert data.load_dataset("ag_news").train.texts == ["a b", "c"]
    assert len(asked) == 2
    with pytest.raises(FileNotFoundError, match="no training file"):
        data.load_dataset("ag_news", data_dir=tmp_path)


# --- The command


def test_the_command_lists_every_set() -> None:
    shown = CliRunner().invoke(app, ["datasets"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in data.DATASETS)
    listed = json.loads(CliRunner().invoke(app, ["datasets", "--json"]).stdout)
    assert [each["name"] for each in listed] == list(data.DATASETS)
    by_name = {each["name"]: each for each in listed}
    assert by_name["lcqmc"]["pairs"]
    assert by_name["thucnews"]["hub_id"] is None
    assert by_name["ag_news"]["labels"] == ["World", "Sports", "Business", "Sci/Tech"]


def test_a_set_that_cannot_be_had_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, said in (("thucnews", "FOLDER/thucnews"), ("sst2", "geep[hub]")):
        result = CliRunner().invoke(app, ["train", name, "-o", "model"])
        assert (result.exit_code, said in " ".join(result.output.split())) == (2, True), result.output
    result = CliRunner().invoke(app, ["train", "sst2", "-o", "model", "--text-column", "body"])
    assert "would change nothing with sst2" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_data_dir_without_the_set_is_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere \(--data-dir, data_dir\) to look for thucnews"):
        data.load_dataset("thucnews", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="It was published"):
        data.load_dataset("thucnews", data_dir=tmp_path)
    assert f"There is no thucnews in {tmp_path}: the published set" in caplog.text
