"""From a recipe to a run folder: divide the data, train, select on held-out classes, leave an encoder behind.

A run folder holds::

    recipe.toml        the effective recipe, every default spelled out
    environment.json   versions and machine
    splits.json        which picture is in which split
    metrics.jsonl      one JSON object per line: training steps and evaluations
    tensorboard/       the same figures for TensorBoard
    bad_images.csv     pictures that could not be read
    checkpoints/       last.pt to resume from, best.safetensors
    encoder/           what everyone else loads

Of several processes the first alone writes all of this, and decides; the others follow.
"""

import csv
import fcntl
import hashlib
import io
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from dml.config import Recipe, TrainConfig, recipe_tree
from dml.data.augment import build_augmentation
from dml.data.images import ImageSource, TrainingBatches, batches_of, training_batches
from dml.data.reading import check_share
from dml.data.sampler import ClassBalancedSampler
from dml.data.split import Splits, divide
from dml.data.table import ImageTable, Record, open_table
from dml.encoder.artifact import save_encoder
from dml.encoder.preprocess import Preprocess
from dml.errors import ConfigError, DataError, TrainingDiverged
from dml.imaging import BadImage
from dml.metrics import retrieval_metrics
from dml.models import build_model
from dml.storage import no_empty_folders, storage_errors, write_aside
from dml.training import processes
from dml.training.checkpoint import Standing, load_checkpoint, randomness, save_checkpoint
from dml.training.loop import Learner, Step, learning_rate_schedule, make_optimizer, steps
from dml.training.objective import Objective
from dml.training.supervised import Supervised, build_objective

LAST = "checkpoints/last.pt"
VALIDATION_BATCH = 256
"""Pictures embedded at a time; processes share the validation split by whole batches."""
LOCK = ".lock"
"""File in a run folder that is locked while a process trains there."""

PACKAGES = ("torch", "torchvision", "timm", "pytorch-metric-learning", "lightning-fabric", "numpy", "pillow")


@dataclass(frozen=True)
class Started:
    """The data is divided and the model stands."""

    table: ImageTable
    splits: Splits
    images: int
    classes: int
    bad: Sequence[BadImage]
    parameters: int
    total_steps: int
    resumed_at: int  # steps that an earlier process has done
    device: torch.device
    processes: int


@dataclass(frozen=True)
class Evaluated:
    """One look at the validation split."""

    step: int
    epoch: int
    figures: dict[str, float]
    best: bool


@dataclass(frozen=True)
class Finished:
    """The encoder is written."""

    encoder: Path
    standing: Standing
    stopped_early: bool


Event = Started | Step | Evaluated | Finished


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> Iterator[Event]:
    """Run a recipe, yielding what happens; leave the run folder `out` behind.

    Stopping the iteration early loses nothing that a checkpoint has seen; with `resume` the next call goes
    on from it and gives, on the same CPU with as many threads, the numbers of a run that was never stopped.

    Processes started by torchrun train together: each iterates over its own call. An error that one of them
    meets is raised there; the others cannot go on without it, and wait until torchrun ends them.

    Raises:
        ConfigError: `out` holds another run, or parts of the recipe do not fit together.
        DataError: the pictures cannot be used for training.
    """
    with processes.joined(recipe.train), run_folder(out, resume=resume):
        yield from Fit(recipe, out, resume=resume).events()


def train_final(recipe: Recipe, out: Path, *, resume: bool = False) -> Iterator[Event]:
    """Select on held-out classes, then train again on all classes for the chosen number of steps.

    The selected run is `out/selection`. The second model has seen every class, so nothing is left to measure
    it on: its encoder carries the selected model's figures, labelled as such.
    """
    with processes.joined(recipe.train):
        chosen: Standing | None = None
        for event in train(recipe, out / "selection", resume=resume):
            if isinstance(event, Finished):
                chosen = event.standing
            yield event
        assert chosen is not None  # train() always ends with Finished
        yield from train_on_everything(recipe, out, chosen, resume=resume)


def train_on_everything(recipe: Recipe, out: Path, chosen: Standing, *, resume: bool) -> Iterator[Event]:
    """The second half of `train_final`."""
    with run_folder(out, resume=resume):
        fit = Fit(recipe, out, resume=resume, steps=chosen.best_step)
        fit.figures_of = {
            "model": "selection",
            "note": "of the selected model, which was trained without the validation and test classes",
            "map_at_r": chosen.best_value,
        }
        yield from fit.events()


