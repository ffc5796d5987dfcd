"""Sections about exits: how they are trained, what they read, what predicting them brings, what each part saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tables import Line, Section, figure, of_kind, percent, plain, points, read, span, table

# What all parts of the method are held against.
ALONE, PREDICTED, ALL = "exits alone", "exit prediction alone", "all"
# The ways of a study that say what prediction brings, by group.
WAYS = {
    "full": "full model",
    "fastbert": "FastBERT: every exit asked, the batch shrinks",
    "random": "random depths, as many at each as predicted",
    "geep-stop": "sort by the table, stop there (the paper's way)",
    "geep-continue": "sort by the table, go on after a miss",
    "oracle": "oracle: the first exit from which the answer stays",
}


def exit_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for."""
    if ablation := read(results / "ablation.jsonl"):
        yield _ablation(ablation)
    studies = {path.stem.removeprefix("study-"): read(path) for path in sorted(results.glob("study-*.jsonl"))}
    if studies:
        yield _prediction(results, studies)
    if certified := [line for line in read(results / "certified.jsonl") if line.get("promises")]:
        yield _certified(certified)
    if heads := read(results / "heads.jsonl"):
        yield _heads(heads)


def _ablation(lines: list[Line]) -> Section:
    cells = {(line["data"], line["promise"], line["part"]): line for line in lines}
    rows = [
        [
            line["data"],
            line["part"],
            f"{line['layers']:.2f}",
            f"{line['accuracy'] - line['full_accuracy']:+.2f}",
            f"{line['agreement']:.2f}",
            f"{line['by_table']:.0f}",
            f"{line['exits_asked']:.2f}",
            f"{line['waits']:,}",
        ]
        for line in lines
        if line["promise"] == lines[0]["promise"]
    ]
    header = [
        "data set",
        "part",
        "layers",
        "accuracy against full",
        "agrees, %",
        "by the table, %",
        "exits asked",
        "waits",
    ]

    def change(part: str, value: str) -> str:
        pairs = [
            (float(line[value]), float(cells[data, promise, part][value]))
            for (data, promise, other), line in cells.items()
            if other == ALONE and (data, promise, part) in cells
        ]
        return span((100 * (after / before - 1) for before, after in pairs), lambda share: f"{share:+.0f} %")

    return Section(
        "What does each part of the method save?",
        (
            f"The promise {lines[0]['promise']}, certified on held-out rows with the other parts switched off, on the "
            "whole test split. Exits asked are what a CPU pays for knowing, waits what a GPU pays: batches after "
            "which it has to be known who goes on.",
            table(header, rows),
        ),
        f"Over all promises measured, against {ALONE}: {PREDICTED} changes the exits asked by "
        f"{change(PREDICTED, 'exits_asked')}, the waits by {change(PREDICTED, 'waits')} and the layers by "
        f"{change(PREDICTED, 'layers')}; everything together changes the exits asked by {change(ALL, 'exits_asked')} "
        f"and the layers by {change(ALL, 'layers')}.",
        "From `benchmarks/ablation.py`. All promises: [parts of the method](results/parts.md).",
    )


