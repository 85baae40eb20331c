"""docs/benchmarks.md: every bundled suite, and what was measured of speed, from the result files."""

from collections.abc import Sequence
from pathlib import Path

from dml.storage import write_aside
from eval.benchmark.compare import (
    SHOWN,
    TITLES,
    Line,
    Table,
    difference_cells,
    estimate_text,
    make_table,
    settings_lines,
)
from eval.benchmark.plot import plot
from eval.benchmark.results import default_place, results_folder
from eval.benchmark.suite import load_suite, suite_names
from eval.speed.page import speed_section

HEAD = """# Benchmarks

Which method is better, on the same footing? This page is made from the result files in `eval/results` by
`make benchmarks`; nothing in it is written by hand. [Evaluation](evaluation.md#the-benchmark) says how the
benchmark works, how to run it, and how to add a row or a suite of your own.

How to read the tables: figures are means over full runs with different seeds, ± half of a 95 % interval
(Student's t). *Validation* classes chose the settings and the weights, so those figures are a little too
good, for every row alike. *Difference* is the change of MAP@R against the row that the method builds on, with
a 95 % interval and the p-value of the corrected paired test (Nadeau and Bengio), adjusted for the number of
comparisons in the table (Holm). An interval that holds 0 is no evidence for either. *Test* classes are looked
at once for each frozen recipe, and *looks* counts how often that was.
"""


def write_page(path: Path, results: Path | None = None) -> list[Path]:
    """Write the page, and a picture for each suite with finished runs into `pictures` beside it."""
    written = [path]
    sections = []
    for suite in sorted((load_suite(name) for name in suite_names()), key=lambda s: (s.status, s.name)):
        table = make_table(suite, default_place(suite, results))
        drawing = plot(table)
        picture = path.parent / "pictures" / f"benchmark-{suite.name}.svg"
        if drawing:
            write_aside(picture, lambda aside, text=drawing: aside.write_text(text, encoding="utf-8"))
            written.append(picture)
        sections.append(section(table, picture.name if drawing else ""))
    speed = speed_section(results_folder() if results is None else results)
    text = "\n".join([HEAD, *sections, *([speed] if speed else [])])
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return written


def section(table: Table, picture: str) -> str:
    """One suite."""
    suite = table.suite
    begun = any(line.figures or line.tuning_runs for line in table.lines)
    lines = [f"## {suite.title}", ""]
    if suite.about:
        lines += [suite.about.strip(), ""]
    lines += [f"- {text}" for text in settings_lines(suite)]
    if suite.data.about:
        lines.append(f"- pictures: {suite.data.about}")
    if table.machines:
        lines.append(f"- made on: {'; '.join(table.machines)}")
    lines.append("")
    if not begun:
        titles = ", ".join(row.title for row in suite.rows.values())
        lines += [f"**Not yet run.** Rows: {titles}.", ""]
    else:
        if picture:
            lines += [f"![MAP@R of every row of {suite.title}](pictures/{picture})", ""]
        lines += [*validation_table(table.lines), ""]
        if any(line.test for line in table.lines):
            lines += ["On the test classes:", "", *test_table(table.lines), ""]
        lines += [*chosen(table.lines), ""]
        lines += [f"Note: {note}." for note in table.notes]
        lines += [""] if table.notes else []
    lines += ["```sh", f"dml bench run {suite.name} --data FOLDER --jobs 4", "```", ""]
    return "\n".join(lines)


def validation_table(lines: Sequence[Line]) -> list[str]:
    """Figures on the validation folds, differences and cost."""
    rows = [
        "| row | validation MAP@R | R-Precision | Recall@1 | difference | p | tuning + full runs | time "
        "| memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        waiting = f"{line.seeds} of {line.wanted} seeds"
        figures = [estimate_text(line.figures[n]) for n in SHOWN] if line.figures else [waiting, "", ""]
        if line.figures and line.seeds < line.wanted:
            figures[0] += f" ({waiting})"
        cost = "" if line.seconds is None else f"{line.seconds:.0f} s"
        memory = "" if line.peak_bytes is None else f"{line.peak_bytes / 2**20:.0f} MiB"
        runs = f"{line.tuning_runs} + {line.seeds}"
        cells = [line.title, *figures, *difference_cells(line.difference, line.p), runs, cost, memory]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def test_table(lines: Sequence[Line]) -> list[str]:
    """Figures on the test classes, of the rows that were looked at."""
    titles = [TITLES[name] for name in SHOWN]
    rows = [
        f"| row | {' | '.join(titles)} | difference | p | looks |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        if line.test:
            figures = [estimate_text(line.test[n]) for n in SHOWN]
            compared = difference_cells(line.test_difference, line.test_p)
            rows.append("| " + " | ".join([line.title, *figures, *compared, str(line.looks)]) + " |")
    return rows


def chosen(lines: Sequence[Line]) -> list[str]:
    """The settings that tuning chose."""
    rows = []
    for line in lines:
        if line.parameters:
            values = ", ".join(f"`{key} = {value}`" for key, value in line.parameters.items())
            rows.append(f"- {line.title}: {values}")
    return (
        ["<details><summary>Settings that tuning chose</summary>", "", *rows, "", "</details>"]
        if rows
        else []
    )
