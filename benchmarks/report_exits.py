"""Sections of docs/results.md about exits: how they are trained, what they read, what each part of the method saves."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from tables import Line, read, table


def exits_parts(results: Path) -> list[str]:
    """All sections that there are results for."""
    parts: list[str] = []
    for path in sorted(results.glob("exits-study-*.jsonl")):
        parts += ["## Exits of a model that stays as it is, beside joint training", *_study(read(path))]
    certified = results / "certified.jsonl"
    if certified.exists():
        parts += ["## What each recipe's exits certify", *_certified(read(certified))]
    searches = results / "searches.jsonl"
    if searches.exists():
        parts += ["## How a speed is looked for", *_searches(read(searches))]
    guarantee = results / "guarantee.jsonl"
    if guarantee.exists():
        parts += ["## Whether promises hold", *_guarantee(read(guarantee))]
    heads, ablation = results / "heads.jsonl", results / "ablation.jsonl"
    if heads.exists():
        parts += ["## What an exit reads", *_heads(read(heads))]
    if ablation.exists():
        parts += ["## What each part of the method saves", *_ablation(read(ablation))]
    return parts


def _guarantee(lines: list[Line]) -> list[str]:
    """A row for each set and promise: how often it was broken, and what was lost."""
    rows = [
        [
            line["data"],
            line["promise"],
            f"{line['num_certifying']:,} of {line['num_texts']:,}",
            f"{line['certified']} of {line['splits']}",
            f"{100 * line['broken']:.1f}",
            f"{100 * line['broken_on_the_rest']:.1f}",
            *([f"{value:.2f}" for value in line["lost"]] if line["lost"] else ["–"] * 3),
            "–" if line["layers"] is None else f"{line['layers']:.2f}",
        ]
        for line in sorted(lines, key=lambda line: line["data"])
    ]
    first = lines[0]
    header = ["data set", "promise", "texts that certify", "certified", "broken, %", "broken on the rest, %"]
    header += ["lost, points: lowest 5 %", "median", "highest 5 %", "layers"]
    return [
        f"Printed by `benchmarks/guarantee.py`: texts that nothing was learned on, divided at random {first['splits']} "
        "times. On one part a speed is certified, settings and order being fixed before; *broken* is the share of "
        "divisions whose speed loses more than was promised among all of these texts, which the certificate speaks of; "
        f"it may be {100 * (1 - first['confidence']):.0f} %. *On the rest*: among the texts that did not certify, "
        "where the luck of a small sample comes on top.",
        table(header, rows),
    ]


def _study(lines: list[Line]) -> list[str]:
    """A row for each set and recipe: the full model, exits as trained, fitted afterwards, and fused with a table."""
    rows = [
        [
            line["set"],
            line["recipe"],
            f"{line['full_test']:.1f}",
            *(
                "–" if kind == "exits_trained" and line["recipe"] == "vanilla" else f"{line[kind][place]:.1f}"
                for depth in (1, 3, 6)
                for kind, place in (
                    ("exits_trained", depth - 1),
                    ("exits_refit", depth - 1),
                    ("acc refit+table", depth),
                )
            ),
            f"{line['acc refit+table'][-1]:.1f}",
        ]
        for line in sorted(lines, key=lambda line: (line["set"], line["recipe"] != "vanilla", line["recipe"]))
    ]
    header = ["data set", "recipe", "full model"]
    header += [f"exit {depth}: {kind}" for depth in (1, 3, 6) for kind in ("trained", "fitted", "fused")]
    first = lines[0]
    return [
        "Test accuracy. A trial from before the heads of convolutions: 12 layers of 384, "
        f'{first["epochs"]} epochs, one seed, on a {first["device"]}; "fitted": heads (mean and maximum of the tokens) '
        'fitted on cached features to the full model\'s own answers, "fused": with a table of hashed n-grams that the '
        "full model has taught. `vanilla` is plain fine-tuning, `geep` the shared exit loss with labels at the exits, "
        "`tune` one more epoch of `vanilla` towards its own answers.",
        table([*header, "all layers, fused"], rows),
    ]


def _certified(lines: list[Line]) -> list[str]:
    """A row for each set and recipe, means over seeds: accuracy, certified layers, layers at equal accuracy."""
    plain = {(line["data"], line["seed"]): line["accuracy"][-1] for line in lines if line["recipe"] == "fitted"}
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["data"], line["recipe"]), []).append(line)
    order = list(dict.fromkeys(line["recipe"] for line in sorted(lines, key=lambda line: line["recipe"] != "fitted")))
    accuracies, promises = [], []
    for (data, recipe), cells in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        drops = [cell["accuracy"][-1] - plain[data, cell["seed"]] for cell in cells if (data, cell["seed"]) in plain]
        exits = [cells[0]["depths"].index(depth) if depth in cells[0]["depths"] else None for depth in (1, 3, 6)]
        accuracies.append(
            [
                data,
                recipe,
                f"{len(cells)}",
                f"{cells[0]['rows']:,}",
                _over([cell["accuracy"][-1] for cell in cells]),
                f"{fmean(drops):+.1f}" if drops and recipe != "fitted" else "–",
                *(
                    "–" if place is None else f"{fmean(cell['accuracy'][place] for cell in cells):.1f}"
                    for place in exits
                ),
                f"{fmean(cell['table_accuracy'] for cell in cells):.1f}",
                *(
                    _over([_layers_at(cell, plain.get((data, cell["seed"])), points) for cell in cells])
                    for points in (0.5, 1.0)
                ),
            ]
        )
        promises.append(
            [
                data,
                recipe,
                f"{fmean(cell['promises']['99 % agreement'].get('certified_on', 0) for cell in cells):,.0f}",
                *(
                    text
                    for name in cells[0]["promises"]
                    for text in (
                        _over([cell["promises"][name].get("layers", cell["layers"]) for cell in cells], digits=2),
                        f"{fmean(_gap(cell['promises'][name]) for cell in cells):+.1f}"
                        if "agreement" not in name
                        else f"{fmean(cell['promises'][name].get('agreement', 100) for cell in cells):.1f}",
                    )
                ),
            ]
        )
    searches = "; ".join(sorted({line["search"] for line in lines}))
    devices = ", ".join(sorted({line["device"] for line in lines}))
    header = ["data set", "recipe", "seeds", "rows", "full model", "against plain"]
    header += ["exit 1", "exit 3", "exit 6", "table", "layers at 0.5 below", "at 1 below"]
    named = [
        text
        for name in lines[0]["promises"]
        for text in (f"{name}: layers", "test agrees" if "agreement" in name else "against its full model")
    ]
    return [
        f"Printed by `benchmarks/certified.py` ({devices}): {lines[0]['layers']} layers of {lines[0]['encoder']}, all "
        "rows that are not held out, the same for every recipe; test accuracy, mean (least – most) over seeds. "
        '`fitted` leaves the full model that of plain fine-tuning; "against plain": full models of '
        "the same seed. Layers at 0.5 and 1 point below: the fewest with which a test accuracy of so much below plain "
        "fine-tuning's is reached, at any speed of the settings that were chosen for a promise, read off the test rows "
        "and so not certified; a dash: at none.",
        table(header, accuracies),
        "The same models, each promise certified on held-out rows, looked at on the test rows. Where nothing could be "
        f"certified, all layers are counted. Searches for the speed: {searches} (see below).",
        table(["data set", "recipe", "certified on", *named], promises),
    ]


def _over(values: list[float | None], digits: int = 1) -> str:
    """Mean of values, and least to most where there are several; a dash where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    mean = f"{fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f} – {max(known):.{digits}f})"


