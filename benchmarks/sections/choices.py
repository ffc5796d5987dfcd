"""Sections about choices inside the method, and about doing without an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, geometric_mean

from tables import HALF_A_POINT, Line, Section, points, read, span, table, times

# What the other choices are held against, and what was published.
DEFAULT = "as geep train does"
PUBLISHED = "counts, entropy, stop, no exit 0"
SYSTEMS = {"lexical": "TF-IDF, logistic regression", "embeddings": "static embeddings, model2vec"}


def choice_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for."""
    if choices := read(results / "choices.jsonl"):
        yield _choices(choices)


def cheap_sections(results: Path) -> Iterator[Section]:
    """The same, of classifiers without an encoder."""
    if cheap := read(results / "cheap.jsonl"):
        yield _cheap(cheap, read(results / "certified.jsonl"))


def _choices(lines: list[Line]) -> Section:
    found = {(line["data"], line["choice"]): line for line in lines}
    sets, choices = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    # What was measured later stands beside what it is about.
    abouts = list(dict.fromkeys(line["about"] for line in lines))
    about = {line["choice"]: line["about"] for line in lines}
    choices = sorted(choices, key=lambda choice: abouts.index(about[choice]))
    full = lines[0]["full_layers"]
    # Of the others exits are others, too, and with them the layers that are to be ranked.
    ranked = {line["choice"] for line in lines if line["about"] in ("", "keys", "table")}

    def layers(data: str, choice: str, promise: str = HALF_A_POINT) -> float:
        return float(found[data, choice]["promises"][promise].get("layers", full))

    def cell(data: str, choice: str) -> list[str]:
        if (data, choice) not in found:
            return ["–"] * 3
        kept = found[data, choice]["promises"]
        at = kept[HALF_A_POINT]
        drop = "nothing certified" if "refused" in at else points(at["accuracy"] - at["full_accuracy"])
        return [
            f"{layers(data, choice):.2f} ({drop})",
            f"{layers(data, choice, '99 % agreement'):.2f}",
            f"{found[data, choice]['rank_correlation']:.2f}" if choice in ranked else "–",
        ]

    rows = [
        [
            about[choice] or "–",
            choice,
            *(value for data in sets for value in cell(data, choice)),
        ]
        for choice in choices
    ]
    header = ["choice of", "made so"]
    for data in sets:
        header += [f"{data}: layers (accuracy against full)", "at 99 % agreement", "rank correlation"]
    others = {
        choice: geometric_mean(
            [layers(data, choice) / max(layers(data, DEFAULT), 0.01) for data in sets if (data, choice) in found]
        )
        for choice in choices
        if choice != DEFAULT
    }
    worst = sorted(others, key=lambda choice: -others[choice])[:3]
    none = [choice for choice, ratio in others.items() if ratio < 1]
    better = f" Fewer: {', '.join(f'*{choice}* ({times(others[choice])})' for choice in none)}." if none else ""
    return Section(
        "What is each choice worth?",
        (
            "One choice at a time is made otherwise than by `geep train`, all else learned, chosen and certified as "
            f"ever: mean layers of {full} on the test split for {HALF_A_POINT} and for 99 % agreement, accuracy "
            "against the full model in points, and, where the exits are the same, how well the table ranks texts by "
            "their exit layer.",
            table(header, rows),
        ),
        f"Over {len(sets)} data sets the layers grow most by "
        f"{', '.join(f'*{each}* ({times(others[each])})' for each in worst)}.{better} The algorithm as published is "
        f"*{PUBLISHED}*.",
        "From `benchmarks/choices.py`. All promises: [parts of the method](results/parts.md).",
    )


def _cheap(lines: list[Line], certified: list[Line]) -> Section:
    found = {(line["data"], line["system"]): line for line in lines}
    trained: dict[str, list[Line]] = {}
    for line in certified:
        if line["recipe"] == "fitted":
            trained.setdefault(line["data"], []).append(line)
    sets = list(dict.fromkeys(line["data"] for line in lines))

    def known(data: str, value: str) -> float | None:
        cells = [line[value][-1] if value == "accuracy" else line[value] for line in trained.get(data, [])]
        return fmean(cells) if cells else None

    def said(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = [
        [
            data,
            *(said(found[data, each]["accuracy"] if (data, each) in found else None) for each in SYSTEMS),
            said(known(data, "table_accuracy")),
            said(known(data, "accuracy")),
        ]
        for data in sets
    ]
    gaps = {
        each: [
            full - found[data, each]["accuracy"]
            for data in sets
            if (data, each) in found and (full := known(data, "accuracy")) is not None
        ]
        for each in SYSTEMS
    }
    told = ", ".join(f"{SYSTEMS[each]} {span(gaps[each])}" for each in SYSTEMS if gaps[each])
    return Section(
        "How far does one come without an encoder?",
        (
            "Accuracy on the whole test split, %, after learning from all rows with labels. The table is geep's own, "
            "taught by the full model; the full model is plainly fine-tuned, mean over seeds.",
            table(["data set", *SYSTEMS.values(), "geep's table alone", "full model"], rows),
        ),
        f"Points behind the full model: {told or '–'}.",
        "From `benchmarks/cheap.py` and `benchmarks/certified.py`.",
    )
