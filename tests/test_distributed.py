"""Several processes train the model that one process would train, and end as one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from distributed_cases import DTYPES, all_cases, play
from safetensors.torch import load_file

from dml.cli.train import unused_gpus
from dml.config import DataConfig, ModelConfig, Part, TrainConfig, load_recipe
from dml.data.augment import Standard, build_augmentation
from dml.data.images import ImageSource, TrainingBatches, training_batches
from dml.data.sampler import ClassBalancedSampler
from dml.data.table import open_table
from dml.errors import ConfigError
from dml.models import build_model
from dml.training import processes
from dml.training.run import train_final

ROOT = Path(__file__).parent.parent
WORLD = 2
CASES = [f"{name}, {kind}" for name in all_cases() for kind in DTYPES]


def torchrun(*arguments: str, count: int = WORLD, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start `count` processes on this machine, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, env=settings
    )


# -------- gradients


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has seen of every case."""
    out = tmp_path_factory.mktemp("played")
    done = torchrun("tests/distributed_cases.py", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one_on_the_whole_batch(
    name: str, played: list[dict[str, Any]]
) -> None:
    case, _, kind = name.rpartition(", ")
    alone = play(all_cases()[case], DTYPES[kind])
    first, second = (part[name] for part in played)
    tolerance = 1e-10 if kind == "float64" else 1e-5
    for expected, actual in zip(alone["gradients"], first["gradients"], strict=True):
        assert expected.keys() == actual.keys()
        assert any(gradient.any() for gradient in expected.values()) or "Nothing" in case
        for parameter, gradient in expected.items():
            # relative to the largest number of the tensor, or of all where it is a rounding error of 0
            size = gradient.abs().max()
            all_sizes = max(g.abs().max() for g in expected.values())
            torch.testing.assert_close(
                actual[parameter],
                gradient,
                rtol=0,
                atol=float(tolerance * max(size, 1e-6 * all_sizes)),
                msg=lambda text, parameter=parameter: f"{parameter}: {text}",
            )
    for expected, actual in zip(alone["terms"], first["terms"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for what, value in alone["state"].items():
        assert torch.equal(first["state"][what], second["state"][what]), f"{what} differs between processes"
        torch.testing.assert_close(first["state"][what], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_synchronised_batch_norm_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Two processes share one GPU, which gloo allows."""
    done = torchrun("tests/distributed_cases.py", str(tmp_path), "batch-norm")
    assert done.returncode == 0, done.stderr[-4000:]
    expected, *parts = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "0", "1"))
    for part in parts:
        assert part.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(part[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("trunk", ["tiny", "efficientnet_b0"])
def test_synchronised_batch_norm_is_the_same_model(trunk: str) -> None:
    """Names of weights stay, so that checkpoints and encoders fit; and so do activations inside the layer."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(trunk=trunk, dim=8), image_size=32).eval()
    names, picture = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = model(picture).raw
    model.synchronize_batch_norm()
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.eval()(picture).raw, expected)


# -------- batches


def batches_of(folder: Path, *, part: int = 0, parts: int = 1, augmentation: Any = None, **config: Any):
    settings = DataConfig(image_size=32, workers=0, **config)
    table = open_table(folder)
    source = ImageSource(table.records, table.classes, settings, mean=(0.5,) * 3, std=(0.5,) * 3)
    sampler = ClassBalancedSampler(source.labels.tolist(), classes_per_batch=4, images_per_class=3)
    change = augmentation or build_augmentation(Part("standard", {"rotation": 10.0}))
    return training_batches(source, sampler, change, seed=0, part=part, parts=parts)


class WholeBatches:
    """An augmentation that knows nothing of parts."""

    def on_batch(self, pictures, aspect, size, generator):
        return Standard().on_batch(pictures, aspect, size, generator)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("kind", ["in memory", "from disk", "another augmentation"])
def test_the_slices_of_all_processes_are_the_batch_of_one(
    kind: str, parts: int, start: int, tiny_folder: Path
) -> None:
    settings: dict[str, Any] = {"memory_gb": 0.0} if kind == "from disk" else {}
    settings |= {"augmentation": WholeBatches()} if kind == "another augmentation" else {}
    whole = list(batches_of(tiny_folder, **settings).epoch(1, start=start))
    slices = [
        list(batches_of(tiny_folder, part=part, parts=parts, **settings).epoch(1, start=start))
        for part in range(parts)
    ]
    assert len(whole) == 4 - start
    for batch, *cut in zip(whole, *slices, strict=True):
        assert {len(piece) for piece in cut} == {12 // parts}
        assert torch.equal(torch.cat([piece.ids for piece in cut]), batch.ids)
        assert torch.equal(torch.cat([piece.labels for piece in cut]), batch.labels)
        torch.testing.assert_close(torch.cat([piece.inputs for piece in cut]), batch.inputs)


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "from disk"])
def test_the_processes_share_a_sweep_without_a_gap_or_a_picture_twice(
    memory_gb: float, tiny_folder: Path
) -> None:
    def swept(batches: TrainingBatches) -> Iterator[tuple[int, torch.Tensor]]:
        return (
            (int(i), x)
            for batch in batches.sweep(3, size=9)
            for i, x in zip(batch.ids, batch.inputs, strict=True)
        )

    whole = dict(swept(batches_of(tiny_folder, memory_gb=memory_gb)))
    cut = [
        pair
        for p in range(2)
        for pair in swept(batches_of(tiny_folder, part=p, parts=2, memory_gb=memory_gb))
    ]
    assert sorted(i for i, _ in cut) == sorted(whole) == list(range(48))
    assert all(torch.equal(picture, whole[i]) for i, picture in cut)


def test_a_batch_that_cannot_be_shared_equally_names_numbers_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    processes.check_batch(6, 2, available=10)
    with pytest.raises(ConfigError, match=r"10 classes x 7 images = 70 .* among 4 processes") as caught:
        processes.check_batch(10, 7, available=10)
    told = str(caught.value)
    for fits in ((10, 6), (10, 8), (8, 7)):
        assert "train.classes_per_batch={} and train.images_per_class={}".format(*fits) in told
    assert "classes_per_batch=12" not in told  # there are only ten


@pytest.mark.parametrize(
    ("here", "everywhere", "gpus", "message"),
    [
        ("4", "4", 1, r"4 processes on this machine, which has 1 GPU\. Use --nproc-per-node 1, or"),
        ("2", "3", 2, r"2 processes on this machine and 3 in all.*the same --nproc-per-node"),
    ],
)
def test_processes_that_do_not_fit_the_machine_are_refused(
    here: str, everywhere: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", everywhere), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        processes.check_accelerator(TrainConfig())


def test_gpus_that_are_not_used_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "has 4 GPUs, one is used" in unused_gpus("cuda", 1)
    assert "torchrun --nproc-per-node 4 -m dml train" in unused_gpus("cuda", 1)
    assert unused_gpus("cuda", 4) == unused_gpus("cpu", 1) == ""


def test_processes_with_different_data_are_told_apart() -> None:
    same = {"the recipe": "a", "the classes": "b"}
    processes.check_same([same, dict(same)])
    with pytest.raises(ConfigError, match="Process 1 of 2 differs from process 0 in the classes"):
        processes.check_same([same, {**same, "the classes": "c"}])


def test_parameters_that_nothing_reads_are_found() -> None:
    model = build_model(load_recipe("cbml_iaa_ccloss").model, image_size=32)
    picture = torch.zeros(2, 3, 32, 32)
    modes = [module.training for module in model.modules()]
    assert processes.unreached(model, picture, ("raw", "unit", "attention")) == []
    left = processes.unreached(model, picture, ("raw", "unit"))
    assert left
    assert all(name.startswith("attention.") for name in left)
    assert [module.training for module in model.modules()] == modes


def test_one_process_is_not_connected_and_writes() -> None:
    assert processes.process_count() == 1
    assert processes.is_first()
    assert not processes.connected()
    assert processes.from_everyone(3) == processes.to_first(3) == [3]
    with processes.joined(TrainConfig()):
        assert not processes.connected()


# -------- whole runs

SETTINGS = {
    "data.image_size": "32",
    "model.dim": "16",
    "model.freeze_batch_norm": "true",
    "loss.name": "distributed_cases:Mortal",
    "memory.name": "cross_batch",
    "augment.name": "intra_class",
    "train.optimizer": "sgd",
    "train.epochs": "4",
    "train.steps_per_epoch": "3",
    "train.classes_per_batch": "4",
    "train.images_per_class": "3",
    "train.evaluate_every": "1",
}


def dml_train(
    folder: Path, out: Path, *options: str, changes: dict[str, str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    pairs = [f"{key}={value}" for key, value in {**SETTINGS, **(changes or {})}.items()]
    sets = [word for pair in pairs for word in ("--set", pair)]
    return torchrun("-m", "dml", "train", str(folder), "--out", str(out), *sets, *options, **environment)


def entries(out: Path) -> list[dict[str, Any]]:
    """The log of a run, without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def run_of_two(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`torchrun … dml train --final --json` from start to end."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = dml_train(tiny_folder, out, "--final", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 1, "both processes have printed the result"
    assert json.loads(told[0])["run"] == str(out)
    assert done.stderr.count("Training on") == 2, "selection and final run, each told once"
    return out


def test_a_run_of_two_processes_gives_the_numbers_of_one(
    run_of_two: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("multi_similarity", {**SETTINGS, "data.source": json.dumps(str(tiny_folder))})
    list(train_final(recipe, tmp_path / "one"))
    for part in ("selection", "."):
        one, two = tmp_path / "one" / part, run_of_two / part
        for expected, actual in zip(entries(one), entries(two), strict=True):
            validation = expected.pop("validation", {})
            assert actual.pop("validation", {}) == pytest.approx(validation, abs=1e-3)
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)
        expected, actual = (load_file(out / "encoder" / "model.safetensors") for out in (one, two))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_after_one_of_its_processes_was_killed(
    run_of_two: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = dml_train(tiny_folder, out, DML_TEST_KILL_AT="8")
    assert killed.returncode == 1
    assert killed.stderr.count("error:") <= 1  # the other process may see it before torchrun ends it
    assert entries(out)[-1]["step"] < 12
    resumed = dml_train(tiny_folder, out, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "going on behind step 6" in " ".join(resumed.stderr.split())
    assert entries(out) == entries(run_of_two / "selection")
    assert np.array_equal(weights(out), weights(run_of_two / "selection"))


def weights(out: Path) -> np.ndarray:
    held = load_file(out / "encoder" / "model.safetensors")
    return np.concatenate([held[name].numpy().ravel() for name in sorted(held)])


def test_an_error_of_one_process_is_told_once_and_ends_all(tiny_folder: Path, tmp_path: Path) -> None:
    done = dml_train(tiny_folder, tmp_path / "run", DML_TEST_FAIL_AT="5")
    assert done.returncode == 1
    assert done.stderr.count("the second process cannot read its pictures") == 1
    assert done.stderr.count("error:") == 1
    assert done.stderr.count("Traceback") == 1, "torchrun's own, and no other"
    assert "exitcode  : 3" in done.stderr


def test_an_error_of_all_processes_is_told_once(tiny_folder: Path, tmp_path: Path) -> None:
    done = dml_train(tiny_folder, tmp_path / "run", changes={"train.sync_batch_norm": "true"})
    assert done.stderr.count("error: train.sync_batch_norm works on GPUs only") == 1
    assert done.stderr.count("Traceback") == 1, "torchrun's own, and no other"
    assert "exitcode  : 2" in done.stderr
