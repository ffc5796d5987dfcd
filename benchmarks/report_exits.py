"""Sections of docs/results.md about exits: how they are trained, what they read, what each part of the method saves."""

from __future__ import annotations

from pathlib import Path

from tables import Line, read, table


def exits_parts(results: Path) -> list[str]:
    """All sections that there are results for."""
    parts: list[str] = []
    for path in sorted(results.glob("exits-study-*.jsonl")):
        parts += ["## Exits of a model that stays as it is, beside joint training", *_study(read(path))]
    heads, ablation = results / "heads.jsonl", results / "ablation.jsonl"
    if heads.exists():
        parts += ["## What an exit reads", *_heads(read(heads))]
    if ablation.exists():
        parts += ["## What each part of the method saves", *_ablation(read(ablation))]
    return parts


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
