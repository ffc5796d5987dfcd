"""Sections about promises: whether they hold, what decides that an exit is certain, how a speed is looked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tables import Line, Section, figure, percent, plain, points, read, share, span, table

LEFT_OUT = "training rows left out"
DIVIDED = "a third"  # of held-out rows, to choose settings on: what `geep calibrate` does
CRITERIA_AT = "0.01"  # share of answers that differ from the full model's


def promise_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for."""
    if guarantees := read(results / "guarantee.jsonl"):
        yield _guarantee(results, guarantees)
    if drifts := read(results / "drift.jsonl"):
        yield _drift(drifts)
    predictions = read(results / "prediction.jsonl")
    if criteria := [line for line in predictions if line.get("step") == "criteria"]:
        yield _criteria(criteria)
    if searches := read(results / "searches.jsonl"):
        yield _searches(searches)


def _guarantee(results: Path, lines: list[Line]) -> Section:
    allowed = 1 - lines[0]["confidence"]
    kept = sum(line["broken"] <= allowed for line in lines)
    worst = max(lines, key=lambda line: float(line["broken_on_the_rest"]))
    return Section(
        "Do promises hold?",
        (
            f"Texts that nothing was learned on, divided at random {lines[0]['splits']} times: on one part a speed is "
            "certified, settings and order being fixed before; *broken* is the share of divisions whose speed loses "
            "more than was promised among all of these texts, which the certificate speaks of. Bars: the middle nine "
            "tenths of what was lost.",
            *figure(results, "guarantee", "what was promised, and what was lost"),
        ),
        f"{'Yes' if kept == len(lines) else 'Not always'}: {kept} of {len(lines)} promises are broken in at most the "
        f"{100 * allowed:.0f} % of divisions that their confidence allows, the worst in "
        f"{100 * max(line['broken'] for line in lines):.1f} %. Among the texts that did not certify alone, of which "
        f"no certificate speaks, up to {100 * worst['broken_on_the_rest']:.1f} % look broken ({worst['data']}, where "
        f"{worst['num_texts'] - worst['num_certifying']:,} are left).",
        "From `benchmarks/guarantee.py`. All rows: [promises](results/promises.md).",
    )


def _drift(lines: list[Line]) -> Section:
    size = max(window["size"] for line in lines for window in line["windows"] if _has_window(lines, window["size"]))

    def window(line: Line) -> Line:
        return next(each for each in line["windows"] if each["size"] == size)

    rows = [
        [
            line["data"],
            "its test split" if line["source"] == line["data"] else line["source"],
            f"{line['full_accuracy']:.2f} → {line['accuracy']:.2f}",
            f"{line['agreement']:.2f}",
            f"{line['reference_layers']:.2f} → {line['layers']:.2f}",
            f"{line['reference_unknown']:.1f} → {line['unknown']:.1f}",
            f"{window(line)['figure'][1]:.2f} ({window(line)['figure'][0]:.2f} – {window(line)['figure'][2]:.2f})",
            f"{100 * window(line)['noted']:.0f}",
        ]
        for line in lines
    ]
    header = ["certified on", "texts of", "accuracy, full → GEEP, %", "agreement, %", "layers", "unknown tokens, %"]
    tests = [line for line in lines if line["source"] == line["data"]]
    own = [line for line in lines if line["source"] == LEFT_OUT]
    other = [line for line in lines if line not in tests and line not in own]
    lost = [line["full_accuracy"] - line["accuracy"] for line in other]
    at_home = {line["data"]: line["full_accuracy"] for line in tests}
    gaps = [line["full_accuracy"] - at_home[line["data"]] for line in other if line["data"] in at_home]
    has_phrases = any(line["data"] == "sst2" for line in tests)
    phrases = " (that of sst2 are sentences, what certifies are phrases: other texts, too)" if has_phrases else ""
    return Section(
        "Does one see when other texts come?",
        (
            "Rows like those that certified, the test split of the same data set, and that of another with the same "
            "labels: whether the promise held, what is seen without labels (from the certifying texts → these), and "
            f"the drift figure of random windows of {size:,} texts, median (5 – 95 %), with the share of windows that "
            "`geep predict` warns of. "
            f"Promised: {lines[0]['promise']}.",
            table([*header, "drift", "warned of, %"], rows),
        ),
        f"Of other sources {span((100 * window(line)['noted'] for line in other), _whole)} % of windows are warned of, "
        f"of rows like those that certified {span((100 * window(line)['noted'] for line in own), _whole)} %, of test "
        f"splits {span((100 * window(line)['noted'] for line in tests), _whole)} %{phrases}. On other sources the full "
        f"model's own accuracy differs by {span(gaps, points)} points, and GEEP loses {span(lost, plain)} against it, "
        "whatever was promised.",
        "From `benchmarks/drift.py`.",
    )


