"""Learn from labels: embed, clean, augment, remember, compare, regularise."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dml.config import Part, Recipe
from dml.data.batch import Batch
from dml.errors import ConfigError, DataError
from dml.losses import build_loss
from dml.losses.kernel import PairLoss
from dml.losses.pairs import IndicesTuple, relate, unit_rows
from dml.models.output import Output
from dml.registry import check_arguments, construct, resolve
from dml.training import METHODS, STAGES
from dml.training.objective import Batches, Candidates, Objective, Progress
from dml.training.processes import connected, everyones, everyones_with_gradient


class Supervised(Objective):
    """A metric-learning loss, with optional stages between the model and the loss.

    One step: the model embeds the batch; `clean` drops rows; `augment` and `memory` add candidates; the loss
    compares the remaining rows with the batch and all candidates; regularisers add weighted terms; the batch
    is remembered.

    Where several processes train together, all this happens on the batches of all of them, gathered behind
    the model: every process computes the same, on the rows that one process would have seen, and no stage
    has to know. A stage's own random numbers must then be the same everywhere; IAA's are.

    Args:
        loss: ours, pytorch-metric-learning's or any other; see `adapt`.
        clean: (unit, labels, ids) -> (B,) bool, rows to trust.
        augment: (raw, labels, ids) -> Candidates (raw), or None.
        memory: () -> Candidates (unit), or None; and `add(unit, labels, ids)`.
        regularizers: name -> module (field, labels) -> () tensor, where its attribute `reads` names a field
            of the model's output ("unit" if it has none).
        weights: name -> factor of that term in the sum; 1 where missing.

    Terms returned, all scalars: "loss" (the sum, to minimise), "metric" (the loss proper), each regulariser
    by its name (without its weight) and what it tells about itself as "name/what", and where such a stage is
    there: "kept" (share of rows trusted), "synthetic" and "remembered" (numbers of candidates).
    """

    def __init__(
        self,
        loss: nn.Module,
        clean: nn.Module | None = None,
        augment: nn.Module | None = None,
        memory: nn.Module | None = None,
        regularizers: Mapping[str, nn.Module] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.clean, self.augment, self.memory = adapt(loss), clean, augment, memory
        self.regularizers = nn.ModuleDict(dict(regularizers or {}))
        self.weights = dict.fromkeys(self.regularizers, 1.0) | dict(weights or {})

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if batch.labels is None:
            raise DataError("Supervised training needs labels, and a batch came without any.")
        output: Output = model(batch.inputs)
        if connected():
            output, batch = self.gather(output, batch)
        labels, ids = batch.labels, batch.ids
        assert labels is not None
        terms: dict[str, Tensor] = {}
        keep = self.trusted(output, labels, batch)
        if keep is not None:
            output, labels, ids = output[keep], labels[keep], ids[keep]
            terms["kept"] = keep.float().mean()
        terms["metric"] = self.compare(output, labels, ids, terms)
        total = terms["metric"]
        for name, regularizer in self.regularizers.items():
            terms[name] = regularizer(self.read(output, name, regularizer), labels)
            total = total + self.weights[name] * terms[name]
            for what, value in getattr(regularizer, "diagnostics", {}).items():
                terms[f"{name}/{what}"] = value
        if self.memory is not None and self.training:
            self.memory.add(output.unit.detach(), labels, ids)  # type: ignore[operator]
        return {"loss": total, **terms}

    def gather(self, output: Output, batch: Batch) -> tuple[Output, Batch]:
        """What all processes have embedded, as one batch; only own rows are attached to the model.

        Its `inputs` stay those of this process: nobody reads them any more.
        """
        rows = {name: getattr(output, name) for name in self.reads()}
        known = {name: getattr(batch, name) for name in ("ids", "labels", "labelled")}
        return (
            Output(**{name: everyones_with_gradient(row) for name, row in rows.items() if row is not None}),
            replace(batch, **{name: everyones(part) for name, part in known.items() if part is not None}),
        )

    def reads(self) -> tuple[str, ...]:
        """The fields of the model's output that the loss, a stage or a regulariser looks at.

        In one order in every process: gathering pairs the first with the first, whatever it is.
        """
        fields = {"raw", "unit"} | {getattr(r, "reads", "unit") for r in self.regularizers.values()}
        return tuple(sorted(fields))

    def trusted(self, output: Output, labels: Tensor, batch: Batch) -> Tensor | None:
        """(B,) bool rows that are labelled and that the cleaner trusts; None: all, nobody asked."""
        keep = batch.labelled
        if self.clean is not None:
            clean = self.clean(output.unit.detach(), labels, batch.ids)
            keep = clean if keep is None else clean & keep
        return keep

    def compare(self, output: Output, labels: Tensor, ids: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The loss of the batch beside all its candidates, whose numbers are noted in `terms`."""
        rows = output.raw if self.loss.takes == "raw" else output.unit
        if not len(rows):
            # Nobody was trusted: 0, still connected to everything that learns.
            return rows.sum() + nothing_of(self.loss, rows)
        parts = [Candidates(rows, labels, ids)]
        if self.augment is not None:
            synthetic = self.augment(output.raw, labels, ids)
            terms["synthetic"] = rows.new_tensor(0 if synthetic is None else len(synthetic.ids))
            if synthetic is not None:
                made = synthetic.embeddings
                if self.loss.takes == "unit" and not isinstance(self.loss, PairLoss):
                    made = unit_rows(made)
                parts.append(synthetic._replace(embeddings=made.to(rows.dtype)))
        if self.memory is not None:
            remembered = self.memory()
            terms["remembered"] = rows.new_tensor(0 if remembered is None else len(remembered.ids))
            if remembered is not None:
                parts.append(remembered._replace(embeddings=remembered.embeddings.to(rows.dtype)))
        if len(parts) == 1:
            return self.loss(rows, labels, ids=ids)
        columns, *known = zip(*parts, strict=True)
        every_label, every_id = (torch.cat(column) for column in known)
        # Ours take parts as they are: a copy of a large memory in each step would cost more than the loss.
        everyone = columns if isinstance(self.loss, PairLoss) else torch.cat(columns)
        if not self.loss.candidates:
            return self.loss(everyone, every_label, ids=every_id)
        return self.loss(rows, labels, None, everyone, every_label, ids=ids, ref_ids=every_id)

    def read(self, output: Output, name: str, regularizer: nn.Module) -> Tensor:
        """The field of the model's output that a regulariser looks at."""
        field = getattr(regularizer, "reads", "unit")
        value = getattr(output, field)
        if value is None:
            raise ConfigError(
                f'The regulariser "{name}" reads the model\'s {field}, and this model makes none; '
                f'for the attention set model.attention to "branch" or "gate".'
            )
        return value

    def stages(self) -> Iterator[nn.Module]:
        """The loss, the stages and the regularisers that are there."""
        optional = (self.loss, self.clean, self.augment, self.memory)
        yield from (stage for stage in optional if stage is not None)
        yield from self.regularizers.values()

    def before_epoch(self, model: nn.Module, batches: Batches, progress: Progress) -> None:
        for stage in self.stages():
            if callable(hook := getattr(stage, "before_epoch", None)):
                hook(model, batches, progress)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        for stage in self.stages():
            if callable(hook := getattr(stage, "after_step", None)):
                hook(model, progress)