class Fit:
    """One run: its parts, made in order, and the three things it does."""

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool, steps: int | None = None) -> None:
        """Args: steps: train on all classes, selecting nothing, for so many; None: as the recipe says."""
        config = recipe.train
        self.recipe, self.out, self.everything = recipe, out, steps is not None
        self.figures_of: dict[str, Any] | None = None
        self.digest = recipe_digest(recipe)
        self.last, self.best = out / LAST, out / "checkpoints" / "best.safetensors"
        processes.check_accelerator(config)
        seed_everything(config.seed)
        self.table = open_table(recipe.data.source)
        self.splits = divide(self.table, recipe.data)
        records = all_records(self.splits) if self.everything else self.splits.train
        self.classes = sorted({r.label for r in records if r.label is not None})

        self.model = build_model(recipe.model, image_size=recipe.data.image_size)
        mean, std = self.model.input_stats
        self.preprocess = Preprocess(size=recipe.data.image_size, fit=recipe.data.fit, mean=mean, std=std)
        self.source = ImageSource(records, classes=self.classes, config=recipe.data, mean=mean, std=std)
        objective = build_objective(
            recipe, num_classes=len(self.classes), dim=self.model.dim, channels=self.model.channels
        )
        self.fabric = processes.make_fabric(config, search_unused=self.some_unused(objective))
        self.batches = self.make_batches()
        self.total = config.epochs * len(self.batches) if steps is None else steps
        processes.check_same(processes.from_everyone(self.identity()))
        self.synchronize_batch_norm()
        learner = Learner(self.model, objective)
        optimizer = make_optimizer(learner, config)
        self.learner, self.optimizer = self.fabric.setup(learner, optimizer)
        if processes.process_rank():  # else dropout would draw the same for every process
            seed_everything(config.seed + processes.process_rank() * 1_000_003)
        self.standing = Standing()
        if resume and processes.from_first(self.last.exists()):
            self.standing = load_checkpoint(self.last, self.learner, self.optimizer, self.identity())
        self.bad: list[BadImage] = list(self.source.bad)
        self.validation = (
            None if self.everything else Validation(self.splits.validation, self.preprocess, recipe, self.bad)
        )
        read = len(records) + (0 if self.everything else len(self.splits.validation))
        check_share(self.bad, read, recipe.data.max_bad_share)
        if processes.is_first():
            self.write_description()

    def make_batches(self) -> TrainingBatches:
        """The training pictures, cut into batches, of which this process gets its slice."""
        config, classes = self.recipe.train, len(self.classes)
        classes_per_batch, images_per_class = batch_shape(config, classes)
        processes.check_batch(classes_per_batch, images_per_class, available=classes)
        sampler = ClassBalancedSampler(
            self.source.labels.numpy(),
            classes_per_batch=classes_per_batch,
            images_per_class=images_per_class,
            steps_per_epoch=config.steps_per_epoch,
            seed=config.seed,
        )
        return training_batches(
            self.source,
            sampler,
            build_augmentation(self.recipe.data.augmentation),
            seed=config.seed,
            device=self.fabric.device,
            part=processes.process_rank(),
            parts=processes.process_count(),
        )

    def some_unused(self, objective: Objective) -> bool:
        """Whether there may be parameters that a step leaves without a gradient, for which the processes
        would wait in vain."""
        if processes.process_count() == 1:
            return False
        if not isinstance(objective, Supervised):
            return True
        foreign = [m for m in objective.modules() if any(True for _ in m.parameters(recurse=False))]
        known = ("dml.", "torch.", "pytorch_metric_learning.")
        if not all(type(m).__module__.startswith(known) for m in foreign):
            return True
        size = self.recipe.data.image_size
        return bool(processes.unreached(self.model, torch.zeros(2, 3, size, size), objective.reads()))

    def synchronize_batch_norm(self) -> None:
        """Raises ConfigError: it was asked for on a CPU."""
        if not self.recipe.train.sync_batch_norm or processes.process_count() == 1:
            return
        if self.fabric.device.type != "cuda":
            raise ConfigError(
                "train.sync_batch_norm works on GPUs only, and this run is on the CPU. Set it to false, and "
                "model.freeze_batch_norm to true where the numbers must not depend on the processes."
            )
        self.model.synchronize_batch_norm()

    def events(self) -> Iterator[Event]:
        """The whole run."""
        yield self.started()
        yield from self.run()
        yield self.finish()

    def started(self) -> Started:
        return Started(
            table=self.table,
            splits=self.splits,
            images=len(self.source.records),
            classes=len(self.classes),
            bad=tuple(self.bad),
            parameters=sum(p.numel() for p in self.model.parameters()),
            total_steps=self.total,
            resumed_at=self.standing.step,
            device=self.fabric.device,
            processes=processes.process_count(),
        )

    def identity(self) -> dict[str, str]:
        """What must be the same for a checkpoint to be gone on from."""
        classes = hashlib.sha256("\0".join(self.classes).encode()).hexdigest()[:16]
        return {
            "the recipe": self.digest,
            "the pictures or their split": self.splits.digest,
            "the classes": classes,
            "its kind": f"all classes, {self.total} steps" if self.everything else "selecting",
        }

    def run(self) -> Iterator[Step | Evaluated]:
        """Train to the end, or until nothing gets better any more."""
        config, standing = self.recipe.train, self.standing
        began = time.monotonic() - standing.seconds
        writes = processes.is_first()
        with Log(self.out, keep_up_to=standing.step) if writes else nullcontext() as log:
            for step in self.steps():
                standing.step, standing.seconds = step.number, time.monotonic() - began
                if log is not None:
                    log.step(step, standing.seconds)
                self.refuse_divergence(step)
                yield step
                last = step.number == self.total
                if step.number % len(self.batches) and not last:
                    continue
                self.after_epoch()
                epoch = step.epoch + 1
                if self.validation is not None and (epoch % config.evaluate_every == 0 or last):
                    yield self.evaluate(step, log)
                if epoch % config.checkpoint_every == 0 or last or self.out_of_patience():
                    if log is not None:
                        log.flush()
                    self.save()
                if self.out_of_patience():
                    return

    def after_epoch(self) -> None:
        """Bring together what each process has found out on its own slices."""
        if processes.process_count() == 1:
            return
        processes.average_running_statistics(self.model)
        found = {bad.path: bad for part in processes.from_everyone(self.source.bad) for bad in part}
        self.source.bad[:] = found.values()
        check_share(self.source.bad, len(self.source) + len(self.source.bad), self.recipe.data.max_bad_share)

    def out_of_patience(self) -> bool:
        return 0 < self.recipe.train.patience <= self.standing.evaluations_since_best

    def refuse_divergence(self, step: Step) -> None:
        """Raises TrainingDiverged: behind a loss or a weight that is no number, everything would be none.

        A mining loss hides broken weights: no pair of theirs compares as hard, and it returns 0. They are
        looked at too before they are measured or kept.
        """
        broken = not math.isfinite(float(step.terms["loss"]))
        if not broken and (step.number % len(self.batches) == 0 or step.number == self.total):
            broken = not all(bool(p.isfinite().all()) for p in self.learner.parameters())
        if broken:
            raise TrainingDiverged(
                f"Loss or weights are no numbers any more at step {step.number}, epoch {step.epoch + 1}. "
                f"Lower train.learning_rate (now {self.recipe.train.learning_rate:g}), or shorten long "
                f"gradients: --set train.clip_norm=1. {self.last} is from before."
            )

    def steps(self) -> Iterator[Step]:
        if self.standing.step >= self.total or self.out_of_patience():
            return iter(())
        return steps(
            self.fabric,
            self.learner,
            self.batches,
            self.optimizer,
            learning_rate_schedule(self.recipe.train),
            total=self.total,
            start=self.standing.step,
            clip_norm=self.recipe.train.clip_norm,
        )

    def evaluate(self, step: Step, log: "Log | None") -> Evaluated:
        """Measure on the validation split; keep the weights when they are the best so far.

        Every process gets the first one's figures, so that all agree on the best and on when to stop.
        """
        assert self.validation is not None
        figures = self.validation.figures(self.model, self.fabric.device)
        better = figures["map_at_r"] > self.standing.best_value
        if better:
            self.standing.best_value = figures["map_at_r"]
            self.standing.best_step, self.standing.best_epoch = step.number, step.epoch
            self.standing.evaluations_since_best = 0
            self.keep_weights()
        else:
            self.standing.evaluations_since_best += 1
        if log is not None:
            log.evaluation(step, figures, self.standing.seconds)
        return Evaluated(step.number, step.epoch, figures, better)

    def keep_weights(self) -> None:
        if not processes.is_first():
            return
        weights = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        write_aside(self.best, lambda aside: save_file(weights, aside))

    def save(self) -> None:
        others = processes.to_first(randomness())[1:]
        if processes.is_first():
            save_checkpoint(
                self.last, self.learner, self.optimizer, self.standing, self.identity(), others=others
            )

    def finish(self) -> Finished:
        """Write the encoder of the best weights (of the last ones where nothing was selected)."""
        best = self.validation is not None and processes.from_first(self.best.exists())
        if not best:
            self.standing.best_step = self.standing.step
        encoder = self.out / "encoder"
        if processes.is_first():
            if best:
                self.model.load_state_dict(load_file(self.best))
            self.write_encoder(encoder)
        processes.from_first(None)  # the others wait
        return Finished(encoder, self.standing, stopped_early=self.standing.step < self.total)

    def write_encoder(self, encoder: Path) -> None:
        self.model.to("cpu").eval()
        save_encoder(
            self.model,
            self.preprocess,
            encoder,
            provenance=self.provenance(),
            classes=self.classes,
            model_config=self.recipe.model,
            image_size=self.recipe.data.image_size,
        )

    def provenance(self) -> dict[str, Any]:
        figures = self.figures_of or {
            "model": "this",
            "note": f"validation split, {self.splits.protocol}",
            "map_at_r": self.standing.best_value,
        }
        return {
            "recipe": recipe_tree(self.recipe),
            "recipe_digest": self.digest,
            "protocol": self.splits.protocol,
            "split_digest": self.splits.digest,
            "trained_on": "all classes" if self.everything else "the training split",
            "step": self.standing.best_step,
            "figures": figures,
        }

    def write_description(self) -> None:
        """Everything that says what this run is, before its first step."""
        texts = {
            "recipe.toml": tomli_w.dumps(recipe_tree(self.recipe)),
            "splits.json": self.splits.to_json(),
            "environment.json": json.dumps(environment(self.fabric.device), indent=1),
            "bad_images.csv": csv_text([("path", "reason"), *((b.path, b.reason) for b in self.bad)]),
        }
        for name, text in texts.items():
            write_aside(self.out / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


def csv_text(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as the text of a CSV file."""
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


class Validation:
    """The held-out split, decoded once when it fits in memory, measured again and again.

    Several processes share the embedding; the first compares and measures.
    """

    def __init__(
        self, records: Sequence[Record], preprocess: Preprocess, recipe: Recipe, bad: list[BadImage]
    ) -> None:
        self.records, self.preprocess = records, preprocess
        self.workers = recipe.data.workers
        labels = sorted({r.label for r in records if r.label is not None})
        index = {label: number for number, label in enumerate(labels)}
        self.labels = np.array([index[r.label] for r in records if r.label is not None])
        turns = np.arange(len(records)) // VALIDATION_BATCH % processes.process_count()
        self.own = np.flatnonzero(turns == processes.process_rank())  # positions that this process embeds
        bytes_needed = len(records) * 3 * preprocess.size**2 * 4
        self.kept = None
        if bytes_needed <= recipe.data.memory_gb * 1e9 / 2:
            found: list[BadImage] = []
            self.kept = list(self.read(found))
            bad += [b for part in processes.from_everyone(found) for b in part]

    def read(self, bad: list[BadImage]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions in the split, pictures), in batches, of what this process embeds."""
        records = [self.records[i] for i in self.own.tolist()]
        made = batches_of(
            records, self.preprocess, batch_size=VALIDATION_BATCH, workers=self.workers, bad=bad
        )
        return ((self.own[rows], pixels) for rows, pixels in made)

    def figures(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """MAP@R, R-Precision and Recall@1, 2, 4, 8 of the split searched in itself."""
        parts = processes.to_first(self.embed(model, device))
        measured = self.measure(parts) if processes.is_first() else {}
        return processes.from_first(measured)

    @torch.no_grad()
    def embed(self, model: torch.nn.Module, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions and (n, D) unit embeddings of what this process embeds."""
        training = model.training
        model.eval()
        rows, vectors = [], []
        for positions, pixels in self.kept if self.kept is not None else self.read([]):
            rows.append(positions)
            vectors.append(model(torch.from_numpy(pixels).to(device)).unit.float().cpu().numpy())
        model.train(training)
        if not rows:
            return np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float32)
        return np.concatenate(rows), np.concatenate(vectors)

    def measure(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """The figures of what all processes have embedded, in the order of the split."""
        parts = [part for part in parts if len(part[0])]
        rows, vectors = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(rows)
        metrics = retrieval_metrics(vectors[order], self.labels[rows[order]])
        recalls = {f"recall_at_{k}": value for k, value in metrics.recall.items()}
        return {"map_at_r": metrics.map_at_r, "r_precision": metrics.r_precision, **recalls}


class Log:
    """metrics.jsonl and TensorBoard, side by side. What lies behind the resumed checkpoint is dropped.

    Raises:
        StorageError: from every method, when the disk is full or refuses.
    """

    def __init__(self, out: Path, *, keep_up_to: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.path = out / "metrics.jsonl"
        kept = []
        if keep_up_to and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if whole_line_up_to(line, keep_up_to)]
        write_aside(self.path, lambda aside: aside.write_text("".join(line + "\n" for line in kept)))
        with self.guarded():
            self.lines = self.path.open("a")
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=keep_up_to + 1)

    def guarded(self) -> AbstractContextManager[None]:
        return storage_errors(self.path, intact="The run's last checkpoint is whole.")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        with self.guarded(), self.lines:
            self.board.close()

    def step(self, step: Step, seconds: float) -> None:
        terms = {name: round(float(term), 6) for name, term in step.terms.items()}
        rate = step.learning_rate
        self.write({"step": step.number, "epoch": step.epoch, "learning_rate": rate, **terms}, seconds)
        self.draw("train", {**terms, "learning_rate": rate}, step)

    def evaluation(self, step: Step, figures: dict[str, float], seconds: float) -> None:
        self.write({"step": step.number, "epoch": step.epoch, "validation": figures}, seconds)
        self.draw("validation", figures, step)
        self.flush()

    def flush(self) -> None:
        """Before a checkpoint: what it keeps must be in the log too."""
        with self.guarded():
            self.lines.flush()

    def write(self, entry: dict[str, Any], seconds: float) -> None:
        with self.guarded():
            self.lines.write(json.dumps({**entry, "seconds": round(seconds, 3)}) + "\n")

    def draw(self, group: str, values: Mapping[str, float], step: Step) -> None:
        with self.guarded():
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step.number)


def whole_line_up_to(line: str, step: int) -> bool:
    """Whether a log line is complete (a kill may cut one) and belongs to the steps that are kept."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False


@contextmanager
def run_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Make the run folder and keep it for this process; refuse to write over anything.

    Of several processes the first does so for all.
    """
    if not processes.is_first():
        yield
        return
    if out.is_file():
        raise ConfigError(f"{out} is a file; --out must be a folder.")
    if (out / LAST).exists() and not resume:
        raise ConfigError(
            f"{out} already holds a run. Go on with it: --resume auto. Start another: choose another --out, "
            f"or delete the folder."
        )
    ours = {"checkpoints", "selection", LOCK}
    if out.is_dir() and (found := {p.name for p in out.iterdir()}) and not found & ours:
        raise ConfigError(f"{out} is not empty and holds no run. Choose another --out; nothing was changed.")
    with ExitStack() as stack:
        new = not out.exists()
        try:
            stack.enter_context(no_empty_folders(out))
            (out / LAST).parent.mkdir(exist_ok=True)
            lock = stack.enter_context((out / LOCK).open("w"))
        except OSError as error:
            raise ConfigError(f"The run folder {out} cannot be made: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another process is training in {out}. Wait for it, or choose another --out."
            ) from None
        try:
            yield
        except BaseException:
            if new:
                clear_unused(out)
            raise


def clear_unused(out: Path) -> None:
    """Empty a run folder in which nothing has been written: the data or the recipe were refused."""
    held = {path.name for path in out.iterdir()}
    if held <= {"checkpoints", LOCK} and not any((out / LAST).parent.iterdir()):
        (out / LAST).parent.rmdir()
        (out / LOCK).unlink()


def batch_shape(config: TrainConfig, classes: int) -> tuple[int, int]:
    """Classes and images of each in a batch: as asked, or all classes with more images where too few."""
    if classes >= config.classes_per_batch:
        return config.classes_per_batch, config.images_per_class
    size = config.classes_per_batch * config.images_per_class
    return classes, max(config.images_per_class, math.ceil(size / classes))


def all_records(splits: Splits) -> tuple[Record, ...]:
    """Every labelled picture, whatever its split."""
    parts = (splits.train, splits.validation, splits.test, splits.query, splits.gallery)
    return tuple(record for part in parts for record in part)


def seed_everything(seed: int) -> None:
    """Seed what draws without being given a generator: initial weights, dropout."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from it)
    torch.manual_seed(seed)


def recipe_digest(recipe: Recipe) -> str:
    """A hash of the effective recipe: equal for runs that would give the same numbers."""
    return hashlib.sha256(json.dumps(recipe_tree(recipe), sort_keys=True).encode()).hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    versions = {}
    for package in ("dml", *PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": versions,
    }


def check_source(recipe: Recipe) -> None:
    """Raises DataError: neither the recipe nor the command line says which pictures."""
    if not recipe.data.source:
        raise DataError("No data: give a folder, a manifest or the name of a data set (dml list datasets).")