def _prediction(results: Path, studies: dict[str, list[Line]]) -> Section:
    tables = {data: of_kind(lines, "profile")[0]["predictor"] for data, lines in studies.items()}

    def run(data: str, group: str) -> Line | None:
        found = of_kind(studies[data], "run", group=group)
        # A sweep of speeds follows; the first of a group is at the calibrated one.
        return found[0] if found else None

    def cell(data: str, group: str) -> str:
        found = run(data, group)
        if found is None:
            return "–"
        quality = f"{percent(found['accuracy'])} / {percent(found['agreement'])}"
        return f"{quality} / {found['mean_exit_layer']:.2f} / {found['throughput']:,.0f}"

    rows = [[name, *(cell(data, group) for data in studies)] for group, name in WAYS.items()]

    def gaps(data: str, group: str, other: str) -> float | None:
        one, two = run(data, group), run(data, other)
        return None if one is None or two is None else 100 * (one["accuracy"] - two["accuracy"])

    papers = [data for data, kind in tables.items() if kind == "counts"]
    ranks: dict[str, list[float]] = {}
    for lines in studies.values():
        for row in of_kind(lines, "profile")[0]["quality"]:
            if row["speed"] <= 0.1:  # beyond, hardly a text runs to where ranks could tell
                ranks.setdefault(row["kind"], []).append(row["rank_correlation"])
    quantiles = [line["quantile"] for line in read(results / "accuracy.jsonl") if line.get("certified")]
    drawn = read(results / "staircase.jsonl")
    early = min(quantiles, default=0.0)
    chosen = (
        f" Calibrated for fewest layers, {quantiles.count(early)} of the {len(quantiles)} engines of the first table "
        f"ask as early as {100 * early:g} % of texts of such a score are ready"
        if quantiles
        else ""
    )
    if chosen and drawn:
        chosen += f"; the one that is drawn, calibrated by time, where {100 * drawn[0]['quantile']:g} % are"
    return Section(
        "What does predicting exit layers bring?",
        (
            "Accuracy and agreement on the whole test split in %, mean layers, texts a second, in float32, at the "
            "certified speed; in brackets the table: `counts` is the paper's, `fitted` a regression. From before the "
            "learned criterion and the kernels: compare within a column.",
            table(["", *(f"{data} ({kind})" for data, kind in tables.items())], rows),
            *figure(results, "staircase", "a window of texts as it ran: predicted layers, layers run, layers saved"),
        ),
        f"The paper's own algorithm, counts and stop ({', '.join(papers)}), changes accuracy by "
        f"{span((gaps(data, 'geep-stop', 'full') for data in papers), points)} points against the full model; going "
        f"on after a miss instead by {span((gaps(data, 'geep-continue', 'full') for data in studies), points)}. "
        "Against random depths the table's order is worth "
        f"{span((gaps(data, 'geep-stop', 'random') for data in studies), points)} points at equal layers; its rank "
        "correlation with the true exit layer is "
        f"{' and '.join(f'{span(values, plain)} ({kind})' for kind, values in sorted(ranks.items()))}."
        + (f"{chosen}." if chosen else ""),
        "From `benchmarks/study.py`. All ways and speeds: [studies](results/studies.md); quantiles and costs: "
        "[prediction](results/prediction.md).",
    )


def _certified(lines: list[Line]) -> Section:
    plainly = {(line["data"], line["seed"]): line["accuracy"][-1] for line in lines if line["recipe"] == "fitted"}
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["data"], line["recipe"]), []).append(line)
    order = list(dict.fromkeys(line["recipe"] for line in sorted(lines, key=lambda line: line["recipe"] != "fitted")))
    names = list(lines[0]["promises"])
    rows = []
    for (data, recipe), cells in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        drops = [
            cell["accuracy"][-1] - plainly[data, cell["seed"]] for cell in cells if (data, cell["seed"]) in plainly
        ]
        third = cells[0]["depths"].index(3) if 3 in cells[0]["depths"] else None
        rows.append(
            [
                data,
                recipe,
                f"{len(cells)}",
                _over([cell["accuracy"][-1] for cell in cells]),
                f"{fmean(drops):+.1f}" if drops and recipe != "fitted" else "–",
                "–" if third is None else f"{fmean(cell['accuracy'][third] for cell in cells):.1f}",
                _over([_layers_at(cell, plainly.get((data, cell["seed"])), 0.5) for cell in cells]),
                *(f"{_layers(cells, name):.2f} ({_test(cells, name)})" for name in names),
            ]
        )
    header = ["data set", "recipe", "seeds", "full model", "against plain", "exit 3", "layers at 0.5 below plain"]
    header += [f"{name}: layers ({'agrees' if 'agreement' in name else 'against its full model'})" for name in names]
    told = []
    for other in order[1:]:
        # Of the same seeds, so that luck of a training is not taken for a recipe's worth.
        pairs = [
            ([cell for cell in groups[data, "fitted"] if cell["seed"] in seeds], theirs)
            for (data, recipe), theirs in groups.items()
            if recipe == other and (seeds := {cell["seed"] for cell in theirs})
        ]
        better = sum(_accuracy(ours) > _accuracy(theirs) for ours, theirs in pairs)
        nearer = sum(_fewest(ours, plainly) < _fewest(theirs, plainly) for ours, theirs in pairs)
        won = [sum(_layers(ours, name) < _layers(theirs, name) for ours, theirs in pairs) for name in names]
        told.append(
            f"Against `{other}` its full model is the better in {better} of {len(pairs)} sets, half a point below "
            f"plain fine-tuning it runs fewer layers in {nearer}, and against each one's own full model it certifies "
            f"fewer in {', '.join(map(str, won))} ({', '.join(names)})."
        )
    mine = [line for line in lines if line["recipe"] == "fitted"]
    none = [line["data"] for line in mine if _layers([line], names[0]) >= line["layers"]]
    if none:
        where = ", ".join(dict.fromkeys(none))
        told.append(f"In {len(none)} of {len(mine)} trainings it certifies nothing for {names[0]} ({where}).")
    return Section(
        "Which training gives the exits that certify most?",
        (
            f"{lines[0]['layers']} layers of {lines[0]['encoder']}, the same rows for every recipe; test accuracy, "
            "mean over seeds (least – most). `fitted`, the default, leaves the full model that of plain fine-tuning. "
            "Each promise is certified on held-out rows and looked at on the test rows; where nothing is certified "
            "all layers count. *Layers at 0.5 below plain*: at any speed, read off the test rows, not certified; a "
            "dash: at none.",
            table(header, rows),
        ),
        f"`fitted`, the default: {' '.join(told)}",
        f"From `benchmarks/certified.py` ({', '.join(sorted({line['device'] for line in lines}))}). All rows, older "
        "trials and heads: [training](results/training.md).",
    )


