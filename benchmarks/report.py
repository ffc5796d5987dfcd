"""Turn benchmarks/results/*.jsonl into docs/results.md, docs/results/*.md and the README's numbers; measures nothing.

python benchmarks/report.py            # write
python benchmarks/report.py --check    # say whether the documents are what the results give; exit 1 if not
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import islice
from pathlib import Path

from sections.baselines import baseline_sections
from sections.calls import small_call_sections
from sections.choices import cheap_sections, choice_sections
from sections.exits import exit_sections
from sections.machines import machine_sections
from sections.promises import promise_sections
from sections.race import call_sections, race_sections, readme_table
from sections.raw import raw_pages
from tables import certified_races, of_kind, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- {name}: written by `make bench` -->", "<!-- end of {name} -->"


def main() -> None:
    """Write the documents, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = documents(ROOT, RESULTS)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    gone = sorted(set((ROOT / "docs" / "results").glob("*.md")) - set(wanted))
    if args.check:
        for path in [*stale, *gone]:
            print(f"{path.relative_to(ROOT)} is not what the results give; run `make bench`.")
        sys.exit(1 if stale or gone else 0)
    for path in gone:
        path.unlink()
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def documents(root: Path, results: Path) -> dict[Path, str]:
    """Every document that holds numbers, and its text."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, block in (("first screen", first_screen(results)), ("results", answers(results))):
        start, end = (mark.format(name=name) for mark in MARKS)
        if not re.search(f"{re.escape(start)}.*{re.escape(end)}", text, flags=re.DOTALL):
            raise SystemExit(f"{readme} lacks the marks {start} … {end}, between which numbers are written.")
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{block}\n\n{end}{rest.split(end)[1]}"
    pages = {root / "docs" / "results" / f"{name}.md": f"{page}\n" for name, page in raw_pages(results)}
    return {readme: text, root / "docs" / "results.md": results_page(results), **pages}


def results_page(results: Path) -> str:
    """The whole of docs/results.md: questions, each with a table and its answer."""
    sections = [
        *race_sections(results),
        *cheap_sections(results),
        *promise_sections(results),
        *exit_sections(results),
        *choice_sections(results),
        *baseline_sections(results),
        *small_call_sections(results),
        *call_sections(results),
        *machine_sections(results),
    ]
    parts = [
        "# Results",
        "Questions, and what was measured. Written by `make bench` from `benchmarks/results/*.jsonl`, every number "
        "and comparison in an answer too; how each was measured, and what was not, stands at the top of its script "
        "in `benchmarks/`. Absolute speeds mean nothing without the machine named beside them; ratios were taken in "
        "one interleaved run.",
        *(str(section) for section in sections),
    ]
    return "\n\n".join(parts) + "\n"


def answers(results: Path) -> str:
    """What the README says of results: questions and answers, without their tables."""
    told = [*race_sections(results)]
    for sections in (promise_sections, exit_sections, small_call_sections, machine_sections):
        told += [*islice(sections(results), 1)]
    page = "docs/results.md"
    return "\n".join(f"- [{each.question}]({page}#{anchor(each.question)}) {each.answer}" for each in told)


def anchor(heading: str) -> str:
    """What GitHub calls a heading in an address."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def first_screen(results: Path) -> str:
    """Figures and table that stand at the top of the README."""
    parts = []
    drawn = read(results / "staircase.jsonl")
    if drawn:
        (about,), texts = of_kind(drawn, "window"), of_kind(drawn, "text")
        depth = about["layers"]
        ran, known = sum(text["exit"] for text in texts), sum(text["predicted"] == 0 for text in texts)
        hits = sum(0 < text["predicted"] == text["exit"] for text in texts)
        promise = about["promise"]
        promised = (
            f"to lose at most {100 * promise['max_accuracy_drop']:g} points"
            if promise["max_accuracy_drop"] is not None
            else f"to agree on {100 * promise['min_agreement']:g} %"
        )
        parts += [
            "![texts as columns, layers as rows: a staircase](benchmarks/results/staircase.png)",
            f"*{len(texts)} test texts of {about['data']} (columns) in a {depth}-layer encoder (rows), in batches of "
            f"at most {about['batch_tokens']} tokens, certified {promised}, {100 * promise['confidence']:g} % sure: "
            f"{known} are answered by the table, {hits} where it said they would be, {len(texts) - known - hits} go "
            f"on. Run are {ran:,} of {depth * len(texts):,} layers; {sum(text['agrees'] for text in texts)} of "
            f"{len(texts)} answers are the full model's.*",
        ]
    races = certified_races(results)
    if races:
        machine = of_kind(races[0][1], "about")[0]["machine"]
        parts += [
            "![accuracy against time](benchmarks/results/races.png)",
            f"*Accuracy against time on {len(races)} data sets, {machine['threads']} threads of {machine['device']}, "
            "everything at its best batch size; up and to the right is better.*",
            readme_table(results),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
