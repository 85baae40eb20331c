"""The table of a suite: figures with intervals, differences with tests, cost, looks at the test classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log
from statistics import median
from typing import Any

from dml.errors import ConfigError
from eval.benchmark.plan import standing
from eval.benchmark.results import Place, Result, RowResults, check_row_results, differences, read_row
from eval.benchmark.statistics import Comparison, Estimate, holm, interval, paired
from eval.benchmark.suite import Suite, dotted_keys, is_method, value_at

SHOWN = ("map_at_r", "r_precision", "recall_at_1")
TITLES = {"map_at_r": "MAP@R", "r_precision": "R-Precision", "recall_at_1": "Recall@1"}

WIDE = 200
"""Columns of a table that goes into a file or a pipe."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    row: str
    title: str
    group: str
    against: str
    seeds: int  # full runs done
    wanted: int
    figures: dict[str, Estimate]  # on the validation folds; empty before the first full run
    test: dict[str, Estimate]  # on the test classes; empty before the look
    difference: dict[str, Comparison]  # to the row `against`, on the validation folds
    test_difference: dict[str, Comparison]
    tuning_runs: int
    pruned: int  # trials
    failures: int  # runs that diverged
    seconds: float | None  # median of the full runs
    cpu_seconds: float | None
    peak_bytes: int | None  # median of the full runs; of the GPU where there is one
    parameters: dict[str, Any]  # chosen by tuning
    looks: int = 0
    p: float | None = None  # of the difference in MAP@R, adjusted for all comparisons of the table
    test_p: float | None = None


@dataclass(frozen=True)
class Table:
    """All rows of a suite that stand under the same settings."""

    suite: Suite
    lines: tuple[Line, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    machines: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite.name,
            "title": self.suite.title,
            "settings": self.settings,
            "rows": [asdict(line) for line in self.lines],
            "notes": list(self.notes),
            "machines": list(self.machines),
        }


def make_table(suite: Suite, place: Place, rows: Sequence[str] | None = None) -> Table:
    """The table of what is there.

    Raises:
        ConfigError: rows whose settings differ, and what differs.
    """
    names = list(rows or suite.rows)
    found = {name: read_row(place, name) for name in names}
    check_settings(suite, found)
    looks = looks_by_row(place)
    lines = [line_of(suite, name, found, looks.get(name, 0)) for name in names]
    for test in (False, True):
        lines = adjusted(lines, test=test)
    everything = [result for results in found.values() for result in results.all()]
    settings = everything[0]["settings"] if everything else {}
    return Table(suite, tuple(lines), settings, notes_on(suite, found), machines_of(everything))


def check_settings(suite: Suite, found: Mapping[str, RowResults]) -> None:
    """Refuse rows that were not measured alike.

    Raises:
        ConfigError: results of other settings than the suite states, or rows whose effective recipes differ
            in what all rows share (a default that has changed since).
    """
    first: tuple[str, Result] | None = None
    for name, results in found.items():
        everything = results.all()
        if not everything:
            continue
        own = everything[0]
        data, folds = own["settings"]["data"], own["settings"]["folds"]
        if suite.data.digest and data != suite.data.digest:
            raise ConfigError(
                f"The row {name} was measured on other pictures ({data}) than {suite.path.name} states "
                f"({suite.data.digest})."
            )
        check_row_results(suite, name, results, suite.settings(data, folds))
        for result in (*results.trials.values(), *results.seeds.values()):
            if first is None:
                first = name, result
            unlike = unlike_recipes(first[1], result)
            if unlike:
                raise ConfigError(
                    f"The rows {first[0]} and {name} cannot stand in one table: their settings differ in "
                    f"{'; '.join(unlike)}. Measure one of them again under the settings of the other."
                )
            one, other = ({**r["settings"], "trunk": r.get("trunk", "")} for r in (first[1], result))
            lines = differences(one, other)
            if lines:
                raise ConfigError(
                    f"The rows {first[0]} and {name} cannot stand in one table: {'; '.join(lines)}."
                )


def unlike_recipes(left: Result, right: Result) -> list[str]:
    """What differs in the parts of two effective recipes that all rows share; keys that only one has (an
    option that is younger than the other's code) do not count."""
    own = {"train.seed", "train.epochs", "data.source"}
    keys = [k for k in dotted_keys(left["recipe"]) if k not in own and not is_method(k)]
    found = []
    for key in keys:
        try:
            pair = value_at(left["recipe"], key), value_at(right["recipe"], key)
        except (KeyError, TypeError):
            continue
        if pair[0] != pair[1]:
            found.append(f"{key} ({pair[0]} and {pair[1]})")
    return found


