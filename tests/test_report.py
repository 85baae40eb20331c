"""The report: everything in one file, true to the figures, and sound in a real browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dml.data.table import Record
from dml.metrics import retrieval_metrics
from eval.curves import History, read_history, smoothed, training_curves
from eval.embedding_map import HEIGHT, WIDTH, class_colours, place, thumbnails_on
from eval.evaluate import Evaluation, Selection, measure
from eval.report import distribution, headline, render, write_report
from eval.served import Stage, StageTable

CHROMIUM = next(
    (
        p
        for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
        if Path(p).exists()
    ),
    None,
)


@pytest.fixture(scope="module")
def evaluation(tiny_folder) -> Evaluation:
    """Real pictures with vectors that put most of them near their class, and one far away."""
    rng = np.random.default_rng(0)
    records = tuple(Record(p, p.parent.name) for p in sorted(tiny_folder.rglob("*.jpg")))
    labels = [r.label for r in records]
    centres = {label: rng.normal(size=16) for label in sorted(set(labels))}
    vectors = np.stack([centres[label] + 0.9 * rng.normal(size=16) for label in labels]).astype(np.float32)
    vectors[0] = -vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    selection = Selection("<b>shop & co</b>", "test", "open-set", records, None, digest="ab" * 32)
    about = {"fingerprint": "0123456789abcdef", "dim": 16, "runtime": "onnx"}
    return measure(selection, (records, vectors), (records, vectors), encoder=about)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder as training leaves it behind."""
    folder = tmp_path_factory.mktemp("runs") / "first run"
    folder.mkdir()
    lines = [{"step": s, "epoch": s // 10, "loss": 1 / s, "learning_rate": 1e-3} for s in range(1, 41)]
    lines += [
        {"step": s, "epoch": s // 10, "validation": {"map_at_r": m, "recall_at_1": m + 0.2}}
        for s, m in ((10, 0.2), (20, 0.45), (30, 0.61), (40, 0.58))
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 41, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "recipe.toml").write_text('[loss]\nname = "multi_similarity"\n')
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "gpu": None, "versions": {"torch": "2"}})
    )
    return folder


STAGES = StageTable(
    "shop",
    48,
    8,
    "hnsw",
    [
        Stage("exact", {1: 0.9, 8: 1.0}, 1.0, None, 40),
        Stage("index", {1: 0.89, 8: 0.99}, 0.97, 0.05, 40),
        Stage("service", {1: 0.89, 8: 0.99}, 0.97, 1.2, 40),
    ],
)


@pytest.fixture(scope="module")
def page(evaluation, run) -> str:
    return render(evaluation, run=run, stages=STAGES)


def test_it_shows_every_figure_with_its_interval(page, evaluation):
    for figure in headline(evaluation):
        assert f">{figure.value:.3f}<" in page
        if figure.low is not None:
            assert f"{figure.low:.3f} – {figure.high:.3f}" in page
    assert [f.title for f in headline(evaluation)[:3]] == ["Recall@1", "MAP@R", "R-Precision"]


def test_it_says_the_protocol_and_the_counts(page):
    assert "none of these classes was seen in training" in page
    assert "<b>48</b> pictures" in page
    assert "<b>6</b> classes" in page
    assert "resamples of\nwhole classes" in page


def test_names_are_text_and_never_markup(page):
    assert "<b>shop" not in page
    assert "&lt;b&gt;shop &amp; co" in page


def test_it_refers_to_nothing_outside_itself(page):
    links = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links), [
        x for x in links if not x.startswith(("data:", "#"))
    ]
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)


def test_each_neighbour_is_marked_by_its_class(page, evaluation):
    row = evaluation.ranking()[:1]
    found = evaluation.neighbours(row, 10)
    label = evaluation.query[row[0]].label
    expected = [evaluation.gallery[p].label == label for p in found.positions[0]]
    first = page[page.index('id="worst"') :].split('class="query"')[1]
    marks = re.findall(r'<figure class="(right|wrong)">', first)
    assert [mark == "right" for mark in marks] == expected
    assert 0 not in found.positions[0] or row[0] != 0  # the worst query is the vector that points away
    assert row[0] == 0


def test_stages_and_their_losses_are_told(page):
    assert "Index: you lose 1.0 points of Recall@1." in page
    assert "Service: you lose 0.0 points of Recall@1." in page


def test_recipe_and_environment_are_shown(page):
    assert "multi_similarity" in page
    assert "versions torch" in page


def test_without_a_run_there_is_no_training_section(evaluation):
    bare = render(evaluation)
    assert 'id="training"' not in bare
    assert 'id="stages"' not in bare
    assert 'id="map"' in bare


