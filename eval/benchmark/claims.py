"""A claim: a recipe frozen and committed first, then one look at the test classes.

`freeze` writes the best settings of a row as a full recipe. `look` measures the encoders of the row's full
runs on the test classes, once for each frozen recipe, and every look is a line of a file that only grows.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w

from dml.config import Recipe, load_recipe, recipe_tree
from dml.errors import DmlError, UsageError
from dml.imaging import BadImage
from dml.storage import flush_to_disk, write_aside
from eval.benchmark.baselines import baseline_vectors
from eval.benchmark.folds import open_pictures
from eval.benchmark.measure import Bench, code_digests, figures_of, fingerprint_of
from eval.benchmark.plan import standing
from eval.benchmark.replay import repeat
from eval.benchmark.results import (
    Place,
    Result,
    RowResults,
    check_row_results,
    locked,
    read_row,
    write_result,
)
from eval.benchmark.suite import Suite, digest_of, load_suite
from eval.benchmark.trunk import refuse_other_trunks, with_trunk
from eval.benchmark.worker import Event, Order

Say = Callable[[str], None]


def freeze(suite: Suite, place: Place, rows: Sequence[str], say: Say) -> list[Path]:
    """Write the best recipe of each finished row to FROZEN/SUITE/ROW.toml; equal files stay as they are.

    Raises:
        UsageError: a row is not finished.
    """
    unfinished = {name: reason for name in rows if (reason := unfinished_reason(suite, place, name))}
    if unfinished:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in unfinished.items())
        raise UsageError(f"Only finished rows can be frozen: {reasons}. Choose others with --rows.")
    written = []
    for name in rows:
        path = frozen_file(place, name)
        best = frozen_recipe(suite, name, read_row(place, name))
        if path.is_file() and recipe_tree(load_recipe(path)) == recipe_tree(best):
            say(f"{name}: frozen already, nothing changed")
            continue
        text = frozen_text(suite, name, read_row(place, name), best)
        write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
        say(f"{name}: frozen in {path}")
        written.append(path)
    return written


def unfinished_reason(suite: Suite, place: Place, row: str) -> str:
    """Why a row is not finished; empty when it is."""
    now = standing(suite, row, read_row(place, row))
    if now.best is None:
        return f"{len(now.trials)} of {suite.protocol.trials} trials begun"
    wanted = suite.protocol.seeds
    return "" if now.seeds == wanted else f"{now.seeds} of {wanted} seeds"


def frozen_file(place: Place, row: str) -> Path:
    return place.frozen / f"{row}.toml"


def frozen_recipe(suite: Suite, row: str, results: RowResults) -> Recipe:
    """The recipe that the results of a row say is best, with seed 0 and no data."""
    return suite.recipe(row, standing(suite, row, results).best or {})


def frozen_text(suite: Suite, row: str, results: RowResults, recipe: Recipe) -> str:
    values = [r["figures"]["map_at_r"] for r in results.seeds.values()]
    head = (
        f"# {suite.title}: {suite.rows[row].title}, frozen.\n"
        f"# Chosen by {len(results.trials)} tuning runs; validation MAP@R {fmean(values):.4f} over "
        f"{len(values)} seeds.\n"
    )
    if suite.pretrain is not None:
        head += "# Begins with the pretrained trunk of the suite: set model.weights to such a file.\n"
    return head + tomli_w.dumps(recipe_tree(recipe))


def look(order: Order, place: Place, *, named: bool, say: Say, tell: Callable[[Event], None]) -> list[str]:
    """Measure rows on the test classes and return those that were looked at.

    Args:
        named: the rows were asked for by name, so that one that cannot be looked at is an error; otherwise
            rows that are not frozen, or have been looked at, are passed over.

    Raises:
        UsageError: the tree is dirty, a frozen recipe is missing, not committed, or not what the results say,
            or has been looked at before.
    """
    suite = load_suite(order.suite)
    commit = clean_commit(place)
    rows = list(order.rows)
    if not named:
        rows = [r for r in rows if frozen_file(place, r).is_file() and not is_looked_at(suite, place, r)]
        if not rows:
            raise UsageError(
                f"No row of {suite.name} waits for its look: freeze one first (dml bench run {suite.name} "
                f"--freeze), and commit what that writes."
            )
    for row in rows:
        refuse_look(suite, place, row)
    bench = Bench(suite, open_pictures(suite, order.data, place.results), Path(order.work))
    bench = with_trunk(bench, place, bench.work, lambda step, steps: None)
    refuse_other_trunks(bench, place)
    for row in rows:
        check_row_results(suite, row, read_row(place, row), bench.settings)
    with locked(place, "final") as mine:
        if not mine:
            raise UsageError(f"Another process is looking at the test classes of {suite.name}; wait for it.")
        for row in rows:
            look_at(Look(order, bench, place, row, commit, frozen_digest(place, row)), say, tell)
    return rows


@dataclass(frozen=True)
class Look:
    """What one look at the test classes needs."""

    order: Order
    bench: Bench
    place: Place
    row: str
    commit: str
    frozen: str


def refuse_look(suite: Suite, place: Place, row: str) -> None:
    """Raise UsageError for a row that must not be measured on the test classes (now, or again)."""
    path = frozen_file(place, row)
    if not path.is_file():
        raise UsageError(
            f"{row} has no frozen recipe {path}. Write it with dml bench run {suite.name} --freeze --rows "
            f"{row}, and commit it: a claim comes before its test."
        )
    reason = unfinished_reason(suite, place, row)
    if reason:
        raise UsageError(f"{row} is not finished: {reason}.")
    if recipe_tree(load_recipe(path)) != recipe_tree(frozen_recipe(suite, row, read_row(place, row))):
        raise UsageError(
            f"{path} is no longer what the results of {row} say. Freeze it again and commit it, or put the "
            f"results back."
        )
    if git(place, "ls-files", "--error-unmatch", str(path.resolve())) is None:
        raise UsageError(f"{path} is not committed. Commit it: a claim comes before its test.")
    if is_looked_at(suite, place, row):
        raise UsageError(
            f"{row} has been measured on the test classes with this frozen recipe: {place.looks} says when. "
            f"A second look would be choosing by the test classes."
        )


def is_looked_at(suite: Suite, place: Place, row: str) -> bool:
    """Whether the frozen recipe has been measured with every seed (an interrupted look may be finished)."""
    frozen = frozen_digest(place, row)
    if not any(line["row"] == row and line["frozen"] == frozen for line in read_looks(place)):
        return False
    finals = read_row(place, row).finals
    return all(s in finals and finals[s]["frozen"] == frozen for s in range(suite.protocol.seeds))


def frozen_digest(place: Place, row: str) -> str:
    """A hash of the values of a frozen recipe as they stand in its file, so that options which later versions
    add do not make it another one."""
    import tomllib

    return digest_of(tomllib.loads(frozen_file(place, row).read_text(encoding="utf-8")))


def read_looks(place: Place) -> list[dict[str, Any]]:
    """The lines of the file of looks."""
    if not place.looks.is_file():
        return []
    return [json.loads(line) for line in place.looks.read_text(encoding="utf-8").splitlines() if line]


def note_look(this: Look) -> None:
    """Append a line for a look before it begins; nothing in the file is ever rewritten."""
    known = [(line["row"], line["frozen"]) for line in read_looks(this.place)]
    if (this.row, this.frozen) in known:
        return  # an interrupted look goes on
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "row": this.row,
        "frozen": this.frozen,
        "commit": this.commit,
        "code": code_digests()["all"],
        "data": this.bench.pictures.digest,
    }
    this.place.looks.parent.mkdir(parents=True, exist_ok=True)
    with this.place.looks.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    flush_to_disk(this.place.looks)


def look_at(this: Look, say: Say, tell: Callable[[Event], None]) -> None:
    """Measure the encoder of every full run of a row on the test classes."""
    note_look(this)
    results = read_row(this.place, this.row)
    for seed, run in sorted(results.seeds.items()):
        before = results.finals.get(seed)
        if before is not None and before["frozen"] == this.frozen:
            continue
        figures, extra = figures_on_test(this, run, tell)
        kept = ("suite", "row", "number", "fold", "seed", "parameters", "recipe", "recipe_digest")
        kept += ("settings", "settings_digest", "row_digest", "data_digest", "folds_digest")
        final = {
            **{key: run[key] for key in kept},
            "phase": "final",
            "figures": figures,
            **extra,
            "commit": this.commit,
            "frozen": this.frozen,
            "code": code_digests(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_result(this.place.file(this.row, f"final-{seed}"), final)
        shown = f"test MAP@R {figures['map_at_r']:.4f}, Recall@1 {figures['recall_at_1']:.4f}"
        say(f"{this.row} seed {seed}: {shown}")


def figures_on_test(
    this: Look, run: Result, tell: Callable[[Event], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures on the test classes, and how they came to be."""
    pictures, kind = this.bench.pictures, this.bench.suite.rows[this.row].kind
    if "failure" in run:
        return dict.fromkeys(run["figures"], 0.0), {"failure": run["failure"]}
    if kind != "trained":
        weights = str(this.bench.weights or "")
        recipe = this.bench.suite.recipe(this.row, seed=run["number"], weights=weights)
        train, _ = pictures.fold(run["fold"])
        rows, vectors = baseline_vectors(kind, recipe, pictures.test, train)
        found = [pictures.test[row] for row in rows]
        if not pictures.gallery:
            return figures_of(vectors, found), {}
        there, gallery = baseline_vectors(kind, recipe, pictures.gallery, train)
        return figures_of(vectors, found, gallery, [pictures.gallery[row] for row in there]), {}
    from dml.encoder import Encoder

    folder, again = encoder_of(this, run, tell)
    encoder = Encoder.load(folder)
    bad: list[BadImage] = []
    rows, vectors, _ = encoder.embed_files(pictures.test, on_bad=bad.append)
    found = [pictures.test[row] for row in rows]
    extra = {"encoder": encoder.fingerprint, "unreadable": len(bad), **again}
    if not pictures.gallery:
        return figures_of(vectors, found), extra
    there, gallery, _ = encoder.embed_files(pictures.gallery, on_bad=bad.append)
    records = [pictures.gallery[row] for row in there]
    return figures_of(vectors, found, gallery, records), {**extra, "unreadable": len(bad)}