def _layers_at(cell: Line, plain: float | None, points: float) -> float | None:
    """Fewest layers with which a cell is so near to plain fine-tuning's accuracy."""
    if plain is None:
        return None
    curves = [promise["curve"] for promise in cell["promises"].values() if "curve" in promise]
    near = [layers for curve in curves for layers, accuracy, _ in curve if accuracy >= plain - points]
    return min(near, default=None)


def _gap(promise: Line) -> float:
    """Test accuracy against the cell's own full model, in points."""
    return float(promise.get("accuracy", 0.0) - promise.get("full_accuracy", 0.0))


def _searches(lines: list[Line]) -> list[str]:
    """A row for each set, promise and share to choose on: layers of every search, means over divisions."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        for promise in line["found"]:
            groups.setdefault((line["data"], promise, line["to_choose_on"]), []).append(line)
    names = list(next(iter(lines[0]["found"].values())))
    rows = [
        [
            data,
            promise,
            share,
            f"{cells[0]['certified_on']:,}",
            f"{len(cells)}",
            *(_over([cell["found"][promise][name]["layers"] for cell in cells], digits=2) for name in names),
            *(f"{fmean(cell['found'][promise][name]['points'] for cell in cells):+.2f}" for name in names),
        ]
        for (data, promise, share), cells in sorted(groups.items())
    ]
    header = ["data set", "promise", "to choose on", "certified on", "divisions"]
    header += [*(f"{name}: layers" for name in names), *(f"{name}: points" for name in names)]
    return [
        "Printed by `benchmarks/searches.py`: the same held-out rows, divided several times. Layers (least – most), "
        f"of {lines[0]['full_layers']}, and accuracy against the full model are those on the test split; where nothing "
        "is certified all layers count. Test texts of sst2 are sentences, held-out ones phrases.",
        table(header, rows),
    ]


def _heads(lines: list[Line]) -> list[str]:
    """A row for each head and number of texts: agreement with the full model at every depth."""
    depths = max((line["depths"] for line in lines), key=len)
    rows = [
        [
            line["data"],
            line["classifier"],
            line["head"],
            f"{line['texts']:,}",
            *(
                f"{100 * line['agreement'][line['depths'].index(depth)]:.1f}" if depth in line["depths"] else "–"
                for depth in depths
            ),
            f"{line['at_99']['layers']:.2f}",
            f"{100 * line['at_99']['agreement']:.1f}",
        ]
        for line in sorted(lines, key=lambda line: (line["data"], line["classifier"], line["head"], line["texts"]))
    ]
    header = [
        "data set",
        "classifier",
        "head",
        "texts",
        *(f"exit {depth}" for depth in depths),
        "layers at 99 %",
        "there agree",
    ]
    return [
        "Printed by `benchmarks/heads.py`: agreement with the full model, %, on held-out rows (of the development "
        "split, or of the training rows where there is none), by the number of texts that exits were fitted on. Layers "
        "at 99 %: one threshold on one confidence, chosen on half of these rows, applied to the other; no table, not "
        "certified.",
        table(header, rows),
    ]


def _ablation(lines: list[Line]) -> list[str]:
    """A row for each promise and part."""
    rows = [
        [
            line["data"],
            line["promise"],
            line["part"],
            f"{line['layers']:.2f}",
            f"{line['accuracy']:.2f}",
            f"{line['accuracy'] - line['full_accuracy']:+.2f}",
            f"{line['agreement']:.2f}",
            f"{line['by_table']:.0f}",
            f"{line['exits_asked']:.2f}",
            f"{line['waits']:,}",
            f"{line['rank_correlation']:.2f}",
        ]
        for line in lines
    ]
    header = ["data set", "promise", "part", "layers", "accuracy", "against full", "agrees", "by the table, %"]
    return [
        "Printed by `benchmarks/ablation.py`: speeds certified on held-out rows, everything else of the whole test "
        "split. Exits asked are what a CPU pays for knowing, waits what a GPU pays: batches after which it has to be "
        "known who goes on. Rank correlation: of predicted with true exit layers.",
        table([*header, "exits asked", "waits", "rank correlation"], rows),
    ]
