"""`dml eval`, `python -m eval.recall`, the stage table, on real pictures and parts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dml.data.table import Record, open_table
from dml.errors import DataError, GateNotMet, TooManyBadImages, UsageError
from dml.metrics import retrieval_metrics
from eval import recall
from eval.evaluate import Selection, choose, evaluate, ids_of
from eval.gate import check_gates, read_gates, read_ks
from eval.served import compare_stages, spread


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    from dml.encoder import Encoder

    return Encoder.load(tiny_encoder, runtime="onnx")


@pytest.fixture(scope="module")
def everything(tiny_folder) -> Selection:
    return Selection("tiny", "all", "untrained", open_table(tiny_folder).records, None)


@pytest.fixture(scope="module")
def evaluation(encoder, everything):
    return evaluate(encoder, everything)


@pytest.fixture
def run_folder(tmp_path, tiny_folder, tiny_encoder) -> Path:
    """A run as training leaves it: splits, recipe and encoder."""
    import tomli_w

    from dml.config import DataConfig, Recipe, recipe_tree
    from dml.data.split import divide

    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(tiny_encoder, run / "encoder")
    config = DataConfig(source=str(tiny_folder), protocol="closed-set")
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe_tree(Recipe(data=config))))
    (run / "splits.json").write_text(divide(open_table(tiny_folder), config).to_json())
    return run


def dml(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dml.cli.main", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


class TestEvaluate:
    def test_the_figures_are_those_of_the_encoder_s_vectors(self, encoder, everything, evaluation):
        vectors = encoder.embed([r.path for r in everything.query])
        expected = retrieval_metrics(vectors, [r.label for r in everything.query])
        assert evaluation.metrics.figures() == pytest.approx(expected.figures(), abs=1e-6)
        assert all(
            low <= evaluation.metrics.figures()[n] <= high for n, (low, high) in evaluation.intervals.items()
        )
        assert (evaluation.metrics.queries, evaluation.metrics.skipped) == (48, 0)

    def test_a_picture_listed_in_query_and_gallery_does_not_find_itself(
        self, encoder, everything, evaluation
    ):
        both = Selection("tiny", "test", "untrained", everything.query, everything.query)
        assert evaluate(encoder, both).metrics.figures() == pytest.approx(
            evaluation.metrics.figures(), abs=1e-6
        )

    def test_two_boxes_of_one_file_are_two_pictures(self):
        path = Path("street.jpg")
        assert (
            len(set(ids_of([Record(path, "a", box=(0, 0, 9, 9)), Record(path, "a", box=(9, 0, 18, 9))]))) == 2
        )

    def test_unreadable_pictures_are_listed_and_limited(self, encoder, everything, tmp_path):
        broken = tmp_path / "broken.jpg"
        broken.write_text("no picture")
        records = (*everything.query, Record(broken, "class_0"))
        selection = Selection("tiny", "all", "untrained", records, None)
        found = evaluate(encoder, selection)
        assert [b.path for b in found.bad] == [str(broken)]
        assert found.metrics.queries == 48
        with pytest.raises(TooManyBadImages, match=r"1 of 49"):
            evaluate(encoder, selection, max_bad_share=0.01)

    def test_classes_are_listed_from_the_worst_and_average_to_the_whole(self, evaluation):
        classes = evaluation.classes()
        assert [c.recall_at_1 for c in classes] == sorted(c.recall_at_1 for c in classes)
        mean = sum(c.map_at_r * c.images for c in classes) / sum(c.images for c in classes)
        assert mean == pytest.approx(evaluation.metrics.map_at_r)

    def test_queries_are_ranked_from_worst_to_best(self, evaluation):
        average = evaluation.metrics.average_precision[evaluation.ranking()]
        assert (np.diff(average) >= 0).all()

    def test_one_picture_per_class_cannot_be_measured(self, encoder, everything):
        singles = {r.label: r for r in everything.query}
        with pytest.raises(DataError, match="at least two images of a class"):
            evaluate(encoder, Selection("singles", "all", "untrained", tuple(singles.values()), None))


class TestChoose:
    def test_a_run_is_measured_on_the_split_that_it_was_divided_into(self, run_folder, tiny_folder):
        test, validation = choose(run_folder), choose(run_folder, split="validation")
        assert test.protocol == "closed-set"
        assert test.digest
        trained = json.loads((run_folder / "splits.json").read_text())["train"]
        trained = {str((tiny_folder / row["path"]).resolve()) for row in trained}
        for chosen in (test, validation, choose(run_folder, str(tiny_folder))):
            assert chosen.query
            assert not trained & {str(r.path.resolve()) for r in chosen.query}

    def test_an_encoder_needs_data_and_measures_all_of_it(self, tiny_encoder, tiny_folder):
        with pytest.raises(UsageError, match="say which data"):
            choose(tiny_encoder)
        chosen = choose(tiny_encoder, str(tiny_folder))
        assert (len(chosen.query), chosen.split, chosen.protocol) == (48, "all", "untrained")

    def test_query_and_gallery_folders_are_searched_in_each_other(self, tiny_encoder, tiny_folder, tmp_path):
        for path in tiny_folder.rglob("*.jpg"):
            half = "query" if path.stem < "3" else "gallery"
            target = tmp_path / half / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        chosen = choose(tiny_encoder, str(tmp_path))
        assert chosen.gallery is not None
        assert (len(chosen.query), len(chosen.gallery)) == (18, 30)

    def test_a_split_nobody_knows_is_named(self, tiny_encoder, tiny_folder):
        with pytest.raises(UsageError, match="test, validation, all"):
            choose(tiny_encoder, str(tiny_folder), split="tset")

    def test_training_pictures_cannot_slip_in_through_all(self, run_folder):
        with pytest.raises(UsageError, match="was trained on"):
            choose(run_folder, split="all")


class TestGates:
    def test_a_figure_below_its_gate_is_told_with_both_numbers(self, evaluation):
        check_gates({"recall@1": 0.0}, evaluation)
        with pytest.raises(GateNotMet, match=r"map@r is 0\.\d+, demanded is at least 1"):
            check_gates({"recall@1": 0.0, "map@r": 1.0}, evaluation)

    def test_a_gate_on_an_unknown_figure_is_no_pass(self, evaluation):
        with pytest.raises(UsageError, match='Did you mean "recall@1"'):
            check_gates({"recal@1": 0.1}, evaluation)

    @pytest.mark.parametrize("text", ["recall@1", "recall@1=high", "recall@1=90", "=0.3x"])
    def test_what_is_no_gate_is_refused(self, text):
        with pytest.raises(UsageError, match="NAME=NUMBER"):
            read_gates([text])

    @pytest.mark.parametrize("text", ["", "0", "1;2", "one", "1,-2"])
    def test_what_is_no_list_of_k_is_refused(self, text):
        with pytest.raises(UsageError, match="--k takes"):
            read_ks(text)

    def test_k_is_sorted_and_unique(self):
        assert read_ks("10, 1,1,100") == (1, 10, 100)


@pytest.fixture(scope="module")
def shop(tiny_encoder, tiny_folder, tmp_path_factory) -> Path:
    """A collection of all the pictures, built by the command."""
    folder = tmp_path_factory.mktemp("collections") / "shop"
    done = dml("index", "build", tiny_folder, "--encoder", tiny_encoder, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def collection(shop):
    from dml.collection import open_collection

    with open_collection(shop, read_only=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(shop, tmp_path_factory):
    """Where a service answers for the collection."""
    command = [sys.executable, "-m", "dml.cli.main", "serve", str(shop), "--port", "0"]
    log = tmp_path_factory.mktemp("service") / "log"
    with (
        open(log, "w") as told,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True) as process,
    ):
        assert process.stdout is not None
        greeting = process.stdout.readline()  # only when it answers; the log names the address before that
        found = re.search(r"http://[\d.]+:\d+", greeting)
        if found is None:
            pytest.fail(f"the service did not start: {greeting}{log.read_text()}")
        yield found.group()
        process.terminate()
        process.stdout.read()


class TestStages:
    def test_an_exact_index_loses_nothing_against_exact_search(self, evaluation, collection):
        table = compare_stages(evaluation.query, evaluation.query_vectors, collection, ks=(1, 4))
        exact, index = table.stages
        assert index.recall == exact.recall
        assert index.overlap == 1.0
        assert exact.recall[1] == pytest.approx(evaluation.metrics.recall[1])
        assert exact.recall[4] == pytest.approx(evaluation.metrics.recall[4])
        assert table.losses() == ["index: you lose 0.0 points of Recall@1"]

    def test_the_service_answers_the_same_queries_with_the_same_items(self, evaluation, collection, address):
        table = compare_stages(
            evaluation.query, evaluation.query_vectors, collection, url=address, ks=(1, 4), most_uploads=20
        )
        exact, _, service, upload = table.stages
        assert (service.queries, upload.queries) == (48, 20)
        assert service.recall == exact.recall
        assert service.overlap == 1.0
        assert upload.overlap > 0.95  # the service decodes and embeds the files by itself
        assert json.loads(json.dumps(table.as_json()))["stages"][3]["name"] == "service, upload"

    def test_a_service_without_this_collection_is_refused(self, evaluation, collection, address):
        class Renamed:
            name = "another"

            def __getattr__(self, name):
                return getattr(collection, name)

        with pytest.raises(UsageError, match='does not serve a collection "another"; it serves: shop'):
            compare_stages(evaluation.query, evaluation.query_vectors, Renamed(), url=address)

    def test_an_index_that_forgets_is_seen(self, evaluation, collection):
        class Forgetful:
            """The same collection whose search never returns the nearest other item."""

            def __getattr__(self, name):
                return getattr(collection, name)

            def search(self, vectors, *, limit):
                found = collection.search(vectors, limit=limit + 2)
                for result in found:
                    del result.hits[1]
                return found

        table = compare_stages(evaluation.query, evaluation.query_vectors, Forgetful(), ks=(1, 4))
        assert table.stages[1].overlap < 0.9
        assert table.stages[1].recall[1] < table.stages[0].recall[1]

    def test_queries_without_anything_to_find_are_refused(self, evaluation, collection):
        strangers = [Record(r.path, "stranger") for r in evaluation.query]
        with pytest.raises(DataError, match="has the label of a query"):
            compare_stages(strangers, evaluation.query_vectors, collection)

    def test_queries_are_spread_evenly(self):
        assert spread(5, 10) == [0, 1, 2, 3, 4]
        assert spread(100, 3) == [0, 50, 99]
        assert spread(7, 1) == [0]


class TestRecallCommand:
    @pytest.fixture
    def arrays(self, tmp_path, evaluation):
        np.save(tmp_path / "vectors.npy", evaluation.query_vectors)
        np.save(tmp_path / "labels.npy", [r.label for r in evaluation.query])
        return tmp_path

    def test_arrays_give_the_same_figures_as_pictures(self, arrays, evaluation, capsys):
        assert recall.main([str(arrays), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"] == pytest.approx(evaluation.metrics.figures(), abs=1e-6)

    def test_pictures_are_embedded_and_measured(self, tiny_encoder, tiny_folder, evaluation, capsys):
        assert recall.main([str(tiny_encoder), str(tiny_folder), "--split", "all", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"]["recall@1"] == pytest.approx(evaluation.metrics.recall[1])

    def test_what_dml_embed_writes_is_read(self, encoder, tiny_folder, tmp_path, evaluation, capsys):
        from dml.encoder.embeddings import embed_table

        for format in ("npy", "parquet"):
            embed_table(encoder, open_table(tiny_folder), tmp_path / format, format=format)
            assert recall.main([str(tmp_path / format), "--k", "1", "--nmi"]) == 0
            said = capsys.readouterr().out
            assert f"recall@1      {evaluation.metrics.recall[1]:.4f}" in said
            assert f"nmi           {evaluation.nmi:.4f}" in said

    def test_a_separate_gallery_leaves_out_equal_ids(self, arrays, tmp_path, evaluation, capsys):
        np.save(arrays / "ids.npy", np.arange(len(evaluation.query)))
        assert recall.main([str(arrays), "--gallery", str(arrays), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"]["map@r"] == pytest.approx(evaluation.metrics.map_at_r, abs=1e-6)

    def test_vectors_without_labels_are_refused_with_the_way_to_give_them(self, tmp_path, capsys):
        np.save(tmp_path / "vectors.npy", np.eye(4, dtype=np.float32))
        assert recall.main([str(tmp_path)]) == 3
        assert "give the label of every row" in capsys.readouterr().err

    def test_rows_and_labels_must_be_as_many(self, arrays, capsys):
        np.save(arrays / "labels.npy", ["a", "b"])
        assert recall.main([str(arrays / "vectors.npy")]) == 3
        assert "48, 16) with 2 labels" in capsys.readouterr().err

    def test_pickled_arrays_are_not_read(self, tmp_path, capsys):
        np.save(tmp_path / "vectors.npy", np.array([{"a": 1}], dtype=object))
        assert recall.main([str(tmp_path)]) == 3
        assert "cannot be read as an array" in capsys.readouterr().err


class TestCommand:
    def test_it_prints_figures_and_writes_json_and_a_report(self, run_folder, tmp_path):
        done = dml("eval", run_folder, "--json", "--report", tmp_path / "out" / "report.html")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert set(found["metrics"]) >= {"recall@1", "recall@8", "map@r", "r_precision", "nmi"}
        assert found["protocol"] == "closed-set"
        assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")

    def test_index_and_service_are_asked_about_a_collection(self, tiny_encoder, tiny_folder, shop, address):
        done = dml("eval", tiny_encoder, tiny_folder, "--no-nmi", "--collection", shop, "--url", address)
        assert done.returncode == 0, done.stderr
        assert "service, upload" in done.stdout
        assert "you lose 0.0 points of Recall@1" in done.stdout

    def test_a_missed_gate_exits_4_and_still_prints(self, run_folder):
        done = dml("eval", run_folder, "--no-nmi", "--gate", "map@r=1")
        assert done.returncode == 4
        assert "The gate is not met" in done.stderr
        assert "MAP@R" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["missing"], 2, "missing"),
            (["{run}", "no/such/folder"], 3, "no/such/folder"),
            (["{run}", "--k", "zero"], 2, "--k takes"),
            (["{run}", "--gate", "recall"], 2, "NAME=NUMBER"),
            (["{run}", "--url", "http://127.0.0.1:1"], 2, "--collection"),
        ],
    )
    def test_mistakes_are_explained_without_a_traceback(self, run_folder, arguments, code, message):
        done = dml("eval", *[a.replace("{run}", str(run_folder)) for a in arguments])
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode == code or (arguments == ["missing"] and done.returncode in (1, 2))