def _accuracy(cells: list[Line]) -> float:
    return fmean(cell["accuracy"][-1] for cell in cells)


def _fewest(cells: list[Line], plainly: dict[tuple[str, int], float]) -> float:
    """Mean of the fewest layers half a point below plain fine-tuning; infinite where one does not come so near."""
    found = [_layers_at(cell, plainly.get((cell["data"], cell["seed"])), 0.5) for cell in cells]
    return fmean(math.inf if layers is None else layers for layers in found)


def _layers(cells: list[Line], promise: str) -> float:
    return fmean(cell["promises"][promise].get("layers", cell["layers"]) for cell in cells)


def _test(cells: list[Line], promise: str) -> str:
    """On the test rows: agreement, for a promise about it, else points against the cell's own full model."""
    found = [cell["promises"][promise] for cell in cells]
    if "agreement" in promise:
        return f"{fmean(each.get('agreement', 100) for each in found):.1f} %"
    return f"{fmean(each.get('accuracy', 0.0) - each.get('full_accuracy', 0.0) for each in found):+.1f}"


def _over(values: list[float | None]) -> str:
    """Mean of values, and least to most where there are several; a dash where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{fmean(known):.1f}" if len(known) == 1 else f"{fmean(known):.1f} ({min(known):.1f} – {max(known):.1f})"


def _layers_at(cell: Line, plainly: float | None, below: float) -> float | None:
    """Fewest layers with which a cell is so near to plain fine-tuning's accuracy."""
    if plainly is None:
        return None
    curves = [promise["curve"] for promise in cell["promises"].values() if "curve" in promise]
    near = [layers for curve in curves for layers, accuracy, _ in curve if accuracy >= plainly - below]
    return min(near, default=None)


def _heads(lines: list[Line]) -> Section:
    shown = (1, 3, 6)
    most: dict[tuple[str, str, str], Line] = {}
    for line in sorted(lines, key=lambda line: (line["data"], line["classifier"], line["head"], line["texts"])):
        most[line["data"], line["classifier"], line["head"]] = line
    rows = [
        [
            *(data, classifier, head, f"{line['texts']:,}"),
            *(f"{100 * line['agreement'][line['depths'].index(depth)]:.1f}" for depth in shown),
            f"{line['at_99']['layers']:.2f}",
            f"{100 * line['at_99']['agreement']:.1f}",
        ]
        for (data, classifier, head), line in most.items()
    ]
    header = ["data set", "classifier", "head", "fitted on texts", *(f"exit {depth}" for depth in shown)]
    pairs = [
        line["at_99"]["layers"] / most[data, classifier, "conv"]["at_99"]["layers"]
        for (data, classifier, head), line in most.items()
        if head != "conv" and (data, classifier, "conv") in most
    ]
    return Section(
        "What should an exit read?",
        (
            "Agreement with the full model, %, on held-out rows, of heads fitted to its answers. Layers at 99 %: one "
            "threshold on one confidence, chosen on half of these rows, applied to the other; no table, not "
            "certified.",
            table([*header, "layers at 99 %", "there agree, %"], rows),
        ),
        "All tokens, by a small convolution (`conv`): the other heads run "
        f"{span(pairs, lambda value: f'{value:.2f}')} times as many layers at 99 %.",
        "From `benchmarks/heads.py`. Fewer texts: [training](results/training.md).",
    )
