"""The speed tables: each runs from end to end, and none races a contender that computes something else."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_metric_learning")

from dml import losses as our_losses
from eval.speed import bank, class_statistics, losses, metrics, peak, race, rivals
from eval.speed.__main__ import main
from eval.speed.race import Disagreement


def run(tmp_path, capsys, *arguments):
    """The JSON of a table, and what was printed."""
    out = tmp_path / "deep" / "speed.json"
    assert main([*arguments, "--repeats", "1", "--out", str(out)]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


class TestTables:
    def test_losses_have_the_limit_ours_and_every_rival_in_agreement(self, tmp_path, capsys):
        arguments = ["losses", "--batch", "32", "--dim", "16", "--loop", "--only", "CBML"]
        found, printed = run(tmp_path, capsys, *arguments)
        assert found["machine"]["processor"]
        rows = {g["definition"]: {row["name"]: row for row in g["rows"]} for g in found["groups"]}
        assert set(rows) == {"CBML", "CBML + IAA"}
        assert set(rows["CBML"]) == {
            "limit",
            "limit, G + Gᵀ first",
            "dml",
            "vectorised",
            "loop over anchors",
        }
        sizes = {g["definition"]: g["candidates"] for g in found["groups"]}
        assert (sizes["CBML"], sizes["CBML + IAA"]) == (32, 128)
        for group in rows.values():
            assert group["limit"]["x limit"] == group["dml"]["x dml"] == 1
            for row in group.values():
                assert row["seconds"] > 0
                assert row["x limit"] == pytest.approx(row["seconds"] / group["limit"]["seconds"])
                assert max(row.get("value differs", 0), row.get("gradient differs", 0)) < losses.TOLERANCE
        assert "x limit" in printed
        assert "32 anchors x 128 candidates" in printed

    def test_every_definition_agrees_with_all_its_rivals(self):
        """Without the processes that memory is measured in, so that all of them can be looked at."""
        assert "pytorch-metric-learning + miner" in losses.groups(loop=True)["Multi-Similarity"]
        for group, contenders in losses.groups(loop=True).items():
            given = losses.inputs(losses.Case(64, 24, 3 if group.endswith("IAA") else 0))
            for name, contender in contenders.items():
                found = losses.compare(name, contender, contenders["dml"].loss_of, given)
                assert found["gradient differs"] < losses.TOLERANCE, (group, name)

    def test_the_inputs_leave_the_mining_something_to_do(self):
        given = losses.inputs(losses.Case(256, 128))
        sides = (given.labels, given.ids, given.embeddings, given.labels, given.ids)
        s, positive, negative = rivals.compared(given.embeddings, *sides)
        near, far = rivals.mined(s, positive, negative, 0.1)
        assert 0.5 < near.sum() / positive.sum() <= 1
        assert 0.001 < far.sum() / negative.sum() < 0.5

    def test_a_memory_is_raced_against_the_library_s(self, tmp_path, capsys):
        found, printed = run(tmp_path, capsys, "bank", "--rows", "256", "0", "--batch", "32", "--dim", "16")
        remembered, itself = found["sizes"]
        rows = {row["name"]: row for row in remembered["rows of table"]}
        assert set(rows) == {bank.LIMIT, *bank.OURS, *bank.THEIRS}
        assert all(rows[name]["gradient differs"] < losses.TOLERANCE for name in bank.THEIRS)
        assert all(row["seconds"] > 0 for row in rows.values())
        assert {row["name"] for row in itself["rows of table"]} == {bank.LIMIT, *bank.OURS}
        arguments = ["bank", "--rows", "0", "--batch", "16", "--dim", "8", "--only", "CBML"]
        [few] = run(tmp_path, capsys, *arguments)[0]["sizes"]
        assert [row["name"] for row in few["rows of table"]] == [bank.LIMIT, "dml CBML"]
        assert "32 anchors x 256 candidates" in printed

    def test_class_statistics_and_their_share_of_a_step(self, tmp_path, capsys):
        arguments = ["--rows", "60", "--classes", "5", "--dim", "8", "--trunk", "tiny", "--pictures", "8"]
        found, printed = run(tmp_path, capsys, "statistics", *arguments, "--size", "32")
        assert [row["name"] for row in found["table"]] == list(class_statistics.NAMES)
        assert max(row["differs"] for row in found["table"]) < 1e-5
        step = found["step"]["seconds"]
        share = (step["loss with IAA"] - step["loss"]) / step["step"]
        assert found["step"]["share"] == pytest.approx(share)
        assert "of the step" in printed

    def test_metrics_of_all_contenders_agree_and_are_in_the_table(self, tmp_path, capsys):
        arguments = ["metrics", "--rows", "600", "--dim", "32", "--per-class", "20", "150", "--loop"]
        found, printed = run(tmp_path, capsys, *arguments)
        assert [size["classes"] for size in found["sizes"]] == [30, 4]
        for size in found["sizes"]:
            names = [row["name"] for row in size["contenders"]]
            assert names[0] == "dml"
            assert {metrics.LIMIT, "loop over queries"} < set(names)
            assert sum(name.startswith("pytorch-metric-learning") for name in names) == 2
            assert size["agreement"] < 1e-5
        assert "x limit" in printed

    def test_the_memory_check_runs_inside_its_limit(self):
        few = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-m", "eval.speed", "memory", "--rows", "8000", "--dim", "64"]
        done = subprocess.run(
            [*command, "--limit-gib", "2"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **few},
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert 0 < found["before_gib"] <= found["peak_gib"] < 1
        assert 0 < found["figures"]["map@r"] < 1


class TestDisagreement:
    """A contender that is fast because it computes something else must not get into a table."""

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x, given: our_losses.MultiSimilarityLoss(beta=49)(x, given.labels),
            lambda x, given: our_losses.MultiSimilarityLoss()(x, given.labels) * float("nan"),
            # the right value with half the gradient
            lambda x, given: our_losses.MultiSimilarityLoss()(x / 2 + x.detach() / 2, given.labels),
        ],
        ids=["another setting", "no number", "another gradient"],
    )
    def test_a_loss_is_refused(self, wrong):
        given = losses.inputs(losses.Case(32, 16))
        right = losses.ours(our_losses.MultiSimilarityLoss())
        with pytest.raises(Disagreement, match='"wrong" does not compute the same as dml'):
            losses.compare("wrong", losses.Contender(wrong), right, given)

    def test_a_candidate_taken_for_another_image_is_noticed(self):
        """Own copies as positives: what a library without ids computes."""
        given = losses.inputs(losses.Case(32, 16, 3))
        loss = our_losses.MultiSimilarityLoss()
        with pytest.raises(Disagreement):
            losses.compare("wrong", losses.Contender(losses.without_ids(loss)), losses.ours(loss), given)

    def test_a_memory_is_refused(self):
        gradient = torch.ones(3, 2)
        assert bank.agree("same", (1.0, gradient), (1.0, gradient)) == 0
        with pytest.raises(Disagreement, match="does not compute the same"):
            bank.agree("wrong", (1.0, gradient), (1.01, gradient))
        with pytest.raises(Disagreement, match="does not compute the same"):
            bank.agree("wrong", (1.0, gradient * 1.01), (1.0, gradient))

    def test_class_statistics_are_refused(self):
        mean, variance = torch.ones(2, 3), torch.ones(2, 3)
        with pytest.raises(Disagreement, match="other class statistics"):
            class_statistics.agree("wrong", (mean, variance * 1.01), (mean, variance))

    def test_figures_are_refused(self):
        figures = {"dml": {"map@r": 0.5}, "limit": {}, "wrong": {"map@r": 0.501}}
        with pytest.raises(Disagreement, match='"wrong" finds map@r'):
            metrics.agreement(figures)
        assert metrics.agreement({"dml": {"map@r": 0.5}, "near": {"map@r": 0.50001}}) == pytest.approx(1e-5)

    def test_a_table_with_a_wrong_contender_ends_the_command(self, monkeypatch, capsys):
        monkeypatch.setattr(metrics, "product_alone", lambda points: {"recall@1": 2.0})
        assert main(["metrics", "--rows", "100", "--dim", "8", "--repeats", "1"]) == 1
        assert 'error: "limit' in capsys.readouterr().err


def build(kind, size):
    """A call whose need of memory is known; importable, as another process makes it."""
    if kind == "wait":
        return lambda: time.sleep(60)
    if kind == "wrong":
        return lambda: [][0]
    return lambda: np.ones(size, np.uint8).sum()


class TestPeak:
    def measured(self, kind, size, **options):
        settings = {"small": ("fill", 1000), "patience": 60.0, "limit": 1.0} | options
        return peak.extra_memory(build, kind, size, **settings)

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system keeps no peak to read")
    def test_it_is_what_the_call_took(self):
        found = self.measured("fill", 200 * 2**20)
        assert not found.problem
        assert 195 * 2**20 < found.extra < 230 * 2**20

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system keeps no peak to read")
    def test_more_than_allowed_is_a_problem_and_not_the_end(self):
        assert self.measured("fill", 300 * 2**20, limit=0.1).problem == "needs more than 0.1 GiB"

    def test_too_long_is_a_problem_and_not_the_end(self):
        assert self.measured("wait", 0, patience=0.2).problem == "over 0.2 s"

    def test_a_mistake_is_not_taken_for_a_lack_of_memory(self):
        with pytest.raises(RuntimeError, match="IndexError"):
            self.measured("wrong", 0)


class TestRace:
    def test_everyone_runs_as_often_and_the_first_of_a_turn_changes(self):
        order = []
        calls = {name: lambda name=name: order.append(name) or time.sleep(0.02) for name in "abc"}
        timings = race.race(calls, repeats=3)
        assert "".join(order) == "abc" + "abc" + "bca" + "cab"
        assert all(timing.seconds >= 0.02 for timing in timings.values())

    def test_rows_left_out_say_why_and_missing_figures_are_dashes(self):
        rows = [{"name": "one", "x": 2.0}, {"name": "two"}, {"name": "three", "problem": "over 60 s"}]
        lines = race.lines_of(rows, {"x": race.ratio})
        assert [line.split() for line in lines[1:]] == [
            ["one", "2.00"],
            ["two", "–"],
            ["three", "left", "out:", "over", "60", "s"],
        ]