def test_a_final_model_says_whose_figures_are_honest(evaluation, run):
    (run / "encoder").mkdir()
    (run / "encoder" / "manifest.json").write_text(json.dumps({"provenance": {"trained_on": "all classes"}}))
    try:
        assert "trained on all classes of its data" in render(evaluation, run=run)
    finally:
        (run / "encoder" / "manifest.json").unlink()
        (run / "encoder").rmdir()


def test_a_picture_that_is_gone_does_not_stop_the_report(evaluation, tmp_path):
    records = (Record(tmp_path / "gone.jpg", "a"), *evaluation.query[1:9])
    vectors = evaluation.query_vectors[:9]
    selection = Selection("gone", "all", "untrained", records, None)
    page = render(measure(selection, (records, vectors), (records, vectors)))
    assert "data:image/jpeg" in page


def test_it_cannot_be_written_where_a_file_stands_in_the_way(evaluation, tmp_path):
    from dml.errors import StorageError

    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(evaluation, tmp_path / "taken" / "report.html")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_it_is_quiet_complete_and_follows_the_scheme(page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    said, asked = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        backgrounds = {}
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(file.as_uri())
            backgrounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            broken = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
            assert broken == 0
            assert tab.locator(".map .thumbs").is_visible()
            tab.get_by_label("show pictures").uncheck()
            assert not tab.locator(".map .thumbs").is_visible()
            tab.set_viewport_size({"width": 390, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert backgrounds["light"] != backgrounds["dark"]
    assert said == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}


class TestCurves:
    def test_a_log_cut_short_by_a_kill_is_read_up_to_there(self, run):
        history = read_history(run / "metrics.jsonl")
        assert history.steps == list(range(1, 41))
        assert history.evaluated == [10, 20, 30, 40]
        assert history.best == 2

    def test_a_missing_log_is_an_empty_history_without_a_drawing(self, tmp_path):
        assert training_curves(read_history(tmp_path / "metrics.jsonl")) == ""

    def test_the_drawing_takes_its_colours_from_the_page_and_is_repeatable(self):
        history = History([1, 2, 3], [1.0, 0.5, 0.2], [2, 3], [{"map_at_r": 0.3}, {"map_at_r": 0.4}])
        svg = training_curves(history)
        assert svg == training_curves(history)
        assert "var(--accent)" in svg
        assert "var(--font)" in svg
        assert "kept: 0.400" in svg
        assert not re.search(r"#0[1-5]0[2-6]0[3-7]", svg)
        assert "DejaVu" not in svg

    def test_smoothing_keeps_constants_and_is_not_biased_to_zero_at_the_start(self):
        assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
        assert smoothed([]) == []


class TestMap:
    def test_clumps_stay_together(self):
        rng = np.random.default_rng(1)
        centres = 10 * np.eye(4, 12)
        vectors = np.repeat(centres, 15, axis=0) + 0.1 * rng.normal(size=(60, 12))
        dots = place(vectors.astype(np.float32))
        points = np.array([(d.x, d.y) for d in dots])
        assert retrieval_metrics(points - points.mean(axis=0), np.repeat(range(4), 15)).recall[1] > 0.95
        assert (points >= 0).all()
        assert (points <= (WIDTH, HEIGHT)).all()

    def test_the_same_seed_gives_the_same_map_of_at_most_so_many(self):
        vectors = np.random.default_rng(2).normal(size=(80, 8)).astype(np.float32)
        dots = place(vectors, most=40)
        assert dots == place(vectors, most=40)
        assert len(dots) == 40

    @pytest.mark.parametrize("rows", [1, 2, 5, 12])
    def test_few_or_identical_vectors_have_a_map_too(self, rows):
        for vectors in (np.ones((rows, 4), np.float32), np.eye(rows, 16, dtype=np.float32)):
            assert len(place(vectors)) == rows

    def test_thumbnails_do_not_cover_each_other(self):
        dots = place(np.random.default_rng(3).normal(size=(100, 8)).astype(np.float32))
        chosen = thumbnails_on(dots, apart=60)
        assert 5 < len(chosen) < 100
        for number, one in enumerate(chosen):
            for other in chosen[:number]:
                assert abs(one.x - other.x) >= 60 or abs(one.y - other.y) >= 60

    def test_classes_have_colours_of_their_own(self):
        colours = class_colours([f"class {i}" for i in range(40)])
        assert len(set(colours.values())) == 40


def test_the_distribution_counts_every_class_once(evaluation):
    classes = evaluation.classes()
    tenths = distribution(classes)
    assert sum(count for _, count in tenths) == len(classes)
    assert tenths[9][1] == sum(c.recall_at_1 >= 0.9 - 1e-9 for c in classes)