def looked_at(results: RowResults) -> dict[int, Result]:
    """Figures on the test classes that belong to the full runs as they are now."""
    return {
        seed: final
        for seed, final in results.finals.items()
        if seed in results.seeds and final["recipe_digest"] == results.seeds[seed]["recipe_digest"]
    }


def line_of(suite: Suite, name: str, found: Mapping[str, RowResults], looks: int) -> Line:
    row, results = suite.rows[name], found[name]
    now = standing(suite, name, results)
    done = list(results.seeds.values())
    base = found.get(row.against)
    share = suite.protocol.validation_share
    peaks = [r["peak_memory"]["gpu"] or r["peak_memory"]["process"] for r in done]
    return Line(
        row=name,
        title=row.title,
        group=row.group,
        against=row.against,
        seeds=len(done),
        wanted=suite.protocol.seeds,
        figures=estimates(results.seeds),
        test=estimates(looked_at(results)),
        difference=compared(results.seeds, base.seeds, share) if base else {},
        test_difference=compared(looked_at(results), looked_at(base), share) if base else {},
        tuning_runs=len(results.trials),
        pruned=sum(trial.pruned for trial in now.trials),
        failures=sum("failure" in r for r in (*results.trials.values(), *done)),
        seconds=median(r["seconds"] for r in done) if done else None,
        cpu_seconds=median(r["cpu_seconds"] for r in done) if done else None,
        peak_bytes=int(median(peaks)) if peaks else None,
        parameters=now.best or {},
        looks=looks,
    )


def estimates(runs: Mapping[int, Result]) -> dict[str, Estimate]:
    return {name: interval([r["figures"][name] for r in runs.values()]) for name in SHOWN} if runs else {}


def compared(ours: Mapping[int, Result], theirs: Mapping[int, Result], share: float) -> dict[str, Comparison]:
    """Differences over the seeds that both rows have."""
    both = sorted(set(ours) & set(theirs))
    if not both:
        return {}
    return {
        name: paired([ours[s]["figures"][name] - theirs[s]["figures"][name] for s in both], share=share)
        for name in SHOWN
    }


def adjusted(lines: Sequence[Line], *, test: bool) -> list[Line]:
    """The lines with the p-values of MAP@R, adjusted for all comparisons of the table (Holm)."""
    raw: dict[str, float] = {}
    for line in lines:
        comparison = (line.test_difference if test else line.difference).get("map_at_r")
        if comparison is not None and comparison.p is not None:
            raw[line.row] = comparison.p
    found = holm(raw)
    return [
        replace(line, **{"test_p" if test else "p": found[line.row]}) if line.row in found else line
        for line in lines
    ]


def looks_by_row(place: Place) -> dict[str, int]:
    """How often each row has been measured on the test classes."""
    counts: dict[str, int] = {}
    if place.looks.is_file():
        for text in place.looks.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)["row"]
            counts[row] = counts.get(row, 0) + 1
    return counts


def notes_on(suite: Suite, found: Mapping[str, RowResults]) -> tuple[str, ...]:
    """What a reader of the table should know."""
    notes = []
    codes: dict[str, list[str]] = {}
    for name, results in found.items():
        for result in results.seeds.values():
            rows = codes.setdefault(result["code"]["all"], [])
            if name not in rows:
                rows.append(name)
    if len(codes) > 1:
        parts: dict[str, set[str]] = {}
        for results in found.values():
            for result in results.seeds.values():
                for part, digest in result["code"]["parts"].items():
                    parts.setdefault(part, set()).add(digest)
        changed = sorted(part for part, digests in parts.items() if len(digests) > 1)
        notes.append(
            f"{len(codes)} versions of the code made these rows; they differ in dml/{', dml/'.join(changed)}"
        )
    edges = edge_notes(suite, found)
    if edges:
        notes.append(
            "the best setting lies at the edge of its range, and a wider one may be better: "
            + "; ".join(edges)
        )
    diverged = [
        name for name, results in found.items() if any("failure" in r for r in results.seeds.values())
    ]
    if diverged:
        notes.append(f"full runs that diverged count as 0 in: {', '.join(diverged)}")
    return tuple(notes)


EDGE = 0.05
"""A chosen value within this share of a range from its end lies at its edge."""


def edge_notes(suite: Suite, found: Mapping[str, RowResults]) -> list[str]:
    """ "row (key = value)" for chosen settings at the edge of their range."""
    notes = []
    for name, results in found.items():
        best = standing(suite, name, results).best or {}
        for key, dimension in suite.rows[name].space.items():
            if dimension.choices or key not in best:
                continue
            value = best[key]
            low, high = (log(v) if dimension.log else v for v in dimension.range)
            share = ((log(value) if dimension.log else value) - low) / (high - low)
            if not EDGE < share < 1 - EDGE:
                notes.append(f"{name} ({key} = {value:g})")
    return notes


