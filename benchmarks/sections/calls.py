"""Sections about calls of few texts, taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tables import Line, Section, describe, kept_share, of_kind, read, share, span, table, times

STEPS = {
    "tokenise": "tokenizer",
    "table": "table",
    "embed": "embeddings",
    "layers": "layers",
    "exits": "exits",
    "select": "picking who goes on",
    "rest": "rest",
}


def small_call_sections(results: Path) -> Iterator[Section]:
    """What calls of few texts take, and where their time goes."""
    if lines := of_kind(read(results / "calls.jsonl"), "call"):
        yield _taken(lines)
        yield _apart(lines)


def _taken(lines: list[Line]) -> Section:
    sizes = sorted({line["texts_per_call"] for line in lines})
    at = {(line["data"], line["dtype"], line["texts_per_call"]): line for line in lines}
    rows = []
    for data, dtype in sorted({(data, dtype) for data, dtype, _ in at}):
        found = [at.get((data, dtype, size)) for size in sizes]
        cells = [
            "–"
            if line is None
            else f"{line['ms']['certified']:.2f} of {line['ms']['full']:.2f}, "
            f"{times(line['ms']['pipeline'] / line['ms']['certified'])}, {kept_share(line)}"
            for line in found
        ]
        rows.append([data, dtype, f"{next(line for line in found if line)['mean_layers']:.2f}", *cells])
    kept = [
        f"{span((line['kept'] for line in lines if line['texts_per_call'] == size), share)} at {size}" for size in sizes
    ]
    over = span(
        (line["ms"]["pipeline"] / line["ms"]["certified"] for line in lines if line["texts_per_call"] == sizes[0]),
        times,
    )
    slower = sum(line["ms"]["certified"] > line["ms"]["full"] for line in lines)
    return Section(
        "How fast is one text, or a call of few?",
        (
            "Milliseconds of a call as certified, of those at full depth in the same dtype; how many times faster than "
            "Hugging Face's pipeline on the same full model in float32, padded; and the share of the layers saved that "
            f"became time. Machine: {describe({**lines[0]['machine'], 'dtype': 'dtypes as named'})}.",
            table(["data set", "dtype", f"mean layer, {sizes[0]} a call", *(f"{size} a call" for size in sizes)], rows),
        ),
        f"Of the layers saved {', '.join(kept)} texts a call becomes time: the deepest text of a call decides how "
        f"many layers run, and on few tokens a layer takes more for each of them. A call of {sizes[0]} is {over} "
        f"as fast as the pipeline's. Slower than full depth are {slower} of {len(lines)}.",
        "From `benchmarks/calls.py`. All columns: [small calls](results/calls.md).",
    )


def _apart(lines: list[Line]) -> Section:
    rows = [
        [
            line["data"],
            line["dtype"],
            str(line["texts_per_call"]),
            f"{line['tokens_per_call']:.0f}",
            f"{line['deepest']:.2f}",
            *(f"{1000 * line['steps_ms'].get(step, 0.0):,.0f}" for step in STEPS),
        ]
        for line in lines
    ]

    def share_of(size: int, *steps: str) -> str:
        of_size = [line["steps_ms"] for line in lines if line["texts_per_call"] == size]
        return span((sum(each.get(step, 0.0) for step in steps) / each["whole"] for each in of_size), share)

    sizes = sorted({line["texts_per_call"] for line in lines})
    told = [
        f"in calls of {size} layers take {share_of(size, 'layers')} of the time, exits {share_of(size, 'exits')}, the "
        f"table {share_of(size, 'table')}, the tokenizer {share_of(size, 'tokenise')} and what is none of these "
        f"{share_of(size, 'embed', 'select', 'rest')}"
        for size in (sizes[0], sizes[-1])
    ]
    answer = "; ".join(told)
    return Section(
        "Where does the time of a small call go?",
        (
            "Microseconds of the steps of a call, each timed by itself; the deepest layer of a call is what any of its "
            "texts runs.",
            table(["data set", "dtype", "texts", "tokens", "deepest layer", *STEPS.values()], rows),
        ),
        f"{answer[0].upper()}{answer[1:]}.",
        "From `benchmarks/calls.py`.",
    )
