"""The benchmark: fair by construction, repeatable, safe to kill, and honest about what it has looked at."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("scipy")

from conftest import draw_class

from dml.config import DataConfig, load_recipe, recipe_tree
from dml.data.split import divide
from dml.data.table import open_table
from dml.errors import ConfigError, DataError, UsageError
from eval.benchmark.claims import freeze, look
from eval.benchmark.compare import make_table
from eval.benchmark.folds import Folds, make_folds, open_pictures, pictures_digest, stored_folds
from eval.benchmark.page import write_page
from eval.benchmark.plan import (
    Trial,
    best_parameters,
    is_pruned,
    legacy,
    parameters_of,
    propose,
    standing,
    startup_draw,
)
from eval.benchmark.plot import plot
from eval.benchmark.replay import replay
from eval.benchmark.results import Item, Place, RowResults, locked, read_result, read_row, write_result
from eval.benchmark.run import run_suite
from eval.benchmark.statistics import holm, interval, paired
from eval.benchmark.suite import FOLDER, load_suite, suite_names
from eval.benchmark.worker import Event, Order, work

ROOT = Path(__file__).parent.parent

MINI = """
title = "Drawn shapes"
[protocol]
folds = 2
trials = 3
startup = 2
trial_share = 0.5
seeds = 2
[base.data]
image_size = 32
fit = "squash"
workers = 1
augmentation = { name = "none" }
[base.model]
trunk = "tiny"
trunk_args = { widths = [8, 16], blocks = [1, 1] }
dim = 8
[base.train]
epochs = 4
steps_per_epoch = 2
classes_per_batch = 3
images_per_class = 2
evaluate_every = 2
accelerator = "cpu"
[rows.pixels]
title = "grey values"
kind = "pixels"
[rows.triplet]
title = "Triplet"
recipe.loss = { name = "triplet", args = { margin = 0.1 } }
[rows.triplet.space]
"train.learning_rate" = { low = 3e-4, high = 3e-3, log = true }
"loss.args.margin" = { low = 0.03, high = 0.5, log = true }
[rows.contrastive]
title = "Contrastive"
against = "triplet"
recipe.loss = { name = "contrastive", args = { measure = "cosine" } }
"""


def quiet(event: object) -> None:
    """Takes what is told and says nothing."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training classes and 3 test classes of 5 drawn pictures each."""
    root = tmp_path_factory.mktemp("shapes")
    for kind in range(11):
        folder = root / ("train" if kind < 8 else "test") / f"kind_{kind:02d}"
        folder.mkdir(parents=True)
        for number in range(5):
            draw_class(kind, number, (32, 32)).save(folder / f"{kind}-{number}.png")
    return root


def write_suite(folder: Path, text: str = MINI) -> Path:
    path = folder / "mini.toml"
    path.write_text(text)
    return path


def order_in(folder: Path, shapes: Path, rows: tuple[str, ...] = (), **more: Any) -> Order:
    suite = folder / "mini.toml"
    return Order(
        suite=str(suite),
        data=str(shapes),
        results=str(folder / "results" / "mini"),
        work=str(folder / "work" / "mini"),
        rows=rows or tuple(load_suite(suite).rows),
        **more,
    )


def place_in(folder: Path) -> Place:
    return Place(folder / "results" / "mini")