Kind = Literal["ours", "pairs", "classes", "listwise"]


class Adapter(nn.Module):
    """Gives a loss from elsewhere the call signature of ours.

    Args:
        loss: the foreign module.
        kind: how it is called:
            "pairs" takes candidates, and gets its pairs as an `indices_tuple` made from labels and ids;
            "classes" compares with proxies or class weights of its own; synthetic rows reach it as samples;
            "listwise" compares the rows of one batch with each other, and is told nothing else.
    """

    def __init__(self, loss: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.loss, self.kind = loss, kind
        self.candidates = kind == "pairs"
        self.takes = "raw" if kind == "classes" else "unit"

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:
        if labels.ndim != 1:
            raise DataError(
                f"{type(self.loss).__name__} needs one class per image, got labels {tuple(labels.shape)}; "
                f"with several labels per image use one of our pair losses."
            )
        # pytorch-metric-learning casts its proxies to the embeddings' type for good: never to half precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            if self.kind != "pairs":
                value = self.loss(embeddings, labels)
            else:
                if indices_tuple is None:
                    positive, negative, _ = relate(labels, ref_labels, ids, ref_ids)
                    indices_tuple = (*positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True))
                if ref_emb is not None:
                    ref_emb = ref_emb.to(embeddings.dtype)
                value = self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        # A loss that finds nothing to compare may return a bare 0, and the optimiser needs a gradient.
        if value.requires_grad:
            return value
        return value + 0 * embeddings.sum() + nothing_of(self.loss, embeddings)


