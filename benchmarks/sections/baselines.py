"""Sections about what others published: FastBERT's and GEEP's own rules, the shared exit, models of fewer layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tables import HALF_A_POINT, Line, Section, points, read, span, table, times

PUBLISHED = Path(__file__).resolve().parent.parent / "published.jsonl"
# A rule, and the recipe whose exits it was published with.
RULES = {"FastBERT": "fastbert", "GEEP": "geep-paper"}


def baseline_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for."""
    lines = read(results / "certified.jsonl")
    if any(line.get("published") for line in lines):
        yield _published([line for line in lines if line.get("published")], read(PUBLISHED))
    shared = [line for line in lines if line.get("shared_accuracy")]
    if any(_behind_another(line["depths"]) for line in shared):
        yield _shared(shared)
    if shallow := [line for line in lines if not line.get("promises")]:
        yield _shallow(shallow, [line for line in lines if line["recipe"] == "fitted"])


def _published(lines: list[Line], cited: list[Line]) -> Section:
    about, numbers = cited[0], {line["data"]: line for line in cited[1:]}
    rows, lost = [], {rule: [] for rule in RULES}
    for data in dict.fromkeys(line["data"] for line in lines):
        paper = numbers.get(data)
        said = (
            [
                f"{accuracy - paper['full']:+.2f}, {speedup:.2f}x"
                for accuracy, speedup in zip(paper["accuracy"], paper["speedup"], strict=True)
            ]
            if paper
            else ["–"] * len(about["speeds"])
        )
        rows.append([data, about["encoder"], "FastBERT, as published", *said])
        for rule, recipe in RULES.items():
            cells = [line for line in lines if (line["data"], line["recipe"]) == (data, recipe)]
            if not cells:
                continue
            at = [[cell["published"][rule][place] for cell in cells] for place in range(len(about["speeds"]))]
            drops = [fmean(each["accuracy"] - each["full_accuracy"] for each in found) for found in at]
            layers = [fmean(each["layers"] for each in found) for found in at]
            lost[rule] += drops
            rows.append(
                [
                    data,
                    cells[0]["encoder"],
                    f"{rule}'s rule, recipe `{recipe}`",
                    *(
                        f"{drop:+.2f}, {times(cells[0]['layers'] / ran)}"
                        for drop, ran in zip(drops, layers, strict=True)
                    ),
                ]
            )
        ours = [line for line in lines if (line["data"], line["recipe"]) == (data, "fitted")]
        if kept := _kept(ours):
            drop = fmean(each["accuracy"] - each["full_accuracy"] for each in kept)
            speedup = ours[0]["layers"] / max(fmean(each["layers"] for each in kept), 0.01)
            rows.append(
                [data, ours[0]["encoder"], f"`geep train`, {HALF_A_POINT}", f"{drop:+.2f}, {times(speedup)}", "", ""]
            )
    told = ", ".join(f"{rule}'s rule {span(values, points)}" for rule, values in lost.items() if values)
    return Section(
        "What do FastBERT and GEEP give as published?",
        (
            "Accuracy against the full model in points, and layers (as published: operations) saved, at speeds "
            f"{', '.join(f'{speed:g}' for speed in about['speeds'])}, on the test split; {about['encoder']}'s numbers "
            f"are those of {about['source']}, on other rows and another encoder. FastBERT asks every exit until one is "
            "sure; GEEP predicts the exit by counts and stops there. No promise is made by either.",
            table(["data set", "encoder", "what", *(f"speed {speed:g}" for speed in about["speeds"])], rows),
        ),
        f"Over these sets and speeds accuracy changes by: {told or '–'} points.",
        "From `benchmarks/certified.py`.",
    )


def _shared(lines: list[Line]) -> Section:
    """The last layer and the teacher on the output of each exit's layer, a layer more than the exit itself takes."""
    taken = sorted({layers for line in lines for layers in _behind_another(line["depths"])})
    rows, gains = [], {layers: [] for layers in taken}
    for data, recipe in dict.fromkeys((line["data"], line["recipe"]) for line in lines):
        cells = [line for line in lines if (line["data"], line["recipe"]) == (data, recipe)]
        row = []
        for layers in taken:
            if any(layers not in _behind_another(cell["depths"]) for cell in cells):
                row.append("–")
                continue
            own, shared = (
                fmean(cell[name][cell["depths"].index(depth)] for cell in cells)
                for name, depth in (("accuracy", layers), ("shared_accuracy", layers - 1))
            )
            gains[layers].append(shared - own)
            row.append(f"{own:.2f}, {shared - own:+.2f}")
        rows.append([data, f"`{recipe}`, {len(cells)}", *row])
    means = {layers: fmean(found) for layers, found in gains.items() if found}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return Section(
        "Should the shared exit answer in an exit's place?",
        (
            "The paper's training makes last layer and teacher answer on the output of every exit's layer, too. They "
            "may answer instead of the exit, for a layer more, so they are held against the exit one layer deeper: its "
            "test accuracy, %, and what the shared exit has more at as many layers; mean over seeds.",
            table(["data set", "recipe, seeds", *(f"{layers} layers" for layers in taken)], rows),
        ),
        f"At as many layers it has {span((each for found in gains.values() for each in found), points)} points more, "
        f"on average most after {best} layers ({means[best]:+.2f}) and least after {worst} ({means[worst]:+.2f}).",
        "From `benchmarks/certified.py`.",
    )


def _behind_another(depths: list[int]) -> list[int]:
    """Depths one layer deeper than another one."""
    return [depth for depth in depths if depth - 1 in depths]


def _shallow(lines: list[Line], fitted: list[Line]) -> Section:
    depths = sorted({int(line["layers"]) for line in lines})
    rows, better = [], []
    for data in dict.fromkeys(line["data"] for line in lines):
        found = {int(line["layers"]): line["accuracy"][-1] for line in lines if line["data"] == data}
        mine = [line for line in fitted if line["data"] == data]
        kept = _kept(mine)
        layers, accuracy = (fmean(each[name] for each in kept) if kept else None for name in ("layers", "accuracy"))
        rows.append(
            [
                data,
                *(f"{found[depth]:.2f}" if depth in found else "–" for depth in depths),
                "–" if accuracy is None else f"{accuracy:.2f} at {layers:.2f} layers",
                f"{fmean(line['accuracy'][-1] for line in mine):.2f}" if mine else "–",
            ]
        )
        if layers is not None and (deeper := [depth for depth in found if depth >= layers]):
            better.append(accuracy > found[min(deeper)])
    return Section(
        "Is a model of fewer layers as good?",
        (
            "The encoder's first layers, fine-tuned at that depth on the same rows, beside `geep train` certified for "
            f"{HALF_A_POINT}: accuracy on the test split, %.",
            table(["data set", *(f"{depth} layers" for depth in depths), "GEEP", "full model"], rows),
        ),
        f"GEEP is more accurate than the shallow model of the next whole depth measured in {sum(better)} of "
        f"{len(better)} sets."
        if better
        else "None of them is as deep as GEEP runs here.",
        "From `benchmarks/certified.py`.",
    )


def _kept(cells: list[Line]) -> list[Line]:
    """What certified trainings do on the test rows; those of which nothing was certified are left out."""
    return [cell["promises"][HALF_A_POINT] for cell in cells if "layers" in cell["promises"][HALF_A_POINT]]