def encoder_of(this: Look, run: Result, tell: Callable[[Event], None]) -> tuple[Path, dict[str, Any]]:
    """The encoder of a full run: the recorded one where the work folder still has it, else trained again."""
    work, name = this.bench.work / this.row, f"seed-{run['number']}"
    for folder in sorted(work.glob(f"{name}-*/encoder")):
        if (folder / "manifest.json").is_file() and fingerprint_of(folder) == run["encoder"]:
            return folder, {"retrained": False}
    result = repeat(this.order, this.bench.suite, this.place.file(this.row, name), tell=tell)
    for folder in sorted(work.glob(f"{name}-*/encoder")):
        if (folder / "manifest.json").is_file() and fingerprint_of(folder) == result["encoder"]:
            again = {"retrained": True, "validation_map_at_r": result["figures"]["map_at_r"]}
            return folder, again
    raise DmlError(f"the encoder of {this.row} {name} was trained again and cannot be found in {work}")


def clean_commit(place: Place) -> str:
    """The commit of the repository that holds the results.

    Raises:
        UsageError: there is none, or something in it is not committed (results of the looks themselves may
            be: an interrupted look goes on).
    """
    commit = git(place, "rev-parse", "HEAD")
    root = git(place, "rev-parse", "--show-toplevel")
    if commit is None or root is None:
        raise UsageError(
            f"{place.results} is not in a git repository with a commit. A look at the test classes records "
            f"the commit of the frozen recipe: keep suite and results in a repository."
        )
    status = git(place, "status", "--porcelain", "-z", "--untracked-files=all") or ""
    own = place.results.resolve()
    dirty = []
    for entry in status.split("\0"):
        path = Path(root.strip()) / entry[3:]
        is_ours = path == own / "looks.jsonl" or (
            path.parent.parent == own and path.stem.startswith("final-")
        )
        if entry and not is_ours:
            dirty.append(entry[3:])
    if dirty:
        more = f" and {len(dirty) - 5} more" if len(dirty) > 5 else ""
        raise UsageError(
            f"The working tree is not clean: {', '.join(dirty[:5])}{more}. Commit or remove that first: a "
            f"look at the test classes belongs to one commit."
        )
    return commit.strip()


def git(place: Place, *arguments: str) -> str | None:
    """What git prints about the repository of the results; None when it refuses, or is not there."""
    folder = place.results.resolve()
    while not folder.is_dir():
        folder = folder.parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