def nothing_of(module: nn.Module, like: Tensor) -> Tensor:
    """0, with a gradient of 0 for each of a module's parameters: all processes wait for each of them."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return sum((0 * p.sum() for p in parameters), start=like.new_zeros(()))


LIBRARY = "BaseMetricLossFunction"
"""Base of pytorch-metric-learning's losses, by name, so that the library loads only when used."""
BY_PAIRS = frozenset({"GenericPairLoss", "TripletMarginLoss", "MarginLoss"})
"""Bases and losses there that compare exactly the pairs of `indices_tuple`; others take it as weights."""
WITH_CLASSES = frozenset({"WeightRegularizerMixin", "P2SGradLoss"})
"""Its bases and losses that hold proxies or class weights."""


def adapt(loss: nn.Module) -> nn.Module:
    """A loss with the call signature of ours: itself if it has it, else wrapped.

    Ours are recognised by taking `ref_ids`; others with `ref_emb` are taken for pair losses in the manner of
    pytorch-metric-learning, and anything else is called with (embeddings, labels) alone.
    """
    kind = kind_of(loss)
    if kind != "ours":
        return Adapter(loss, kind)
    for name, value in (("takes", "unit"), ("candidates", True)):
        if not hasattr(loss, name):
            setattr(loss, name, value)
    return loss


def kind_of(loss: nn.Module) -> Kind:
    """How a loss wants to be called; see `Adapter`."""
    parameters = inspect.signature(loss.forward).parameters
    bases = {base.__name__ for base in type(loss).__mro__}
    if "ref_ids" in parameters:
        return "ours"
    if LIBRARY in bases:
        return "classes" if bases & WITH_CLASSES else "pairs" if bases & BY_PAIRS else "listwise"
    return "pairs" if "ref_emb" in parameters else "listwise"


def build_objective(recipe: Recipe, *, num_classes: int, dim: int, channels: int) -> Objective:
    """Make the objective of a recipe.

    Args:
        recipe: its `method`, `loss`, stages and `train.seed`.
        num_classes: classes of the training split.
        dim: length of the model's embedding.
        channels: channels of the model's feature map.

    Raises:
        ConfigError: an unknown name or argument, or parts that cannot work together, with the reason.
    """
    build = resolve("method", recipe.method.name, METHODS)
    check_arguments("method", recipe.method.name, build, recipe.method.args)
    return build(recipe, num_classes=num_classes, dim=dim, channels=channels, **recipe.method.args)


def build_supervised(recipe: Recipe, *, num_classes: int, dim: int, channels: int) -> Supervised:
    """Make the supervised objective of a recipe; see `build_objective`."""
    loss = adapt(build_loss(recipe.loss, num_classes=num_classes, dim=dim))
    refuse_impossible(recipe, loss)
    context = {
        "num_classes": num_classes,
        "dim": dim,
        "channels": channels,
        "seed": recipe.train.seed,
    }

    def stage(section: str, part: Part | None) -> nn.Module | None:
        if part is None:
            return None
        return construct(f"{section} stage", part.name, part.args, STAGES[section], context)

    regularizers = {
        name: construct("regulariser", name, term.args, STAGES["regularizers"], context)
        for name, term in recipe.regularizers.items()
    }
    return Supervised(
        loss,
        clean=stage("clean", recipe.clean),
        augment=stage("augment", recipe.augment),
        memory=stage("memory", recipe.memory),
        regularizers=regularizers,
        weights={name: term.weight for name, term in recipe.regularizers.items()},
    )


def refuse_impossible(recipe: Recipe, loss: nn.Module) -> None:
    """Raise ConfigError for a loss and stages that cannot work together, and say why."""
    name, kind = recipe.loss.name, getattr(loss, "kind", "ours")
    with_classes = kind == "classes" or (kind == "ours" and not loss.candidates)
    takers = "one of multi_similarity, contrastive_bayesian, contrastive, triplet"
    if recipe.memory is not None and not loss.candidates:
        reason = (
            "it compares images with its own class weights, which already remember every class"
            if with_classes
            else "it ranks one batch within itself and takes no further candidates"
        )
        raise ConfigError(
            f'The loss "{name}" cannot use a memory: {reason}. '
            f"Remove [memory], or take a loss that compares pairs: {takers}."
        )
    if recipe.memory is not None and (reason := getattr(loss, "against_memory", "")):
        raise ConfigError(f'The loss "{name}" with these settings cannot use a memory: {reason}.')
    if recipe.augment is not None and not loss.candidates and not with_classes:
        raise ConfigError(
            f'The loss "{name}" cannot use [augment]: it ranks one batch within itself, so synthetic rows '
            f"would become anchors, and positives of their own image. Remove [augment], or take a loss that "
            f"compares pairs: {takers}; or one with proxies or class weights."
        )
    negative = {n: t.weight for n, t in recipe.regularizers.items() if t.weight < 0}
    if negative:
        raise ConfigError(f"Weights of regularisers must be at least 0, got {negative}.")
