"""A run learns, selects on held-out pictures, survives a kill, and leaves an encoder that others can load."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dml.config import Recipe, load_recipe, recipe_names
from dml.encoder import Encoder
from dml.errors import ConfigError, DataError, TrainingDiverged
from dml.training.checkpoint import Standing, load_checkpoint, save_checkpoint
from dml.training.loop import Step, learning_rate_schedule
from dml.training.run import Evaluated, Finished, Started, train, train_final

ROOT = Path(__file__).parent.parent
SMALL = {
    "data.image_size": "32",
    "model.dim": "16",
    "train.epochs": "4",
    "train.steps_per_epoch": "3",
    "train.classes_per_batch": "4",
    "train.images_per_class": "3",
    "train.evaluate_every": "2",
}


def small_recipe(folder: Path, name: str = "multi_similarity", **changes: str) -> Recipe:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(name, {**SMALL, "data.source": json.dumps(str(folder)), **dotted})


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    list(train(small_recipe(tiny_folder), out))
    return out


def test_a_run_yields_what_happens_in_order(tiny_folder: Path, tmp_path: Path) -> None:
    events = list(train(small_recipe(tiny_folder), tmp_path / "run"))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    steps = [e for e in events if isinstance(e, Step)]
    assert [s.number for s in steps] == list(range(1, 13))
    looks = [e for e in events if isinstance(e, Evaluated)]
    assert [e.step for e in looks] == [6, 12]
    assert all(0 <= e.figures["map_at_r"] <= 1 for e in looks)


def test_the_run_folder_holds_everything_that_repeats_it(whole_run: Path) -> None:
    present = {p.name for p in whole_run.iterdir()}
    expected = {
        "recipe.toml",
        "environment.json",
        "splits.json",
        "metrics.jsonl",
        "tensorboard",
        "bad_images.csv",
    }
    assert expected | {"checkpoints", "encoder"} <= present
    assert load_recipe(whole_run / "recipe.toml").train.epochs == 4
    assert json.loads((whole_run / "environment.json").read_text())["versions"]["torch"]
    assert list((whole_run / "tensorboard").iterdir())


def test_the_encoder_of_a_run_embeds_pictures(whole_run: Path, tiny_folder: Path) -> None:
    encoder = Encoder.load(whole_run)
    vectors = encoder.embed(sorted(tiny_folder.rglob("*.jpg"))[:5])
    assert vectors.shape == (5, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert encoder.manifest["provenance"]["protocol"] == "closed-set"


def test_the_same_recipe_gives_the_same_numbers(whole_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    list(train(small_recipe(tiny_folder), tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(whole_run)
    assert Encoder.load(tmp_path / "again").fingerprint == Encoder.load(whole_run).fingerprint


def test_another_seed_gives_other_numbers(whole_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    list(train(small_recipe(tiny_folder, train__seed="1"), tmp_path / "other"))
    assert losses(tmp_path / "other") != losses(whole_run)


@pytest.mark.parametrize("name", ["multi_similarity", "cbml_iaa_ccloss"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tiny_folder, name)
    list(train(recipe, tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    for event in train(recipe, stopped):
        if isinstance(event, Step) and event.number == 8:  # two steps behind the checkpoint of epoch 2
            break
    events = list(train(recipe, stopped, resume=True))
    assert isinstance(events[0], Started)
    assert events[0].resumed_at == 6
    assert losses(stopped) == losses(tmp_path / "whole")
    assert Encoder.load(stopped).fingerprint == Encoder.load(tmp_path / "whole").fingerprint


def test_a_finished_run_that_is_resumed_only_finishes_again(whole_run: Path, tiny_folder: Path) -> None:
    events = list(train(small_recipe(tiny_folder), whole_run, resume=True))
    assert not [e for e in events if isinstance(e, Step)]
    assert isinstance(events[-1], Finished)


def test_a_run_is_never_written_over(whole_run: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run.*--resume auto"):
        list(train(small_recipe(tiny_folder), whole_run))


def test_resuming_with_another_recipe_is_refused(whole_run: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="the recipe changed"):
        list(train(small_recipe(tiny_folder, model__dim="8"), whole_run, resume=True))


def test_training_stops_early_when_nothing_gets_better(tiny_folder: Path, tmp_path: Path) -> None:
    still = small_recipe(
        tiny_folder,
        train__epochs="40",
        train__evaluate_every="1",
        train__patience="2",
        train__learning_rate="1e-12",
    )
    events = list(train(still, tmp_path / "run"))
    assert events[-1].stopped_early
    assert len([e for e in events if isinstance(e, Step)]) < 40 * 3


def test_more_classes_per_batch_than_there_are_is_brought_down_to_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tiny_folder, train__classes_per_batch="50", train__epochs="1")
    assert isinstance(list(train(recipe, tmp_path / "run"))[-1], Finished)


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_trains(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    small = {"train__epochs": "2", "model__pretrained": "false"}
    recipe = small_recipe(tiny_folder, name, **small)
    if recipe.model.trunk != "tiny":
        pytest.skip(f"the recipe's trunk {recipe.model.trunk} is too large to train in a test")
    events = list(train(recipe, tmp_path / "run"))
    assert all(torch.isfinite(e.terms["loss"]) for e in events if isinstance(e, Step))
    assert isinstance(events[-1], Finished)


def test_a_final_run_has_seen_every_class_and_carries_the_selected_models_figures(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    list(train_final(small_recipe(tiny_folder), out))
    chosen = Encoder.load(out / "selection").manifest["provenance"]
    final = Encoder.load(out).manifest["provenance"]
    assert final["trained_on"] == "all classes"
    assert final["figures"]["model"] == "selection"
    assert final["figures"]["map_at_r"] == chosen["figures"]["map_at_r"]
    assert "selected model" in final["figures"]["note"]


def test_a_final_run_takes_exactly_the_chosen_steps(tiny_folder: Path, tmp_path: Path) -> None:
    events = list(train_final(small_recipe(tiny_folder, train__evaluate_every="1"), tmp_path / "run"))
    chosen, final = [e for e in events if isinstance(e, Finished)]
    assert final.standing.step == chosen.standing.best_step


def test_a_final_run_does_not_go_on_from_a_run_that_selects(whole_run: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="its kind"):
        list(train_final(small_recipe(tiny_folder), whole_run, resume=True))


def test_a_run_whose_pictures_have_changed_does_not_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    out = tmp_path / "run"
    list(train(small_recipe(folder, train__epochs="1"), out))
    before = (out / "splits.json").read_text()
    (folder / "class_0" / "0.jpg").rename(folder / "class_1" / "new.jpg")
    with pytest.raises(ConfigError, match="the pictures or their split changed"):
        list(train(small_recipe(folder, train__epochs="1"), out, resume=True))
    assert (out / "splits.json").read_text() == before


def test_a_run_that_stopped_early_does_not_train_on_when_it_is_resumed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    still = {"train__epochs": "40", "train__evaluate_every": "1", "train__patience": "2"}
    recipe = small_recipe(tiny_folder, train__learning_rate="1e-12", **still)
    list(train(recipe, tmp_path / "run"))
    again = list(train(recipe, tmp_path / "run", resume=True))
    assert not [e for e in again if isinstance(e, Step)]


def test_training_runs_in_mixed_precision(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_folder, "cbml_iaa_ccloss", train__precision="bfloat16", train__epochs="2")
    losses_seen = [e.terms["loss"] for e in train(recipe, tmp_path / "run") if isinstance(e, Step)]
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses_seen)


@pytest.mark.gpu
def test_training_runs_in_mixed_precision_on_a_gpu(tiny_folder: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = small_recipe(
        tiny_folder, train__precision="bfloat16", train__accelerator="cuda", train__epochs="2"
    )
    assert isinstance(list(train(recipe, tmp_path / "run"))[-1], Finished)


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_change(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tiny_folder, train__learning_rate="1e30", train__warmup_share="0")
    with pytest.raises(TrainingDiverged, match=r"at step \d+.*train\.learning_rate"):
        list(train(recipe, tmp_path / "run"))


def test_two_processes_do_not_train_in_one_folder(tiny_folder: Path, tmp_path: Path) -> None:
    first = iter(train(small_recipe(tiny_folder), tmp_path / "run"))
    next(first)
    with pytest.raises(ConfigError, match="Another process is training"):
        list(train(small_recipe(tiny_folder), tmp_path / "run"))
    first.close()
    assert isinstance(list(train(small_recipe(tiny_folder), tmp_path / "run"))[-1], Finished)


def test_a_folder_with_something_else_in_it_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.toml").write_text("my own")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        list(train(small_recipe(tiny_folder), mine))
    assert (mine / "recipe.toml").read_text() == "my own"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        list(train(small_recipe(tiny_folder, train__accelerator="cuda"), tmp_path / "run"))


def start_training(folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dml.cli.main", "train", str(folder), "--out", str(out)]
    settings = {**SMALL, "train.epochs": "2000"}
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_command_leaves_a_checkpoint_to_go_on_from(
    how: signal.Signals, code: int, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_training(tiny_folder, out)
    wait_for(out / "checkpoints" / "last.pt", process)
    os.kill(process.pid, how)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code
    if how == signal.SIGINT:
        assert "--resume auto" in told
        assert "Traceback" not in told
    recipe = load_recipe(out / "recipe.toml")
    first = next(iter(train(recipe, out, resume=True)))
    assert isinstance(first, Started)
    assert first.resumed_at > 0


def test_a_corrupt_picture_is_skipped_and_listed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "class_0" / "broken.jpg").write_bytes(b"not a picture")
    events = list(train(small_recipe(folder, train__epochs="1"), tmp_path / "run"))
    assert len(events[0].bad) == 1
    assert "broken.jpg" in (tmp_path / "run" / "bad_images.csv").read_text()


def test_too_many_corrupt_pictures_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    for number in range(12):
        (folder / "class_0" / f"broken{number}.jpg").write_bytes(b"not a picture, nr. %d" % number)
    with pytest.raises(DataError, match="max_bad_share"):
        list(train(small_recipe(folder), tmp_path / "run"))


def copy_of(folder: Path, where: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, where / "copy"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"half of a checkpo")
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(DataError, match=r"last\.pt cannot be read.*Delete it"):
        load_checkpoint(path, layer, torch.optim.SGD(layer.parameters()), {})


def test_a_checkpoint_brings_weights_optimiser_and_progress_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(
        tmp_path / "c.pt", layer, optimizer, Standing(step=5, best_value=0.25), {"the recipe": "a"}
    )
    other = torch.nn.Linear(2, 2)
    second = torch.optim.Adam(other.parameters())
    standing = load_checkpoint(tmp_path / "c.pt", other, second, {"the recipe": "a"})
    assert standing == Standing(step=5, best_value=0.25)
    assert torch.equal(other.weight, layer.weight)
    assert second.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("room", [20, 3_000, 300_000])
def test_a_full_disk_ends_training_with_one_message(room: int, tiny_folder: Path, tmp_path: Path) -> None:
    """No file may grow beyond `room` bytes: the description, the log, the weights hit the limit in turn."""
    code = (
        "import resource, signal, sys\n"
        "from dml.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "train", str(tiny_folder), "--out", str(tmp_path / "run")]
    for key, value in SMALL.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_learning_rate_rises_then_falls() -> None:
    config = small_recipe(ROOT).train
    rate = learning_rate_schedule(config)
    assert rate(0) < 0.05
    assert rate(config.warmup_share) == pytest.approx(1)
    assert rate(0.5) < rate(0.2)
    assert rate(0.9999) < 1e-3


def test_the_step_schedule_multiplies_at_each_milestone() -> None:
    config = small_recipe(
        ROOT, train__schedule="step", train__milestones="[0.5, 0.8]", train__decay="0.1"
    ).train
    rate = learning_rate_schedule(config)
    assert [round(rate(x), 6) for x in (0.2, 0.5, 0.9)] == [1.0, 0.1, 0.01]