@pytest.fixture(scope="module")
def measured(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small suite and all of its results, made by two workers side by side."""
    folder = tmp_path_factory.mktemp("measured")
    suite = load_suite(write_suite(folder))
    board = run_suite(order_in(folder, shapes), suite, jobs=2, say=quiet, show=quiet)
    assert board.failures == []
    assert board.left() == (0, 0)
    return folder


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    """A copy of those results, in a git repository of its own with everything committed."""
    folder = tmp_path / "mine"
    shutil.copytree(measured, folder)
    (folder / ".gitignore").write_text("work/\n")
    git(folder, "init", "-q")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "state")


# Suites


@pytest.mark.parametrize("name", suite_names())
def test_every_bundled_suite_is_valid_and_gives_recipes(name: str) -> None:
    suite = load_suite(name)
    for row in suite.rows:
        recipe = suite.recipe(row, suite.stated(row), seed=3, share=suite.protocol.trial_share)
        assert recipe.train.seed == 3
        assert recipe.data.test_share == 0
    tuned = [row for row in suite.rows.values() if row.kind == "trained"]
    assert all(row.space for row in tuned), "every trained row has the same number of trials"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.folds.json")), ids=lambda p: p.stem)
def test_committed_folds_share_no_class(path: Path) -> None:
    folds = Folds.from_json(path.read_text(), str(path))
    suite = load_suite(path.name.removesuffix(".folds.json"))
    assert len(folds.parts) == suite.protocol.folds
    everyone = [name for part in (*folds.parts, folds.test, folds.pretrain) for name in part]
    assert len(everyone) == len(set(everyone))
    trained = [name for part in (*folds.parts, folds.pretrain) for name in part]
    made = make_folds(
        trained,
        folds.test,
        folds=len(folds.parts),
        seed=suite.protocol.fold_seed,
        pretrain=0 if suite.pretrain is None else suite.pretrain.classes,
    )
    assert made == folds, "the file is what the class names give"


@pytest.mark.parametrize(
    ("stated", "broken", "message"),
    [
        (", args = { margin = 0.1 }", "", "is tuned, and its stated value"),
        ("margin = 0.1", "margin = 0.9", "lies outside of its space"),
        ("recipe.loss", "recipe.train.epochs = 9\nrecipe.loss", "not part of the method"),
        ('against = "triplet"', 'against = "tripled"', "no row of the suite"),
        ("folds = 2", "folds = 1", "folds must be at least 2"),
        ('title = "Triplet"', 'tile = "Triplet"', 'Did you mean "title"'),
        ("low = 0.03, high", "low = 0.03, hihg", 'Did you mean "high"'),
        ("low = 0.03", "low = 0.6", "low must be below high"),
        ('kind = "pixels"', 'kind = "pixels"\nrecipe.loss = { name = "triplet" }', "nothing is trained"),
        ("[base.model]", "[base.model", "not valid TOML"),
    ],
)
def test_an_unfair_or_broken_suite_is_refused(tmp_path: Path, stated: str, broken: str, message: str) -> None:
    assert stated in MINI
    with pytest.raises(ConfigError, match=message):
        load_suite(write_suite(tmp_path, MINI.replace(stated, broken, 1)))


def test_a_suite_may_be_like_another(tmp_path: Path) -> None:
    write_suite(tmp_path)
    (tmp_path / "wide.toml").write_text('title = "Wide"\nlike = "mini.toml"\n[base.model]\ndim = 32\n')
    wide, mini = load_suite(tmp_path / "wide.toml"), load_suite(tmp_path / "mini.toml")
    assert list(wide.rows) == list(mini.rows)
    assert (wide.recipe("triplet").model.dim, mini.recipe("triplet").model.dim) == (32, 8)
    assert wide.recipe("triplet").model.trunk_args == mini.recipe("triplet").model.trunk_args
    (tmp_path / "loop.toml").write_text('title = "Loop"\nlike = "loop.toml"\n')
    with pytest.raises(ConfigError, match="like itself"):
        load_suite(tmp_path / "loop.toml")


# Folds and pictures


def test_folds_hold_every_class_once_and_ignore_the_order(scale: int) -> None:
    for count in range(6, 6 + 20 * scale, 3):
        names = [f"class {n}" for n in range(count)]
        folds = make_folds(names, ["t"], folds=3, seed=0)
        assert sorted(c for part in folds.parts for c in part) == sorted(names)
        assert max(map(len, folds.parts)) - min(map(len, folds.parts)) <= 1
        assert folds == make_folds(names[::-1], ["t"], folds=3, seed=0)
        assert folds != make_folds(names, ["t"], folds=3, seed=1)


def test_a_class_on_two_sides_is_refused() -> None:
    with pytest.raises(DataError, match="folds share none"):
        Folds((("a", "b"), ("b",)), ("c",))
    with pytest.raises(DataError, match="in fold 0 and in test"):
        Folds((("a",), ("b",)), ("a",))


def test_a_run_is_given_no_test_picture(measured: Path) -> None:
    manifests = sorted((measured / "work" / "mini" / "folds").glob("*.csv"))
    assert len(manifests) == 2
    for path in manifests:
        table = open_table(path)
        assert set(table.splits) == {"train", "validation"}
        classes = {split: {r.label for r in rows} for split, rows in table.splits.items()}
        assert not classes["train"] & classes["validation"]
        assert not {c for part in classes.values() for c in part} & {"kind_08", "kind_09", "kind_10"}
        splits = divide(table, DataConfig(test_share=0.0, protocol="open-set"))
        assert (splits.test, splits.query) == ((), ()), "and none of its own is held out for testing"
        assert len(splits.train) + len(splits.validation) == 40


def test_other_pictures_are_refused(measured: Path, shapes: Path, tmp_path: Path) -> None:
    suite = load_suite(measured / "mini.toml")
    digest = pictures_digest(open_table(shapes))
    named = replace(suite, data=replace(suite.data, digest=digest))
    assert open_pictures(named, str(shapes), tmp_path).digest == digest
    with pytest.raises(DataError, match="does not hold the pictures"):
        open_pictures(replace(suite, data=replace(suite.data, digest="0" * 16)), str(shapes), tmp_path)
    other = make_folds([f"k{n}" for n in range(8)], ["t"], folds=2, seed=0)
    with pytest.raises(DataError, match="about other pictures"):
        stored_folds(suite, other, measured / "results" / "mini")


# Tuning


def trial(number: int, *values: float, pruned: bool = False) -> Trial:
    return Trial(number, {"train.learning_rate": 1e-3, "loss.args.margin": 0.1}, values, pruned)


def test_pruning_compares_with_the_median_at_the_same_fold(measured: Path) -> None:
    protocol = replace(load_suite(measured / "mini.toml").protocol, folds=3)
    whole = [trial(0, 0.5, 0.1, 0.9), trial(1, 0.3, 0.9, 0.9), trial(2, 0.4, 0.4, 0.4)]
    assert not is_pruned([0.4], whole, protocol)  # the median of 0.5, 0.3, 0.4
    assert is_pruned([0.39], whole, protocol)
    assert is_pruned([0.5, 0.29], whole, protocol)  # means 0.395 against the median of 0.3, 0.6, 0.4
    assert not is_pruned([0.0, 0.0, 0.0], whole, protocol), "all folds are done"
    assert not is_pruned([0.0], [trial(0, 0.5, pruned=True)], protocol), "nothing to compare with"


def test_the_best_mean_wins_and_pruned_trials_do_not(measured: Path) -> None:
    protocol = load_suite(measured / "mini.toml").protocol
    trials = [
        trial(0, 0.5, 0.5),
        replace(trial(1, 0.6, 0.4), parameters={"b": 1}),
        trial(2, 0.9, pruned=True),
    ]
    assert best_parameters(trials, protocol) == trials[0].parameters, "the earliest of equals"
    assert best_parameters([trial(2, 0.9, pruned=True)], protocol) is None


def test_proposals_depend_on_earlier_trials_alone_and_stay_in_the_space(measured: Path, scale: int) -> None:
    suite = load_suite(measured / "mini.toml")
    space, protocol = suite.rows["triplet"].space, replace(suite.protocol, startup=4)
    seen = [trial(0, 0.5, 0.6), trial(1, 0.2, pruned=True), trial(2, 0.4, 0.4), trial(3, 0.1, 0.1)]
    assert propose(space, seen, protocol, number=4) == propose(space, seen, protocol, number=4)
    for number in range(4, 8 + 10 * scale):
        for key, value in propose(space, seen, protocol, number=number).items():
            assert space[key].holds(value)
    draws = [startup_draw(space, protocol, number=n) for n in (1, 2, 3)]
    for key, dimension in space.items():
        low, high = map(math.log, dimension.range)
        parts = sorted(int(3 * (math.log(d[key]) - low) / (high - low)) for d in draws)
        assert parts == [0, 1, 2], "one draw from each third of the range"


def test_trial_0_is_the_stated_values(measured: Path) -> None:
    results = read_row(place_in(measured), "triplet")
    assert results.trials[0, 0]["parameters"] == {"train.learning_rate": 1e-3, "loss.args.margin": 0.1}


def test_a_diverged_run_counts_as_zero_and_the_row_goes_on(shapes: Path, tmp_path: Path) -> None:
    text = MINI.replace('"loss.args.margin" = { low = 0.03, high = 0.5, log = true }', "")
    text = text.replace("low = 3e-4, high = 3e-3", "low = 3e-4, high = 1e30").replace(
        "trials = 3", "trials = 2"
    )
    text = text.replace("[base.train]", "[base.train]\nlearning_rate = 1e30\noptimizer = 'sgd'")
    write_suite(tmp_path, text)
    told: list[Event] = []
    work(order_in(tmp_path, shapes, ("triplet",), until="trials"), told.append)
    results = read_row(place_in(tmp_path), "triplet")
    assert results.trials[0, 0]["figures"]["map_at_r"] == 0
    assert "no numbers any more" in results.trials[0, 0]["failure"]
    assert len(results.trials) == 4
    assert not [event for event in told if event.kind == "failed"]


# Inheritance

HEIR = """
[rows.triplet_iaa]
title = "Triplet + IAA"
against = "triplet"
inherit = true
recipe.loss = { name = "triplet", args = { margin = 0.1 } }
recipe.augment = { name = "intra_class", args = { scale = 0.8 } }
[rows.triplet_iaa.space]
"train.learning_rate" = { low = 5e-4, high = 1e-3, log = true }
"augment.args.scale" = { low = 0.1, high = 1.0 }
"""


def test_a_row_that_inherits_waits_for_the_tuned_values_and_begins_with_them(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, MINI + HEIR))
    empty = RowResults({}, {}, {})
    assert legacy(suite, "triplet_iaa", lambda row: empty) is None
    assert standing(suite, "triplet_iaa", empty, inherited=None).ready == ()
    tuned = RowResults({}, {}, {})
    for number, (margin, rate, value) in enumerate([(0.1, 1e-3, 0.2), (0.3, 2e-3, 0.5), (0.2, 5e-4, 0.1)]):
        values = {"train.learning_rate": rate, "loss.args.margin": margin}
        for fold in range(2):
            tuned.trials[number, fold] = {"parameters": values, "figures": {"map_at_r": value}}
    inherited = legacy(suite, "triplet_iaa", lambda row: tuned)
    assert inherited == {"train.learning_rate": 2e-3, "loss.args.margin": 0.3}
    (first,) = standing(suite, "triplet_iaa", empty, inherited=inherited).ready
    begun = parameters_of(suite, first, empty, inherited)
    # What its own range does not allow is brought to the nearest end.
    assert begun == {"train.learning_rate": 1e-3, "loss.args.margin": 0.3, "augment.args.scale": 0.8}
    assert suite.recipe("triplet_iaa", begun).loss.args["margin"] == 0.3

    own = RowResults({(0, 0): {"parameters": begun, "figures": {"map_at_r": 0.4}}}, {}, {})
    now = standing(suite, "triplet_iaa", own, inherited={"loss.args.margin": 0.05})
    later = {item.number: parameters_of(suite, item, own, {"loss.args.margin": 0.05}) for item in now.ready}
    assert later[1]["loss.args.margin"] == 0.3, "a row keeps what it began with"
    assert later[1]["augment.args.scale"] != 0.8
    own.trials[0, 1] = own.trials[0, 0]
    for fold in range(2):
        own.trials[1, fold] = {"parameters": later[1], "figures": {"map_at_r": 0.3}}
    proposed = parameters_of(suite, Item("triplet_iaa", "trial", 2, 0), own)
    assert set(proposed) == set(begun)
    assert proposed["loss.args.margin"] == 0.3
    assert 5e-4 <= proposed["train.learning_rate"] <= 1e-3


def test_rows_that_inherit_bring_those_that_they_need(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, MINI + HEIR))
    assert suite.beginnings(["triplet_iaa"]) == ("triplet", "triplet_iaa")
    assert suite.beginnings(["pixels", "triplet"]) == ("pixels", "triplet")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('against = "triplet"\ninherit', 'against = "contrastive"\ninherit'), "names no row that is tuned"),
        (('against = "triplet"\ninherit', 'against = "triplet_iaa"\ninherit'), "inherits from itself"),
    ],
)
def test_rows_that_cannot_inherit_are_refused(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_suite(write_suite(tmp_path, (MINI + HEIR).replace(*change)))


def test_a_row_that_inherits_is_measured_behind_the_other(tmp_path: Path, shapes: Path) -> None:
    write_suite(tmp_path, MINI + HEIR)
    work(order_in(tmp_path, shapes, ("triplet_iaa", "triplet"), until="trials"), quiet)
    place = place_in(tmp_path)
    tuned = standing(load_suite(tmp_path / "mini.toml"), "triplet", read_row(place, "triplet")).best
    heir = read_row(place, "triplet_iaa").trials
    assert len(heir) >= 4
    assert {trial["parameters"]["loss.args.margin"] for trial in heir.values()} == {tuned["loss.args.margin"]}


# Runs


def test_every_row_is_measured_with_every_seed(measured: Path) -> None:
    suite, place = load_suite(measured / "mini.toml"), place_in(measured)
    for row in suite.rows:
        results = read_row(place, row)
        assert sorted(results.seeds) == [0, 1]
        assert [results.seeds[s]["fold"] for s in (0, 1)] == [0, 1]
        now = standing(suite, row, results)
        assert now.most_left == 0
        assert now.ready == ()


def test_a_result_file_says_everything_about_its_run(measured: Path) -> None:
    result = read_row(place_in(measured), "triplet").seeds[1]
    assert {"map_at_r", "r_precision", "recall_at_1", "recall_at_8"} <= set(result["figures"])
    assert result["recipe"]["train"]["seed"] == 1
    assert result["recipe"]["data"]["source"] == "", "no path of this machine"
    assert str(measured) not in json.dumps(result)
    assert result["step"] <= result["steps"] == 8
    assert result["peak_memory"]["process"] > 2**20
    assert result["environment"]["versions"]["torch"]
    assert result["environment"]["threads"] == 1
    assert set(result["code"]["parts"]) >= {"losses", "training", "data"}
    assert len(result["encoder"]) >= 12
    trial = read_row(place_in(measured), "triplet").trials[0, 0]
    assert trial["steps"] == 4, "half of the schedule"
    assert "encoder" not in trial


def test_nothing_is_left_of_tuning_but_its_result_files(measured: Path) -> None:
    kept = {p.name.split("-")[0] for p in (measured / "work" / "mini" / "triplet").iterdir()}
    assert kept == {"seed"}


def test_a_finished_suite_does_nothing_again(measured: Path, shapes: Path) -> None:
    files = {p: p.stat().st_mtime_ns for p in (measured / "results").rglob("*.json")}
    told: list[Event] = []
    work(order_in(measured, shapes), told.append)
    assert told == []
    assert {p: p.stat().st_mtime_ns for p in (measured / "results").rglob("*.json")} == files


def test_a_cut_file_is_measured_again_and_gives_the_same(copied: Path, shapes: Path) -> None:
    path = place_in(copied).file("contrastive", "seed-0")
    before = json.loads(path.read_text())
    path.write_text(path.read_text()[:200])
    assert read_result(path) is None
    work(order_in(copied, shapes, ("contrastive",)), quiet)
    after = json.loads(path.read_text())
    assert after["figures"] == before["figures"]
    assert after["recipe_digest"] == before["recipe_digest"]


def test_rows_begin_with_one_trunk_trained_on_classes_that_they_never_see(
    shapes: Path, tmp_path: Path
) -> None:
    pretrain = "[pretrain]\nclasses = 4\nrecipe.train = { epochs = 2, classes_per_batch = 2 }\n"
    suite = load_suite(write_suite(tmp_path, MINI.replace("[base.data]", f"{pretrain}[base.data]", 1)))
    order, place = order_in(tmp_path, shapes, ("triplet", "contrastive")), place_in(tmp_path)
    board = run_suite(order, suite, jobs=2, say=quiet, show=quiet)
    assert board.failures == []
    [trunk] = (tmp_path / "work" / "mini").glob("trunk-*/encoder")
    fingerprint = json.loads((trunk / "manifest.json").read_text())["fingerprint"]
    results = [r for row in order.rows for r in read_row(place, row).all()]
    assert {r["trunk"] for r in results} == {fingerprint}
    assert {r["recipe"]["model"]["weights"] for r in results} == {""}, "a path of this machine"

    folds = Folds.from_json((place.results / "folds.json").read_text(), "folds")
    assert len(folds.pretrain) == 4
    listed = {p: p.read_text() for p in (tmp_path / "work" / "mini").rglob("*.csv") if p.stem != "bad_images"}
    pretrained = [text for path, text in listed.items() if path.stem.startswith("trunk-")]
    fine_tuned = [text for path, text in listed.items() if path.stem.startswith("fold-")]
    assert len(pretrained) == 1
    assert len(fine_tuned) == 2
    for name in folds.pretrain:
        assert f"/{name}/" in pretrained[0]
        assert not any(f"/{name}/" in text for text in fine_tuned)
    for name in (name for part in folds.parts for name in part):
        assert f"/{name}/" not in pretrained[0]
        assert all(f"/{name}/" in text for text in fine_tuned)

    found = replay(order, place, "triplet", 1, tell=quiet)
    assert found.is_equal, "the replay begins with the same trunk"
    path = place.file("triplet", "seed-0")
    write_result(path, json.loads(path.read_text()) | {"trunk": "0" * 64})
    with pytest.raises(ConfigError, match="began with the trunk 000000000000"):
        work(order, quiet)
    with pytest.raises(ConfigError, match="cannot stand in one table: trunk"):
        make_table(suite, place)


def test_a_pretrained_trunk_must_fit_the_rows_and_the_classes(shapes: Path, tmp_path: Path) -> None:
    other = "[pretrain]\nclasses = 4\nrecipe.model = { trunk_args = { widths = [4], blocks = [1] } }\n"
    with pytest.raises(ConfigError, match=r"pretrain: model.trunk_args is .* and that of the rows"):
        load_suite(write_suite(tmp_path, MINI.replace("[base.data]", f"{other}[base.data]", 1)))
    many = MINI.replace("[base.data]", "[pretrain]\nclasses = 6\n[base.data]", 1)
    suite = load_suite(write_suite(tmp_path, many))
    with pytest.raises(DataError, match="2 folds need at least 4 training classes besides the 6"):
        open_pictures(suite, str(shapes), tmp_path)


def test_a_killed_benchmark_goes_on_and_loses_nothing(shapes: Path, measured: Path, tmp_path: Path) -> None:
    write_suite(tmp_path)
    command = [sys.executable, "-m", "dml.cli.main", "bench", "run", "mini.toml", "--data", str(shapes)]
    command += ["--rows", "triplet", "--results", "results", "--work", "work"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    files: list[Path] = []
    until = time.monotonic() + 120
    while len(files) < 2 and time.monotonic() < until and first.poll() is None:
        files = list((tmp_path / "results").rglob("trial-*.json"))
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert len(files) >= 2
    kept = {path: path.read_text() for path in files}
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert all(path.read_text() == text for path, text in kept.items())
    whole, again = read_row(place_in(measured), "triplet"), read_row(place_in(tmp_path), "triplet")
    assert {k: r["parameters"] for k, r in again.trials.items()} == {
        k: r["parameters"] for k, r in whole.trials.items()
    }
    assert [again.seeds[s]["figures"] for s in (0, 1)] == [whole.seeds[s]["figures"] for s in (0, 1)]


def test_ctrl_c_ends_with_130_and_leaves_no_worker(shapes: Path, tmp_path: Path) -> None:
    write_suite(tmp_path, MINI.replace("epochs = 4", "epochs = 4000"))
    command = [sys.executable, "-m", "dml.cli.main", "bench", "run", "mini.toml", "--data", str(shapes)]
    command += ["--rows", "contrastive", "--results", "results", "--work", "work", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,  # a test run in the background ignores Ctrl-C, and so would whatever it starts
    )
    until = time.monotonic() + 120
    logs: list[Path] = []
    while len(logs) < 2 and time.monotonic() < until and running.poll() is None:
        logs = list((tmp_path / "work").rglob("metrics.jsonl"))
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "the same command goes on" in said
    with locked(place_in(tmp_path), "contrastive.seed-0") as free:
        assert free, "no worker holds its run any more"


def test_two_processes_never_do_the_same_run(measured: Path) -> None:
    place = place_in(measured)
    with locked(place, "triplet.seed-0") as first:
        assert first
        with locked(place, "triplet.seed-0") as second, locked(place, "triplet.seed-1") as other:
            assert not second
            assert other
    assert (place.results / ".locks" / ".gitignore").read_text() == "*\n"


def test_a_row_that_cannot_run_is_reported_and_the_others_go_on(shapes: Path, tmp_path: Path) -> None:
    write_suite(tmp_path, MINI.replace('"contrastive", args = { measure', '"contrastive", args = { measures'))
    told: list[Event] = []
    work(order_in(tmp_path, shapes, ("contrastive", "pixels")), told.append)
    [failed] = [event for event in told if event.kind == "failed"]
    assert 'Did you mean "measure"' in failed.text
    assert sorted(read_row(place_in(tmp_path), "pixels").seeds) == [0, 1]


def test_results_of_other_settings_are_refused(copied: Path, shapes: Path) -> None:
    write_suite(copied, MINI.replace("dim = 8", "dim = 16"))
    with pytest.raises(ConfigError, match=r"base.model.dim: 8 → 16"):
        work(order_in(copied, shapes), quiet)
    with pytest.raises(ConfigError, match=r"base.model.dim: 8 → 16"):
        make_table(load_suite(copied / "mini.toml"), place_in(copied))
    write_suite(copied, MINI.replace("margin = 0.1", "margin = 0.2"))
    with pytest.raises(ConfigError, match="The row triplet was changed"):
        work(order_in(copied, shapes), quiet)


def test_a_replay_is_equal_to_the_last_digit(measured: Path, shapes: Path) -> None:
    files = sorted(p for p in (measured / "results").rglob("*.json"))
    found = replay(order_in(measured, shapes), place_in(measured), "triplet", 1, tell=quiet)
    assert found.is_equal, found.describe()
    assert "equal to the last digit" in found.describe()
    assert sorted(p for p in (measured / "results").rglob("*.json")) == files, "nothing is recorded"
    assert not list((measured / "work" / "mini").glob("replay-*"))
    with pytest.raises(ConfigError, match="no result of triplet with seed 7"):
        replay(order_in(measured, shapes), place_in(measured), "triplet", 7, tell=quiet)


# Statistics


def test_the_interval_is_students() -> None:
    # t with 4 degrees of freedom at 97.5 %: 2.776445; s of 1..5: sqrt(2.5).
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.count) == (3.0, 5)
    assert found.low == pytest.approx(3 - half, rel=1e-6)
    assert found.high == pytest.approx(3 + half, rel=1e-6)
    assert interval([2.0]).low is None


def test_the_paired_test_is_corrected_for_overlapping_training_sets() -> None:
    # Differences 1, 2, 3: mean 2, variance 1; three folds: validation is half as large as training.
    found = paired([1.0, 2.0, 3.0], share=0.5)
    error = math.sqrt(1 * (1 / 3 + 0.5))
    assert found.difference == 2
    assert found.low == pytest.approx(2 - 4.3026527 * error, rel=1e-6)
    # P(|T_2| >= t) = 1 - t / sqrt(2 + t²) for two degrees of freedom.
    t = 2 / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    plain = paired([1.0, 2.0, 3.0], share=0.0)
    assert plain.p is not None
    assert plain.p < found.p, "without the correction the test claims more"
    assert paired([0.0, 0.0], share=0.5).p == 1
    assert paired([1.0], share=0.5).p is None


def test_p_values_are_adjusted_step_down() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


# Tables


def test_a_table_pairs_equal_seeds_and_says_what_is_unfinished(copied: Path) -> None:
    suite, place = load_suite(copied / "mini.toml"), place_in(copied)
    table = make_table(suite, place)
    lines = {line.row: line for line in table.lines}
    base, own = read_row(place, "triplet").seeds, read_row(place, "contrastive").seeds
    differences = [own[s]["figures"]["map_at_r"] - base[s]["figures"]["map_at_r"] for s in (0, 1)]
    assert lines["contrastive"].difference["map_at_r"] == paired(differences, share=1.0)
    assert lines["contrastive"].p is not None
    assert lines["triplet"].difference == {}
    assert lines["triplet"].tuning_runs == len(read_row(place, "triplet").trials)
    assert lines["triplet"].parameters == base[0]["parameters"]
    place.file("contrastive", "seed-0").unlink()
    [line] = make_table(suite, place, ["contrastive"]).lines
    assert (line.seeds, line.wanted) == (1, 2)
    assert json.dumps(table.as_json())


def test_rows_measured_with_other_defaults_are_not_put_together(copied: Path) -> None:
    suite, place = load_suite(copied / "mini.toml"), place_in(copied)
    for seed in (0, 1):
        path = place.file("contrastive", f"seed-{seed}")
        result = json.loads(path.read_text())
        result["recipe"]["train"]["weight_decay"] = 0.5
        path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"contrastive cannot stand in one table.*weight_decay"):
        make_table(suite, place)


def test_a_table_says_which_code_differs(copied: Path) -> None:
    suite, place = load_suite(copied / "mini.toml"), place_in(copied)

    def notes() -> list[str]:
        return [note for note in make_table(suite, place).notes if "of the code" in note]

    assert notes() == []
    path = place.file("contrastive", "seed-0")
    result = json.loads(path.read_text())
    result["code"]["all"] = "0" * 12
    result["code"]["parts"]["losses"] = "0" * 12
    write_result(path, result)
    [note] = notes()
    assert note.startswith("2 versions of the code")
    assert note.endswith("dml/losses")


def test_the_plot_shows_every_measured_row_and_is_the_same_again(measured: Path) -> None:
    from xml.etree import ElementTree

    table = make_table(load_suite(measured / "mini.toml"), place_in(measured))
    drawn = plot(table)
    assert drawn == plot(table)
    tree = ElementTree.fromstring(drawn)
    texts = {element.text for element in tree.iter() if element.tag.endswith("text")}
    assert {"grey values", "Triplet", "Contrastive"} <= texts
    assert "prefers-color-scheme: dark" in drawn


def test_the_page_of_benchmarks_is_what_the_result_files_give(tmp_path: Path) -> None:
    """Of the committed result files: runs that go on meanwhile do not count."""
    listed = subprocess.run(["git", "ls-files", "eval/results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        files = [path for path in (ROOT / "eval" / "results").rglob("*") if path.is_file()]
    else:
        files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for path in files:
        copy = tmp_path / path.relative_to(ROOT / "eval")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    written = write_page(tmp_path / "docs" / "benchmarks.md", tmp_path / "results")
    for path in written:
        committed = ROOT / "docs" / path.relative_to(tmp_path / "docs")
        assert path.read_text() == committed.read_text(), f"{committed.name} is old: make benchmarks"


def test_a_setting_at_the_edge_of_its_range_is_noted(copied: Path) -> None:
    suite, place = load_suite(copied / "mini.toml"), place_in(copied)
    for number in range(suite.protocol.trials):
        for fold in range(2):
            path = place.file("triplet", f"trial-{number:02d}-fold-{fold}")
            if path.is_file():
                result = json.loads(path.read_text())
                result["parameters"]["loss.args.margin"] = 0.499
                write_result(path, result)
    [note] = [note for note in make_table(suite, place).notes if "edge" in note]
    assert "triplet (loss.args.margin = 0.499)" in note


# Claims


def look_in(folder: Path, shapes: Path, *rows: str) -> list[str]:
    order = order_in(folder, shapes, rows)
    return look(order, place_in(folder), named=bool(rows), say=quiet, tell=quiet)


def frozen_and_committed(folder: Path, *rows: str) -> None:
    freeze(load_suite(folder / "mini.toml"), place_in(folder), rows, quiet)
    commit(folder)


def test_a_frozen_recipe_is_the_best_one_and_can_be_trained(copied: Path) -> None:
    suite, place = load_suite(copied / "mini.toml"), place_in(copied)
    [path] = freeze(suite, place, ["triplet"], quiet)
    assert path == copied / "frozen" / "mini" / "triplet.toml"
    now = standing(suite, "triplet", read_row(place, "triplet"))
    assert recipe_tree(load_recipe(path)) == recipe_tree(suite.recipe("triplet", now.best))
    assert freeze(suite, place, ["triplet"], quiet) == [], "nothing changed, nothing written"


def test_an_unfinished_row_cannot_be_frozen(copied: Path) -> None:
    place_in(copied).file("triplet", "seed-1").unlink()
    with pytest.raises(UsageError, match=r"triplet \(1 of 2 seeds\)"):
        freeze(load_suite(copied / "mini.toml"), place_in(copied), ["triplet", "pixels"], quiet)


def test_a_look_is_made_once_and_recorded(copied: Path, shapes: Path) -> None:
    frozen_and_committed(copied, "triplet", "pixels")
    assert look_in(copied, shapes) == ["pixels", "triplet"]
    place = place_in(copied)
    lines = [json.loads(line) for line in place.looks.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["pixels", "triplet"]
    assert {line["commit"] for line in lines} == {git(copied, "rev-parse", "HEAD")}
    finals = read_row(place, "triplet").finals
    assert sorted(finals) == [0, 1]
    assert finals[0]["retrained"] is False
    assert finals[0]["encoder"] == read_row(place, "triplet").seeds[0]["encoder"]
    commit(copied)
    with pytest.raises(UsageError, match="A second look would be choosing by the test classes"):
        look_in(copied, shapes, "triplet")
    with pytest.raises(UsageError, match="waits for its look"):
        look_in(copied, shapes)
    [line] = make_table(load_suite(copied / "mini.toml"), place, ["triplet"]).lines
    assert line.looks == 1
    assert line.test["map_at_r"].count == 2


def test_an_interrupted_look_goes_on_and_counts_once(copied: Path, shapes: Path) -> None:
    frozen_and_committed(copied, "triplet")
    look_in(copied, shapes, "triplet")
    place = place_in(copied)
    first = json.loads(place.file("triplet", "final-1").read_text())
    place.file("triplet", "final-1").unlink()
    assert look_in(copied, shapes, "triplet") == ["triplet"], "files of the look itself do not make it dirty"
    assert json.loads(place.file("triplet", "final-1").read_text())["figures"] == first["figures"]
    assert len(place.looks.read_text().splitlines()) == 1


def test_a_lost_encoder_is_trained_again(copied: Path, shapes: Path) -> None:
    frozen_and_committed(copied, "contrastive")
    [lost] = (copied / "work" / "mini" / "contrastive").glob("seed-0-*")
    shutil.rmtree(lost)
    look_in(copied, shapes, "contrastive")
    final = read_row(place_in(copied), "contrastive").finals[0]
    recorded = read_row(place_in(copied), "contrastive").seeds[0]
    assert final["retrained"] is True
    assert final["validation_map_at_r"] == recorded["figures"]["map_at_r"]


def test_a_dirty_tree_is_refused(copied: Path, shapes: Path) -> None:
    frozen_and_committed(copied, "triplet")
    (copied / "note.txt").write_text("later")
    with pytest.raises(UsageError, match=r"not clean: note.txt"):
        look_in(copied, shapes, "triplet")
    assert not place_in(copied).looks.exists()


def test_a_look_needs_a_committed_frozen_recipe_that_fits_the_results(copied: Path, shapes: Path) -> None:
    with pytest.raises(UsageError, match="has no frozen recipe"):
        look_in(copied, shapes, "triplet")
    (copied / ".gitignore").write_text("work/\nfrozen/\n")
    frozen_and_committed(copied, "triplet")
    with pytest.raises(UsageError, match="is not committed"):
        look_in(copied, shapes, "triplet")
    (copied / ".gitignore").write_text("work/\n")
    path = copied / "frozen" / "mini" / "triplet.toml"
    path.write_text(path.read_text().replace("margin = 0.1", "margin = 0.4"))
    path.write_text(path.read_text() + "\n")
    text = path.read_text()
    path.write_text(text.replace("weight_decay = 0.0001", "weight_decay = 0.1"))
    commit(copied)
    with pytest.raises(UsageError, match="no longer what the results"):
        look_in(copied, shapes, "triplet")
    assert not place_in(copied).looks.exists()


def test_outside_of_a_repository_there_is_no_look(measured: Path, shapes: Path) -> None:
    with pytest.raises(UsageError, match="not in a git repository"):
        look_in(measured, shapes, "triplet")