def _has_window(lines: list[Line], size: int) -> bool:
    return all(any(window["size"] == size for window in line["windows"]) for line in lines)


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _criteria(lines: list[Line]) -> Section:
    found = {(line["data"], line["method"]): line["layers_at_differing"][CRITERIA_AT] for line in lines}
    sets, methods = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    rows = [
        [method, *(plain(found[data, method]) if (data, method) in found else "–" for data in sets)]
        for method in methods
    ]
    best, learned = methods[0], "agreement"
    saved = [1 - found[data, learned] / found[data, best] for data in sets if (data, learned) in found]
    blind = f"{learned}, without the table"
    other = [found[data, blind] / found[data, learned] - 1 for data in sets if (data, blind) in found]
    return Section(
        "What tells best whether an exit is certain enough?",
        (
            f"Layers run where {percent(float(CRITERIA_AT))} % of answers differ from the full model's: each way to "
            "judge an exit fitted on one half of held-out texts, judged on the other, mean of several halvings.",
            table(["criterion", *sets], rows),
        ),
        f"The learned score (`agreement`) runs {span(saved, share)} fewer layers than "
        f"the {best}; without the table among its features it would run "
        f"{span(other, share)} more.",
        "From `benchmarks/prediction.py`. All rows: [prediction](results/prediction.md).",
    )


def _searches(lines: list[Line]) -> Section:
    names = list(next(iter(lines[0]["found"].values())))
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        for promise in line["found"] if line["to_choose_on"] == DIVIDED else ():
            groups.setdefault((line["data"], promise), []).append(line)

    def mean(cells: list[Line], promise: str, name: str, value: str) -> float:
        return fmean(cell["found"][promise][name][value] for cell in cells)

    rows = [
        [
            data,
            promise,
            f"{cells[0]['certified_on']:,}",
            *(
                f"{mean(cells, promise, name, 'layers'):.2f} ({points(mean(cells, promise, name, 'points'))})"
                for name in names
            ),
        ]
        for (data, promise), cells in sorted(groups.items())
    ]
    before, now = names[0], names[-1]
    better = sum(
        mean(cells, promise, now, "layers") < mean(cells, promise, before, "layers")
        for (_, promise), cells in groups.items()
    )
    full = lines[0]["full_layers"]
    nothing = {
        name: sum(
            cell["found"][promise][name]["layers"] >= full for (_, promise), cells in groups.items() for cell in cells
        )
        for name in (before, now)
    }
    count = sum(len(cells) for cells in groups.values())
    return Section(
        "How is a speed looked for?",
        (
            f"The same held-out rows, divided several times, {DIVIDED} of them to choose settings on: mean layers on "
            f"the test split, of {full}, and accuracy against the full model in points; where nothing is certified "
            "all layers count. Test texts of sst2 are sentences, held-out ones phrases.",
            table(["data set", "promise", "certified on", *names], rows),
        ),
        f'"{now}" runs fewer layers than "{before}" in {better} of {len(groups)} rows and certifies nothing in '
        f"{nothing[now]} of {count} divisions, against {nothing[before]}. The last is what `geep calibrate` does.",
        "From `benchmarks/searches.py`. All divisions, and by halves: [searches](results/searches.md).",
    )
