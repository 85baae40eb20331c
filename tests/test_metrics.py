"""The figures of a retrieval: hand values, a slow reference, another library, and the rules they keep."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml import metrics
from dml.errors import DataError, VectorError
from dml.metrics import (
    bootstrap_interval,
    cluster_accuracy,
    map_at_r,
    mutual_information,
    neighbours,
    nmi,
    precisions_at_r,
    r_precision,
    recall_at_k,
    retrieval_metrics,
    spherical_kmeans,
)


def clouds(rng, *, classes, rows, dim=16, spread=0.6):
    """Unit vectors around class centres, and their labels in no particular order."""
    labels = rng.integers(classes, size=rows)
    points = rng.normal(size=(classes, dim))[labels] + spread * rng.normal(size=(rows, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def slow(queries, labels, gallery, gallery_labels, *, ids, gallery_ids):
    """The definitions, a query at a time, by a full sort: first hit, AP@R, P@R (NaN: nothing relevant)."""
    rows = []
    for query, label, own in zip(queries, labels, ids, strict=True):
        others = [j for j in range(len(gallery)) if gallery_ids[j] != own]
        scores = [float(np.float32(query @ gallery[j])) for j in others]
        order = [others[i] for i in sorted(range(len(others)), key=lambda i: -scores[i])]
        hits = [gallery_labels[j] == label for j in order]
        relevant = sum(hits)
        if not relevant:
            rows.append((0, np.nan, np.nan))
            continue
        precision = [sum(hits[: i + 1]) / (i + 1) * hits[i] for i in range(relevant)]
        rows.append((hits.index(True) + 1, sum(precision) / relevant, sum(hits[:relevant]) / relevant))
    return np.array(rows).T


class TestHandValues:
    @pytest.mark.parametrize(
        ("hits", "relevant", "average", "precision"),
        [
            ([1] + [0] * 9, 10, 0.1, 0.1),
            ([1] + [0] * 8 + [1], 10, 0.12, 0.2),
            ([1, 1] + [0] * 8, 10, 0.2, 0.2),
            ([1] * 10, 10, 1.0, 1.0),
            ([1, 0, 1], 3, 0.555556, 0.666667),
            ([0, 1, 1], 3, 0.388889, 0.666667),
        ],
    )
    def test_results_of_one_query_have_the_figures_of_the_definition(
        self, hits, relevant, average, precision
    ):
        measured = precisions_at_r(np.array([hits], bool), np.array([relevant]))
        assert measured[0][0] == pytest.approx(average, abs=1e-6)
        assert measured[1][0] == pytest.approx(precision, abs=1e-6)

    def test_results_below_rank_r_do_not_count(self):
        average, precision = precisions_at_r(np.array([[False, False, True, True]]), np.array([2]))
        assert (average[0], precision[0]) == (0, 0)

    def test_five_points_on_a_circle_have_the_figures_one_can_draw(self):
        # Degrees 0 a, 10 a, 25 b, 60 a, 180 c. Neighbours of 0: 10 a, 25 b (R = 2): AP 1/2. Of 10: 0 a, 25
        # b: 1/2. Of 60: 25 b, 10 a: P@2 / 2 = 1/4. b and c are alone.
        angles = np.radians([0, 10, 25, 60, 180])
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        measured = retrieval_metrics(points, list("aabac"), ks=(1, 2))
        assert measured.average_precision[[0, 1, 3]] == pytest.approx([0.5, 0.5, 0.25])
        assert measured.precision_at_r[[0, 1, 3]] == pytest.approx([0.5, 0.5, 0.5])
        assert measured.first_hit.tolist() == [1, 1, 0, 2, 0]
        assert measured.recall == pytest.approx({1: 2 / 3, 2: 1.0})
        assert (measured.queries, measured.skipped, measured.gallery) == (3, 2, 5)
        assert np.isnan(measured.average_precision[[2, 4]]).all()
        assert measured.figures()["map@r"] == pytest.approx(5 / 12)


class TestAgainstTheDefinition:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        rows=st.integers(2, 40),
        classes=st.integers(1, 8),
        block=st.sampled_from([None, 1, 3]),
    )
    def test_query_equals_gallery_agrees_with_a_loop_over_sorted_lists(self, seed, rows, classes, block):
        rng = np.random.default_rng(seed)
        points, labels = unit_grid(rng, rows), rng.integers(classes, size=rows)
        ids = np.arange(rows)
        first, average, precision = slow(points, labels, points, labels, ids=ids, gallery_ids=ids)
        if np.isnan(average).all():
            with pytest.raises(DataError, match="Nothing to measure"):
                retrieval_metrics(points, labels, block=block)
            return
        measured = retrieval_metrics(points, labels, block=block)
        assert measured.first_hit.tolist() == first.tolist()
        np.testing.assert_allclose(measured.average_precision, average)
        np.testing.assert_allclose(measured.precision_at_r, precision)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), shared=st.integers(0, 10))
    def test_a_separate_gallery_agrees_with_a_loop_over_sorted_lists(self, seed, shared):
        rng = np.random.default_rng(seed)
        queries, gallery = unit_grid(rng, 12), unit_grid(rng, 30)
        labels, gallery_labels = rng.integers(4, size=12), rng.integers(4, size=30)
        ids = [f"q{i}" for i in range(12)]
        gallery_ids = [f"q{i}" if i < shared else f"g{i}" for i in range(30)]
        first, average, precision = slow(
            queries, labels, gallery, gallery_labels, ids=ids, gallery_ids=gallery_ids
        )
        measured = retrieval_metrics(
            queries,
            labels,
            ids=ids,
            gallery=gallery,
            gallery_labels=gallery_labels,
            gallery_ids=gallery_ids,
        )
        assert measured.first_hit.tolist() == first.tolist()
        np.testing.assert_allclose(measured.average_precision, average)
        np.testing.assert_allclose(measured.precision_at_r, precision)

    def test_classes_of_very_different_size_in_large_blocks_agree_with_the_loop(self, scale):
        """Wide enough for the tile bound, for several threads and for classes beyond it."""
        rng = np.random.default_rng(5)
        labels = rng.choice(40, size=1500 * scale, p=np.arange(1, 41) ** 3 / (np.arange(1, 41) ** 3).sum())
        points = rng.normal(size=(40, 24))[labels] + 1.2 * rng.normal(size=(len(labels), 24))
        points = np.round(points, 1).astype(np.float32)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        measured = retrieval_metrics(points, labels)
        some = rng.choice(len(labels), 60, replace=False)
        ids = np.arange(len(labels))
        _, average, precision = slow(points[some], labels[some], points, labels, ids=some, gallery_ids=ids)
        np.testing.assert_allclose(measured.average_precision[some], average, atol=1e-4)
        np.testing.assert_allclose(measured.precision_at_r[some], precision, atol=2e-3)

    def test_the_short_functions_give_the_same_figures(self):
        points, labels = clouds(np.random.default_rng(1), classes=5, rows=80)
        measured = retrieval_metrics(points, labels, ks=(1, 3))
        assert recall_at_k(points, labels, (1, 3)) == measured.recall
        assert map_at_r(points, labels) == measured.map_at_r
        assert r_precision(points, labels) == measured.r_precision


class TestManyRelevant:
    """From `SAMPLED_DEPTH` relevant items on, a bound is estimated on some columns; figures stay exact."""

    def agree_with_the_loop(self, rng, points, labels, queries=25):
        measured = retrieval_metrics(points, labels)
        some = rng.choice(np.flatnonzero(measured.counted), queries, replace=False)
        ids = np.arange(len(labels))
        first, average, precision = slow(
            points[some], labels[some], points, labels, ids=some, gallery_ids=ids
        )
        assert measured.first_hit[some].tolist() == first.tolist()
        np.testing.assert_allclose(measured.average_precision[some], average)
        np.testing.assert_allclose(measured.precision_at_r[some], precision)

    def test_thousands_relevant_in_classes_of_very_different_size(self, scale):
        rng = np.random.default_rng(20)
        for sizes in ((2200, 500, 193, 40, 3, 1), (700, 700, 700, 700)):
            labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
            for _ in range(scale):
                points = signs(rng, labels, flipped=5)
                self.agree_with_the_loop(rng, points, labels)

    def test_ties_and_duplicate_rows_in_order_of_position(self, scale):
        rng = np.random.default_rng(21)
        for _ in range(2 * scale):
            labels = rng.integers(3, size=900)
            points = unit_grid(rng, 900)  # six directions: 150 copies of each row
            self.agree_with_the_loop(rng, points, labels)

    def test_a_sample_that_misleads_is_noticed(self):
        """The columns that the bound is estimated on hold all near rows, so the estimate is far too high."""
        width, k = 1600, 200
        sampled = np.random.default_rng(0).choice(width, width // 8, replace=False)
        rng = np.random.default_rng(22)
        angles = rng.uniform(1.0, 2.0, width)
        angles[sampled] = rng.uniform(0.0, 0.5, len(sampled))
        gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        similarity = np.array([[1, 0]], np.float32) @ gallery.T
        candidates, counts = metrics._at_least(similarity, k + 50)
        assert counts[0] == len(candidates) == k + 50
        found = neighbours(np.array([[1, 0]]), gallery, k + 50)
        assert found.positions[0].tolist() == np.argsort(angles, kind="stable")[: k + 50].tolist()

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 900), levels=st.sampled_from([1, 3, 40, 10**6]))
    def test_the_best_are_those_of_a_full_sort_at_every_depth(self, seed, k, levels):
        rng = np.random.default_rng(seed)
        similarity = (rng.integers(-levels, levels + 1, size=(6, 900)) / levels).astype(np.float32)
        similarity[rng.random(similarity.shape) < 0.01] = -np.inf
        positions, scores = metrics._best(similarity, k)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(similarity, order, axis=1)
        assert (scores == best).all()
        assert (positions == np.where(np.isneginf(best), -1, order)).all()


def signs(rng, labels, *, flipped):
    """Rows of ±1/4, some signs turned from those of the class: products are exact, ties real."""
    rows = rng.choice([-0.25, 0.25], size=(labels.max() + 1, 16))[labels]
    turned = rng.random(rows.shape).argsort(axis=1) < flipped
    return np.where(turned, -rows, rows).astype(np.float32)


def unit_grid(rng, rows):
    """Directions with few, exact products: ties are real ties, whatever the order of summation."""
    corners = np.array(
        [[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, 1], [2, 0, 0, 0], [0, 2, 0, 0]]
    )
    return (corners[rng.integers(len(corners), size=rows)] / 2).astype(np.float32)


def test_figures_equal_those_of_pytorch_metric_learning(scale):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    rng = np.random.default_rng(11)
    for classes, rows in ((6, 300), (40, 900 * scale), (300, 1000 * scale)):
        points, labels = clouds(rng, classes=classes, rows=rows, dim=32, spread=1.2)
        theirs = AccuracyCalculator(
            include=("precision_at_1", "r_precision", "mean_average_precision_at_r")
        ).get_accuracy(points, labels)
        ours = retrieval_metrics(points, labels)
        assert ours.recall[1] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
        assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
        assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-6)
        split = rows // 3
        theirs = AccuracyCalculator(include=("mean_average_precision_at_r",)).get_accuracy(
            points[:split], labels[:split], points[split:], labels[split:]
        )
        ours = retrieval_metrics(
            points[:split], labels[:split], gallery=points[split:], gallery_labels=labels[split:]
        )
        assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


class TestTheQueryItself:
    def test_an_exact_duplicate_under_another_id_is_found_and_the_query_is_not(self):
        points = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
        found = neighbours(points, points, 2, query_ids=[7, 8, 9], gallery_ids=[7, 8, 9])
        assert found.positions.tolist() == [[1, 2], [0, 2], [0, 1]]

    def test_every_copy_under_the_query_s_id_is_left_out(self):
        points = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
        found = neighbours(points[:1], points, 3, query_ids=["a"], gallery_ids=["a", "a", "b"])
        assert found.positions.tolist() == [[2, -1, -1]]
        assert found.scores[0, 1:].tolist() == [-np.inf, -np.inf]

    def test_a_query_that_is_not_its_own_first_hit_is_still_left_out(self):
        """A gallery row of its id with another vector: excluding the first hit would drop the wrong one."""
        gallery = np.array([[1, 0], [0.6, 0.8]], np.float32)
        measured = retrieval_metrics(
            np.array([[1.0, 0.0]]),
            ["x"],
            ids=["same"],
            gallery=gallery,
            gallery_labels=["x", "x"],
            gallery_ids=["other", "same"],
        )
        assert measured.relevant.tolist() == [1]
        assert measured.recall[1] == 1

    def test_an_own_copy_in_the_gallery_does_not_count_towards_r(self):
        points = np.eye(3, dtype=np.float32)
        with pytest.raises(DataError, match="none of the 3 queries"):
            retrieval_metrics(
                points,
                [0, 1, 2],
                ids=[0, 1, 2],
                gallery=points,
                gallery_labels=[0, 1, 2],
                gallery_ids=[0, 1, 2],
            )

    def test_rows_without_a_label_are_distractors_and_not_a_class(self):
        points = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1]], np.float32)
        measured = retrieval_metrics(points, [None, None, "a", "a"])
        assert (measured.queries, measured.skipped) == (2, 2)
        assert measured.recall[1] == 0.5  # the first "a" sees the unlabelled rows first


class TestTies:
    def test_equal_scores_are_ordered_by_gallery_position_whatever_the_labels(self):
        same = np.ones((6, 3), np.float32)
        for labels in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]):
            measured = retrieval_metrics(same, labels, ks=(1,))
            # Row 0 sees 1, 2, …: the first is of the other class. All others see row 0 first; only its class
            # hits.
            assert measured.recall[1] == pytest.approx(2 / 6)
        found = neighbours(same, same, 3, query_ids=range(6), gallery_ids=range(6))
        assert found.positions[0].tolist() == [1, 2, 3]
        assert found.positions[4].tolist() == [0, 1, 2]

    def test_a_collapsed_embedding_is_measured_quickly_and_in_bounded_memory(self):
        same = np.ones((4000, 8), np.float32)
        labels = np.arange(4000) % 400
        measured = retrieval_metrics(same, labels)
        # Everyone sees positions 0, 1, 2, …: of its 9 relevant items, ranks up to 9 hold at most one.
        assert measured.recall[1] == pytest.approx(9 / 4000)
        assert measured.map_at_r < 0.01

    def test_the_block_size_does_not_change_the_figures(self):
        points, labels = clouds(np.random.default_rng(2), classes=7, rows=200)
        figures = [retrieval_metrics(points, labels, block=b).figures() for b in (None, 1, 17, 200)]
        for other in figures[1:]:
            assert other == pytest.approx(figures[0], abs=1e-6)

    def test_zero_and_minus_zero_are_one_score(self):
        queries = np.array([[1, 0]], np.float32)
        gallery = np.array([[-0.0, 1], [0.0, 1], [-0.0, -1]], np.float32)
        assert neighbours(queries, gallery, 3).positions.tolist() == [[0, 1, 2]]


class TestNeighbours:
    def test_they_are_those_of_a_full_sort(self, scale):
        rng = np.random.default_rng(3)
        for width, k in ((10, 3), (500, 1), (3000, 5), (3000, 700), (9000 * scale, 20)):
            gallery, queries = rng.normal(size=(width, 8)), rng.normal(size=(50, 8))
            found = neighbours(queries, gallery, k)
            unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
            asked = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            best = -np.sort(-(asked @ unit.T), axis=1)[:, :k]
            np.testing.assert_allclose(found.scores, best, atol=1e-6)
            np.testing.assert_allclose(np.einsum("qd,qkd->qk", asked, unit[found.positions]), best, atol=1e-6)

    def test_more_neighbours_than_there_are_end_in_missing_results(self):
        found = neighbours(np.eye(2), np.eye(2), 4)
        assert found.positions.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1]]
        assert np.isneginf(found.scores[:, 2:]).all()

    def test_an_empty_gallery_answers_with_missing_results(self):
        assert neighbours(np.eye(2), np.empty((0, 2)), 2).positions.tolist() == [[-1, -1], [-1, -1]]

    def test_negative_scores_keep_their_order(self):
        gallery = np.array([[-1, 0], [-0.6, 0.8], [-0.8, 0.6]], np.float32)
        assert neighbours(np.array([[1, 0]]), gallery, 3).positions.tolist() == [[1, 2, 0]]


class TestClustering:
    def test_separate_clouds_are_found_again(self):
        points, labels = clouds(np.random.default_rng(4), classes=6, rows=240, spread=0.05)
        assert nmi(points, labels, seed=0) == pytest.approx(1.0)
        assert cluster_accuracy(labels, spherical_kmeans(points, 6, seed=0)) == 1.0

    def test_the_seed_decides_the_clustering(self):
        points, _ = clouds(np.random.default_rng(6), classes=6, rows=200, spread=2)
        first = spherical_kmeans(points, 6, seed=1)
        assert (spherical_kmeans(points, 6, seed=1) == first).all()
        assert not (spherical_kmeans(points, 6, seed=2) == first).all()

    def test_no_cluster_is_empty_and_every_row_is_nearest_to_its_own_centre(self):
        points, _ = clouds(np.random.default_rng(7), classes=4, rows=300, spread=1)
        clusters = spherical_kmeans(points, 12, seed=0, iterations=200)
        assert set(clusters) == set(range(12))
        centres = np.stack([points[clusters == c].sum(axis=0) for c in range(12)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        assert ((points @ centres.T).argmax(axis=1) == clusters).mean() > 0.99

    def test_identical_rows_can_be_clustered(self):
        assert len(spherical_kmeans(np.ones((5, 3)), 3, seed=0)) == 5

    def test_mutual_information_and_accuracy_equal_those_of_other_libraries(self):
        sklearn = pytest.importorskip("sklearn.metrics")
        rng = np.random.default_rng(8)
        for _ in range(20):
            a, b = rng.integers(5, size=60), rng.integers(7, size=60)
            expected = sklearn.normalized_mutual_info_score(a, b)
            assert mutual_information(a, b) == pytest.approx(expected, abs=1e-12)

    def test_accuracy_matches_clusters_to_classes_one_to_one(self):
        assert cluster_accuracy(["a", "a", "b", "b"], [1, 1, 0, 1]) == 0.75
        assert cluster_accuracy(["a", "a", "b"], [3, 3, 3]) == pytest.approx(2 / 3)

    def test_mutual_information_by_hand(self):
        # Two halves against one odd row out: H = log 2; H = 0.562335; joint 3 cells of 1/2, 1/4, 1/4.
        joint = 0.5 * np.log(2) + 0.5 * np.log(4)
        other = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
        expected = 2 * (np.log(2) + other - joint) / (np.log(2) + other)
        assert mutual_information([0, 0, 1, 1], [0, 0, 0, 1]) == pytest.approx(expected)
        assert mutual_information([0, 0], [1, 1]) == 1.0


class TestIntervals:
    def test_it_covers_the_true_mean_about_as_often_as_it_says(self, scale):
        rng = np.random.default_rng(9)
        covered = 0
        for _ in range(150 * scale):
            low, high = bootstrap_interval(rng.random(80) < 0.3, rng, resamples=300)
            covered += low <= 0.3 <= high
        assert 0.87 < covered / (150 * scale) <= 1

    def test_queries_that_move_together_make_it_wider(self):
        rng = np.random.default_rng(10)
        groups = np.repeat(np.arange(30), 20)
        values = np.repeat(rng.random(30) < 0.5, 20).astype(float)
        alone, together = bootstrap_interval(values), bootstrap_interval(values, groups=groups)
        assert together.high - together.low > 3 * (alone.high - alone.low)

    def test_the_same_seed_gives_the_same_interval_and_skipped_queries_do_not_count(self):
        values = np.random.default_rng(0).random(50)
        with_gaps = np.concatenate([values, [np.nan] * 5])
        assert bootstrap_interval(values, 4) == bootstrap_interval(with_gaps, 4)
        assert bootstrap_interval(np.ones(9)) == (1.0, 1.0)


class TestRefusals:
    def test_nan_is_named_by_its_row(self):
        with pytest.raises(VectorError, match="row 1 holds NaN"):
            retrieval_metrics(np.array([[1, 0], [np.nan, 0]]), [0, 0])

    def test_vectors_of_another_length_are_refused(self):
        with pytest.raises(VectorError, match="4 numbers each, the gallery 3"):
            neighbours(np.eye(4), np.eye(3), 1)

    def test_labels_must_fit_the_rows(self):
        with pytest.raises(ValueError, match="expected 3 labels, one per row, got 2"):
            retrieval_metrics(np.eye(3), [0, 1])

    def test_a_gallery_needs_labels(self):
        with pytest.raises(ValueError, match="needs gallery_labels"):
            retrieval_metrics(np.eye(3), [0, 1, 2], gallery=np.eye(3))

    @pytest.mark.parametrize("k", [(), (0,), (1, -1)])
    def test_k_starts_at_one(self, k):
        with pytest.raises(ValueError, match="at least 1"):
            retrieval_metrics(np.eye(3), [0, 0, 1], ks=k)

    def test_interval_of_nothing(self):
        with pytest.raises(ValueError, match="at least one value"):
            bootstrap_interval([np.nan])

    def test_more_clusters_than_rows(self):
        with pytest.raises(ValueError, match="between 1 and the number of rows 3, got 4"):
            spherical_kmeans(np.eye(3), 4)


def test_memory_stays_far_below_a_full_matrix():
    """20,000 rows against themselves would be 1.6 GB of similarities; far less may be allocated."""
    pytest.importorskip("resource")
    script = textwrap.dedent(
        """
        import resource
        import numpy as np
        from dml import metrics
        rng = np.random.default_rng(0)
        metrics.retrieval_metrics(rng.normal(size=(300, 64)), np.arange(300) % 9)  # buffers exist now
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + 700 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        points = rng.normal(size=(20_000, 64)).astype(np.float32)
        found = metrics.retrieval_metrics(points, np.arange(20_000) % 200)
        print(found.queries)
        try:
            points @ points.T
        except MemoryError:
            print("a full matrix does not fit")
        """
    )
    # Threads reserve address space for their buffers; one malloc arena and two BLAS threads keep that small.
    few = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **few}
    )
    assert done.stdout.split("\n")[:2] == ["20000", "a full matrix does not fit"], done.stderr


def test_the_block_is_bounded_by_its_budget():
    for gallery, depth in ((1_000, 10), (120_000, 10), (120_000, 60_000)):
        rows = metrics._Height(None, depth).rows(gallery)
        assert rows * (5 * gallery + 48 * depth) <= metrics.BLOCK_BYTES
    with pytest.raises(ValueError, match="at least 1 row"):
        metrics._Height(0, 1).rows(10)


def test_importing_the_metrics_does_not_load_torch():
    script = "import sys, dml.metrics; print(sorted({'torch', 'sklearn', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