def in_words(tree: Mapping[str, Any]) -> str:
    """ "scale 0.6 to 1, flip 0" """
    texts = []
    for key, value in tree.items():
        if isinstance(value, list):
            value = " to ".join(f"{v:g}" for v in value) if len(value) == 2 else "-".join(map(str, value))
        texts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(texts)


def machines_of(everything: Sequence[Result]) -> tuple[str, ...]:
    """Processors or GPUs that made the results, each once."""
    names = [
        result["environment"]["gpu"]
        or f"{result['environment']['cpu']}, {result['environment']['threads']} thread"
        for result in everything
        if result["phase"] in ("trial", "seed")
    ]
    return tuple(dict.fromkeys(names))


def print_table(table: Table) -> None:
    """The table on a terminal."""
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(f"{table.suite.title}", style="bold", highlight=False)
    for text in settings_lines(table.suite):
        console.print(text, highlight=False, markup=False)
    drawn = Drawn(box=None, pad_edge=False)
    drawn.add_column("row", no_wrap=True)
    tested = any(line.test for line in table.lines)
    titles = [
        f"validation {TITLES['map_at_r']}",
        TITLES["r_precision"],
        TITLES["recall_at_1"],
        "difference",
        "p",
    ]
    if tested:
        titles += [f"test {TITLES['map_at_r']}", TITLES["recall_at_1"], "difference", "p", "looks"]
    for title in (*titles, "runs", "seconds", "memory"):
        drawn.add_column(title, justify="right")
    for line in table.lines:
        drawn.add_row(line.row, *cells(line, tested=tested))
    console.print(drawn)
    for note in table.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def cells(line: Line, *, tested: bool) -> list[str]:
    """The texts of a line."""
    unfinished = f"{line.seeds} of {line.wanted} seeds"
    shown = [estimate_text(line.figures[name]) for name in SHOWN] if line.figures else [unfinished, "", ""]
    if line.figures and line.seeds < line.wanted:
        shown[0] += f" ({unfinished})"
    shown += difference_cells(line.difference, line.p)
    if tested:
        found = [estimate_text(line.test[n]) for n in ("map_at_r", "recall_at_1")] if line.test else ["", ""]
        shown += [*found, *difference_cells(line.test_difference, line.test_p), str(line.looks)]
    cost = "" if line.seconds is None else f"{line.seconds:.0f}"
    memory = "" if line.peak_bytes is None else f"{line.peak_bytes / 2**20:.0f} MiB"
    return [*shown, f"{line.tuning_runs} + {line.seeds}", cost, memory]


def estimate_text(estimate: Estimate) -> str:
    """ "0.512 ± 0.014" """
    if estimate.low is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} ± {estimate.mean - estimate.low:.3f}"


def difference_cells(found: Mapping[str, Comparison], p: float | None) -> list[str]:
    """Difference in MAP@R with its interval, and the adjusted p-value."""
    if "map_at_r" not in found:
        return ["", ""]
    comparison = found["map_at_r"]
    text = f"{comparison.difference:+.3f}"
    if comparison.low is not None and comparison.high is not None:
        text += f" [{comparison.low:+.3f}, {comparison.high:+.3f}]"
    return [text, "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"]


def settings_lines(suite: Suite) -> list[str]:
    """What all rows share, in words: everything that Reality Check asks a table to say."""
    recipe = suite.recipe(next(iter(suite.rows)))
    model, train, data, protocol = recipe.model, recipe.train, recipe.data, suite.protocol
    weights = "pretrained weights" if model.pretrained or model.weights else "random weights"
    if suite.pretrain is not None:
        weights = f"pretrained on {suite.pretrain.classes} of the training classes, which no row sees then"
    norm = "frozen" if model.freeze_batch_norm else "trained"
    steps = f"{train.epochs} epochs" + (f" of {train.steps_per_epoch} steps" if train.steps_per_epoch else "")
    args = f" ({in_words(model.trunk_args)})" if model.trunk_args else ""
    crop = in_words(data.augmentation.args) or "its defaults"
    return [
        f"trunk {model.trunk}{args}, {weights}; {model.pooling} pooling, {model.dim} dimensions, "
        f"BatchNorm {norm}",
        f"{data.image_size} px ({data.fit}), augmentation {data.augmentation.name}: {crop}",
        f"batch {train.classes_per_batch} classes x {train.images_per_class}, {train.optimizer} "
        f"(weight decay {train.weight_decay:g}, precision {train.precision}), {train.schedule} schedule, "
        f"{steps}",
        f"tuning: {protocol.trials} trials x {protocol.folds} class-disjoint folds at "
        f"{protocol.trial_share:.0%} of the schedule, pruned; then {protocol.seeds} seeds; "
        f"weights and settings chosen by MAP@R on validation classes",
    ]
