"""Choosing an index to a promise: queries apart, an honest bound, the cheapest that holds, what is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from dml.collection import NewItem, create_collection, open_collection
from dml.errors import ConfigError, UsageError
from dml.index import make_index
from dml.index.tune import (
    DEPTH,
    FEWEST_QUERIES,
    Asked,
    Plan,
    Point,
    Promise,
    Trial,
    asked_of,
    choose,
    find_effort,
    in_bytes,
    lower_bound,
    plans,
    ranked,
    recalls,
    short_of,
    split,
    with_front,
)

pytest.importorskip("faiss")

DIM = 16
FLAT = Plan("flat", "faiss_flat", {})
HALF = Plan("half", "faiss_flat", {"precision": "float16"})
GRAPH = Plan("graph", "hnsw", {"links": 8}, (1, 512), growth=0.15)
NEVER = Plan("never", "hnsw", {"links": 2, "build_effort": 1}, (1, 1))


def unit(seed, count, dim=DIM, clusters=60):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((clusters, dim))
    rows = centres[rng.integers(0, clusters, count)] + 0.8 * rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return unit(0, 3000)


def test_queries_and_rows_are_apart_and_copies_are_no_queries(vectors):
    doubled = np.concatenate([vectors, vectors[:1500]])
    rows, tuning, scoring = split(doubled, seed=1)
    there = {row.tobytes() for row in doubled[rows]}
    asked = [row.tobytes() for row in np.concatenate([tuning.queries, scoring.queries])]
    assert not there & set(asked)
    assert len(rows) == 4500 - 2 * 450
    assert 100 < len(tuning.queries) < 450  # half of the vectors have a copy
    first, second = ({row.tobytes() for row in one.queries} for one in (tuning, scoring))
    assert len(first & second) < 60  # a copy of a query may be in the other set


def test_true_neighbours_are_those_of_brute_force_in_blocks(vectors):
    queries, ids = vectors[:20], np.arange(3000) * 3
    blocks = [(ids[start : start + 700], vectors[start : start + 700]) for start in range(0, 3000, 700)]
    asked = asked_of(queries, blocks)
    exact = make_index("flat", DIM)
    exact.add(ids, vectors)
    hits = exact.search(queries, DEPTH)
    assert (asked.true_ids == hits.ids).all()
    assert (asked.true_scores == hits.scores).all()


def test_recall_counts_true_neighbours_and_equals_of_the_tenth():
    scores = np.linspace(1, 0.5, DEPTH, dtype=np.float32)
    scores[9:12] = scores[9]
    asked = Asked(np.zeros((1, DIM), np.float32), np.arange(DEPTH)[None], scores[None])
    for found, recall in [
        (list(range(10)), 1.0),
        ([*range(9), 11], 1.0),  # as near as the tenth
        ([*range(9), 12], 0.9),
        ([99] * 10, 0.0),
        ([*range(5), *[-1] * 5], 0.5),
    ]:
        assert recalls(asked, np.array([found])).tolist() == [recall]


def test_fewer_vectors_than_neighbours_are_all_wanted(vectors):
    asked = asked_of(vectors[:2], [(np.arange(4), vectors[10:14])])
    assert recalls(asked, np.array([[0, 1, 2, 3], [0, 1, -1, -1]])).tolist() == [1.0, 0.5]


def test_the_bound_lies_below_the_mean_and_nears_it_with_more_queries(scale):
    rng = np.random.default_rng(2)
    right = 0
    for _ in range(200 * scale):
        sample = rng.binomial(10, 0.95, 200) / 10
        bound = lower_bound(sample)
        assert bound < sample.mean()
        right += bound <= 0.95
    assert right / (200 * scale) >= 0.92  # 95 % when counted long enough
    assert lower_bound(np.ones(1000)) < 1
    assert lower_bound(np.ones(10_000)) > lower_bound(np.ones(1000)) > lower_bound(np.ones(100))


def test_the_least_effort_that_will_do_is_found(vectors):
    index = make_index("hnsw", DIM, device="cpu", links=8)
    index.add(np.arange(2500), vectors[:2500])
    asked = asked_of(vectors[2500:], [(np.arange(2500), vectors[:2500])])
    effort, curve = find_effort(index, asked, target=0.98, efforts=(1, 512))
    assert effort is not None
    assert 1 < effort < 512
    efforts = [point.effort for point in curve]
    assert efforts == sorted(set(efforts))
    reached = {point.effort: point.lower for point in curve}
    assert reached[effort] >= 0.98
    below = [point for point in curve if point.effort < effort]
    assert below
    assert effort <= below[-1].effort * 1.1 + 1
    assert find_effort(index, asked, target=1.0, efforts=(1, 4))[0] is None


def test_an_effort_that_finds_nothing_more_is_not_raised_further(vectors):
    index = make_index("pq", DIM, device="cpu", pieces=4, precision="int8")
    index.add(np.arange(2500), vectors[:2500])
    asked = asked_of(vectors[2500:], [(np.arange(2500), vectors[:2500])])
    effort, curve = find_effort(index, asked, target=0.9999, efforts=(1, 1 << 20))
    assert effort is None
    assert curve[-1].effort < 1 << 12


def test_who_falls_short_says_by_how_much_and_why():
    certain = [Point(4, 0.9, 0.88, 0.001), Point(8, 1.0, 0.974, 0.002)]
    said = short_of(certain, 0.98, queries=100, slow=False)
    assert said.startswith("recall 1.0000 at most, surely (99.9 %) only 0.9")
    assert said.endswith("by 100 queries: more items would make it surer")
    exactly = Point(8, 1.0, lower_bound(np.ones(100)), 0.002)
    assert f"only {lower_bound(np.ones(100), 3.09):.4f} by" in short_of(
        [exactly], 0.98, queries=100, slow=False
    )
    assert short_of(certain, 1.0, queries=100, slow=True).startswith("recall 1.0000 at most")
    poor = [Point(4, 0.5, 0.48, 0.001), Point(8, 0.7, 0.68, 0.002)]
    assert short_of(poor, 0.9, queries=1000, slow=True).endswith("queries: more effort takes too long")
    assert short_of(poor, 0.9, queries=1000, slow=False).endswith("by 1,000 queries")


def test_bytes_are_told_in_the_unit_that_shows_them():
    told = [in_bytes(count) for count in (7, 1000, 1500, 20_000_000, 4 * 10**9)]
    assert told == ["7 bytes", "1 KB", "1.5 KB", "20 MB", "4 GB"]


def test_the_cheapest_that_holds_is_chosen_and_the_table_says_why(vectors):
    lines = []
    choice = choose(vectors, Promise(0.9), plans_to_try=[FLAT, HALF, GRAPH, NEVER], say=lines.append)
    assert lines == ["flat", "half", "graph", "never"]
    json.dumps(choice.table)
    trials = {trial["name"]: trial for trial in choice.table["trials"]}
    assert choice.table["queries"] == {"tuning": 300, "scoring": 300}
    assert trials["never"]["problem"].startswith("recall 0.")
    assert trials["flat"]["point"]["recall"] == 1.0
    assert trials["graph"]["point"]["lower"] >= 0.9
    assert trials["graph"]["options"]["effort"] == trials["graph"]["point"]["effort"]
    assert [trial.name for trial in choice.ranking if trial.name == "never"] == []
    assert choice.table["chosen"] == choice.ranking[0].name
    front = {name for name, trial in trials.items() if trial["on_front"]}
    assert front
    assert "never" not in front


def test_limits_of_memory_and_latency_are_kept(vectors):
    whole, half = 3000 * (4 * DIM + 9), 3000 * (2 * DIM + 9)
    choice = choose(vectors, Promise(0.9, memory=(whole + half) // 2), count=3000, plans_to_try=[FLAT, HALF])
    assert choice.options == {"precision": "float16"}
    assert "KB, more than" in choice.table["trials"][0]["problem"]
    with pytest.raises(
        ConfigError, match=r"(?s)No kind of index promises.*0.001 ms a query.*flat: .* ms a query"
    ):
        choose(vectors, Promise(0.9, latency=1e-6), plans_to_try=[FLAT])


def test_with_too_few_queries_only_exact_search_is_promised(vectors):
    few = vectors[: 10 * FEWEST_QUERIES - 10]
    choice = choose(few, Promise(0.5), plans_to_try=[GRAPH, FLAT])
    assert choice.kind == "faiss_flat"
    assert "too few queries" in choice.table["trials"][0]["problem"]
    with pytest.raises(ConfigError, match="too few queries"):
        choose(few, Promise(0.5), plans_to_try=[GRAPH])


def test_a_recall_of_one_means_exact_search(vectors):
    assert choose(vectors, Promise(1.0), plans_to_try=[GRAPH, HALF, FLAT]).options == {}


@pytest.mark.parametrize("wrong", [{"recall": 0}, {"recall": 1.1}, {"recall": 0.9, "memory": 0}])
def test_promises_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        Promise(**wrong)


def trial(name, latency, memory, recall=0.99, problem=""):
    point = Point(1, recall, recall, latency)
    return Trial(name, "flat", {}, point, [], memory, 0.0, latency, problem)


def test_ranking_is_by_latency_then_memory_and_the_front_is_not_beaten():
    trials = [
        trial("slow and small", 2e-3, 10),
        trial("quick and large", 1e-3, 100),
        trial("as quick, smaller", 1.001e-3, 50),
        trial("beaten", 3e-3, 200),
        trial("refused", 1e-4, 1, problem="no"),
        replace(trial("not tried", 0, 0), point=None, problem="no"),
    ]
    assert [one.name for one in ranked(trials)][:3] == [
        "as quick, smaller",
        "quick and large",
        "slow and small",
    ]
    marked = {one.name: one.on_front for one in with_front(trials)}
    assert marked["refused"]
    assert not marked["beaten"]
    assert not marked["not tried"]


def test_every_plan_can_be_made():
    for plan in plans(10**6, DIM):
        index = make_index(plan.kind, DIM, device="cpu", **plan.options)
        assert plan.efforts == (1, 1) or "effort" in index.describe()


@pytest.fixture
def promised(tmp_path, vectors, monkeypatch):
    """A collection of 2,000 items with an index chosen for recall 0.9 of two kinds."""
    monkeypatch.setattr("dml.index.tune.plans", lambda count, dim: [GRAPH, FLAT])
    path = tmp_path / "promised"
    with create_collection(path, dim=DIM, fingerprint="f" * 64) as there:
        there.add([NewItem(f"{row}", vector) for row, vector in enumerate(vectors[:2000])])
        there.build_index(promise=Promise(0.9))
    return path


class TestCollection:
    def test_keeps_the_promise_and_says_what_was_measured(self, promised):
        with open_collection(promised, read_only=True) as there:
            about = there.info()
        built = about.manifest["built"]
        assert built["promise"]["holds"]
        assert built["promise"]["recall"] == 0.9
        assert built["promise"]["measured"]["lower"] >= 0.9
        assert built["measured"]["queries"] == built["promise"]["measured"]["queries"] > 150
        assert {trial["name"] for trial in built["tuning"]["trials"]} == {"graph", "flat"}
        assert about.manifest["index"]["promise"]["recall"] == 0.9
        assert about.index["kind"] == about.manifest["index"]["kind"] == built["kind"]

    def test_is_measured_again_after_a_merge(self, promised, vectors):
        with open_collection(promised, merge="manual") as there:
            there.add([NewItem(f"new {row}", vector) for row, vector in enumerate(vectors[2000:])])
            built = there.merge()
            assert built["count"] == 3000
            assert built["promise"]["holds"]
            assert "tuning" in built
            assert there.search(vectors[2500:2501], limit=1)[0].hits[0].id == "new 500"

    def test_says_so_when_the_promise_does_not_hold_any_more(self, promised, vectors, monkeypatch):
        monkeypatch.setattr("dml.collection.promised.broken", lambda *_: "finds 0.5 instead of 0.9")
        with open_collection(promised, merge="manual") as there:
            there.add([NewItem(f"new {row}", vector) for row, vector in enumerate(vectors[2000:])])
            assert there.merge()["promise"]["holds"] is False
        done = CliRunner().invoke(cli(), ["info", str(promised)])
        assert "does NOT hold" in " ".join(done.output.split())

    def test_a_rebuild_without_words_keeps_the_promise(self, promised):
        with open_collection(promised, merge="manual") as there:
            assert there.build_index()["promise"]["recall"] == 0.9
            assert "promise" not in there.build_index("faiss_flat")
            assert "promise" not in there.manifest.index
            with pytest.raises(ConfigError, match='"hnsw" was given too'):
                there.build_index("hnsw", promise=Promise(0.9))


def cli():
    from dml.cli.index import app

    return app


class TestCommands:
    def test_rebuild_tuning_and_plot(self, promised, tmp_path):
        pytest.importorskip("matplotlib")
        run = CliRunner().invoke
        done = run(cli(), ["rebuild", str(promised), "--target-recall", "0.8", "--memory", "1G", "--json"])
        assert done.exit_code == 0, done.output
        assert '"memory": 1000000000' in done.output
        svg = tmp_path / "deep" / "tuning.svg"
        shown = run(cli(), ["tuning", str(promised), "--plot", str(svg)])
        assert shown.exit_code == 0, shown.output
        assert "promised 0.8" in shown.output
        assert "it holds" in shown.output
        assert "* " in shown.output
        assert svg.read_text().count("<path") > 5
        info = run(cli(), ["info", str(promised)])
        assert "promised 0.8" in info.output

    def test_a_kind_that_is_asked_for_gives_the_promise_up_aloud(self, promised):
        done = CliRunner().invoke(cli(), ["rebuild", str(promised), "--index", "faiss_flat"])
        assert done.exit_code == 0, done.output
        assert "the promise of recall 0.9 is given up" in done.stderr
        assert "--target-recall 0.9" in done.stderr
        again = CliRunner().invoke(cli(), ["rebuild", str(promised), "--index", "faiss_flat"])
        assert "given up" not in again.stderr

    def test_without_a_promise_there_is_nothing_to_show(self, promised):
        with open_collection(promised) as there:
            there.build_index("faiss_flat")
        done = CliRunner().invoke(cli(), ["tuning", str(promised)])
        assert isinstance(done.exception, UsageError)
        assert "--target-recall" in str(done.exception)

    @pytest.mark.parametrize(
        ("memory", "latency", "expected"),
        [("4G", "5ms", (4e9, 0.005)), ("500MB", "800us", (5e8, 0.0008)), ("1.5g", "2s", (1.5e9, 2.0))],
    )
    def test_quantities_are_read(self, memory, latency, expected):
        from dml.cli.promises import read_promise

        promise = read_promise(0.9, memory, latency)
        assert (promise.memory, promise.latency) == pytest.approx(expected)

    @pytest.mark.parametrize(("memory", "latency"), [("4X", None), ("G", None), (None, "5"), (None, "-5ms")])
    def test_what_is_no_quantity_is_refused(self, memory, latency):
        from dml.cli.promises import read_promise

        with pytest.raises(UsageError, match="wants a quantity"):
            read_promise(0.9, memory, latency)
        with pytest.raises(UsageError, match="give that too"):
            read_promise(None, memory, latency)
