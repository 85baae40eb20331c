"""The supervised objective: every loss with every stage trains, or is refused with the reason."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dml.config import Part, Recipe, Term, TrainConfig, load_recipe, recipe_names
from dml.data.batch import Batch
from dml.errors import ConfigError, DataError
from dml.losses import LOSSES, ContrastiveBayesianLoss, MultiSimilarityLoss
from dml.losses.channel_correlation import ChannelCorrelation
from dml.models.output import Output
from dml.training import AUGMENTERS, CLEANERS, DESCRIPTIONS, MEMORIES, METHODS, REGULARIZERS
from dml.training.objective import Candidates, Progress
from dml.training.supervised import Supervised, adapt, build_objective


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


CLASSES, DIM, CHANNELS = 6, 8, 5
INTRA_CLASS = Part("intra_class", {"start": 0.0, "copies": 2})
MEMORY = Part("cross_batch", {"start": 0.0, "size": 40})
STAGES = {
    "none": {},
    "IAA": {"augment": INTRA_CLASS},
    "memory": {"memory": MEMORY},
    "both": {"augment": INTRA_CLASS, "memory": MEMORY},
}
WITH_CLASSES = {
    "cross_entropy",
    "proxy_nca",
    "proxy_anchor",
    "soft_triple",
    "normalized_softmax",
    "arcface",
    "subcenter_arcface",
    "cosface",
}
LISTWISE = {"nca", "fast_ap", "smooth_ap"}


class Net(nn.Module):
    """A small embedding with a channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(10, DIM), nn.BatchNorm1d(DIM)
        self.attention = nn.Linear(10, CHANNELS)

    def forward(self, inputs: torch.Tensor) -> Output:
        raw = self.norm(self.linear(inputs))
        return Output(raw, F.normalize(raw), attention=torch.sigmoid(self.attention(inputs)))


def training_set(seed: int = 0) -> list[Batch]:
    """Three batches of 4 classes × 4 images around class centres."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 10, generator=generator)
    labels = torch.arange(48) // 4 % CLASSES
    inputs = centers[labels] + 0.7 * torch.randn(48, 10, generator=generator)
    return [Batch(ids=rows, inputs=inputs[rows], labels=labels[rows]) for rows in torch.arange(48).split(16)]


def objective_of(recipe: Recipe):
    return build_objective(recipe, num_classes=CLASSES, dim=DIM, channels=CHANNELS)


def train(recipe: Recipe, epochs: int = 2, seed: int = 0, device: str = "cpu"):
    """Run a recipe on the small set; returns the objective, the model and the terms of each step."""
    torch.manual_seed(seed)
    model, objective, log = Net().to(device), objective_of(recipe).to(device), []
    groups = [{"params": list(model.parameters())}]
    if objective.loss_parameters():
        groups.append({"params": objective.loss_parameters(), "lr": 0.1})
    optimizer = torch.optim.SGD(groups, lr=0.05)
    batches, step = [batch.to(device) for batch in training_set()], 0
    for epoch in range(epochs):
        objective.before_epoch(model, lambda: iter(batches), Progress(epoch, epochs, step, epochs * 3))
        for batch in batches:
            terms = objective(model, batch)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            step += 1
            objective.after_step(model, Progress(epoch, epochs, step, epochs * 3))
            log.append({name: term.item() for name, term in terms.items()})
    return objective, model, log


def recipe_of(name: str, stages: str) -> Recipe:
    """A loss with some stages; beside a memory CBML must average its metric variance."""
    memory = name == "contrastive_bayesian" and "memory" in STAGES[stages]
    return Recipe(loss=Part(name, {"variance_reduction": "mean"} if memory else {}), **STAGES[stages])


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_with_every_stage_or_says_why_not(name, stages):
    recipe = recipe_of(name, stages)
    refused = (name in LISTWISE and stages != "none") or (
        name in WITH_CLASSES and "memory" in recipe_stages(recipe)
    )
    if refused:
        reason = "class weights" if name in WITH_CLASSES else "ranks one batch within itself"
        with pytest.raises(ConfigError, match=f'The loss "{name}" cannot use .*{reason}.*Remove \\['):
            objective_of(recipe)
        return
    objective, model, log = train(recipe)
    for parameter in [*model.linear.parameters(), *objective.loss_parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert model.linear.weight.grad.any()
    assert all(torch.isfinite(torch.tensor(list(terms.values()))).all() for terms in log)
    if recipe.augment is not None:
        assert log[-1]["synthetic"] == 32
    if recipe.memory is not None:
        assert [terms["remembered"] for terms in log] == [0, 16, 32, 40, 40, 40]


def test_a_sum_over_all_remembered_negatives_is_refused():
    with pytest.raises(ConfigError, match='"contrastive_bayesian" .*memory: .*variance_reduction = "mean"'):
        objective_of(Recipe(loss=Part("contrastive_bayesian"), memory=MEMORY))
    objective_of(Recipe(loss=Part("contrastive_bayesian", {"variance_weight": 0.0}), memory=MEMORY))


def recipe_stages(recipe: Recipe) -> set[str]:
    return {name for name in ("augment", "memory") if getattr(recipe, name) is not None}


@pytest.mark.parametrize("name", sorted(WITH_CLASSES))
def test_proxies_and_classifiers_have_parameters_of_their_own_that_learn(name):
    before = objective_of_seeded(name).loss_parameters()
    objective, _, _ = train(Recipe(loss=Part(name)))
    after = objective.loss_parameters()
    assert before
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def objective_of_seeded(name: str):
    torch.manual_seed(0)
    Net()
    return objective_of(Recipe(loss=Part(name)))


def test_pair_losses_have_no_parameters_of_their_own():
    assert objective_of(Recipe(augment=INTRA_CLASS, memory=MEMORY)).loss_parameters() == []


# -------- what the loss gets to see


class Spy(nn.Module):
    """A loss of our kind that writes down what it is given."""

    takes, candidates = "unit", True

    def forward(
        self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None, *, ids=None, ref_ids=None
    ):
        self.seen = (embeddings, labels, indices_tuple, ref_emb, ref_labels, ids, ref_ids)
        return embeddings.sum()


def test_the_candidates_are_batch_then_synthetic_rows_then_memory():
    recipe = Recipe(augment=INTRA_CLASS, memory=MEMORY)
    objective, model, _ = train(recipe)
    held = Candidates(*(column.clone() for column in objective.memory()))
    objective.loss = Spy()
    batch = training_set()[0]
    objective(model, batch)
    embeddings, labels, indices, ref_emb, ref_labels, ids, ref_ids = objective.loss.seen
    assert indices is None
    assert torch.equal(labels, batch.labels)
    assert torch.equal(ids, batch.ids)
    assert ref_emb.shape == (16 + 32 + 40, DIM)
    assert torch.equal(ref_emb[:16], embeddings)
    assert torch.equal(ref_emb[48:], held.embeddings)
    torch.testing.assert_close(ref_emb.norm(dim=1), torch.ones(88))
    assert torch.equal(ref_ids, torch.cat([batch.ids, batch.ids.repeat(2), held.ids]))
    assert torch.equal(ref_labels, torch.cat([batch.labels, batch.labels.repeat(2), held.labels]))


def test_a_batch_alone_is_compared_with_itself():
    objective, model = Supervised(Spy()), Net()
    objective(model, training_set()[0])
    assert objective.loss.seen[3] is None
    assert objective.loss.seen[5] is not None


class RawSpy(Spy):
    takes, candidates = "raw", False


def test_losses_without_candidates_get_raw_rows_with_the_synthetic_ones_as_samples():
    objective, model, _ = train(Recipe(loss=Part("cross_entropy"), augment=INTRA_CLASS))
    objective.loss = RawSpy()
    batch = training_set()[0]
    objective(model, batch)
    embeddings, labels, _, ref_emb, _, _, _ = objective.loss.seen
    assert ref_emb is None
    assert embeddings.shape == (48, DIM)
    assert torch.equal(labels, batch.labels.repeat(3))
    raw = model(batch.inputs).raw
    torch.testing.assert_close(embeddings[:16], raw)
    synthetic = objective.augment.synthesize(raw, batch.labels, batch.ids)
    torch.testing.assert_close(embeddings[16:], synthetic.embeddings)


def test_cross_entropy_sees_raw_embeddings():
    objective, model, _ = train(Recipe(loss=Part("cross_entropy")))
    batch = training_set()[0]
    expected = F.cross_entropy(objective.loss.classifier(model(batch.inputs).raw), batch.labels)
    torch.testing.assert_close(objective(model, batch)["loss"], expected)


def test_nothing_is_remembered_while_evaluating():
    objective, model, _ = train(Recipe(memory=MEMORY))
    before = objective.memory().ids
    objective.eval()
    objective(model, training_set(1)[0])
    assert torch.equal(objective.memory().ids, before)


# -------- foreign losses


@pytest.mark.parametrize(
    "name", ["circle", "lifted_structure", "nt_xent", "supcon", "margin", "tuplet_margin"]
)
def test_foreign_pair_losses_never_pair_an_image_with_itself(name):
    """Repeating the batch as candidates under the same ids must change nothing."""
    loss = adapt(build_loss_named(name))
    rows, labels, ids = torch.randn(12, DIM).double(), torch.arange(12) % 3, torch.arange(12)
    alone = loss(rows, labels, ids=ids)
    copies = loss(rows, labels, None, rows.clone(), labels.clone(), ids=ids, ref_ids=ids)
    torch.testing.assert_close(copies, alone)
    # Under another label, a copy is the nearest negative there is: only a stranger's may be noticed.
    given = (rows, labels, None, rows.clone(), (labels + 1) % 3)
    assert loss(*given, ids=ids, ref_ids=ids) < loss(*given, ids=ids, ref_ids=ids + 100)


def build_loss_named(name: str) -> nn.Module:
    from dml.losses import build_loss

    return build_loss(Part(name), num_classes=CLASSES, dim=DIM)


@pytest.mark.parametrize("name", ["nt_xent", "triplet", "proxy_anchor", "margin"])
def test_a_batch_without_pairs_still_has_a_gradient(name):
    objective = Supervised(build_loss_named(name))
    batch = Batch(torch.arange(3), torch.randn(3, 10), torch.tensor([0, 1, 2]))
    model = Net()
    objective(model, batch)["loss"].backward()
    assert model.linear.weight.grad.isfinite().all()


def test_proxies_stay_in_float32_under_autocast():
    objective, model = Supervised(build_loss_named("proxy_anchor")), Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective(model, training_set()[0])["loss"].backward()
    assert [p.dtype for p in objective.loss_parameters()] == [torch.float32]


class Plain(nn.Module):
    """What a user may write: embeddings and labels, nothing else."""

    def forward(self, embeddings, labels):
        return embeddings[:, 0].mean() + 0 * labels.sum()


def test_a_plain_loss_by_import_path_trains_and_is_refused_candidates():
    path = f"{__name__}:Plain"
    _, _, log = train(Recipe(loss=Part(path)))
    assert log[-1]["loss"] < log[0]["loss"]
    for stages in ({"augment": INTRA_CLASS}, {"memory": MEMORY}):
        with pytest.raises(ConfigError, match="ranks one batch within itself"):
            objective_of(Recipe(loss=Part(path), **stages))


class OfOurKind(nn.Module):
    """The full signature, without the two attributes that ours have."""

    def forward(
        self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None, *, ids=None, ref_ids=None
    ):
        return MultiSimilarityLoss()(
            embeddings, labels, indices_tuple, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids
        )


def test_a_loss_with_the_full_signature_by_import_path_is_one_of_ours():
    path = f"{__name__}:OfOurKind"
    stages = {"augment": INTRA_CLASS, "memory": MEMORY}
    theirs, ours = (train(recipe)[2] for recipe in (Recipe(loss=Part(path), **stages), Recipe(**stages)))
    for step, expected in zip(theirs, ours, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)


def test_foreign_losses_refuse_several_labels_per_image():
    loss = adapt(build_loss_named("circle"))
    with pytest.raises(DataError, match="CircleLoss needs one class per image"):
        loss(torch.randn(4, DIM), torch.eye(4))


# -------- regularisers, cleaners, labels


def recipe_with_correlation(weight: float, **args) -> Recipe:
    from dml.config import ModelConfig

    return Recipe(
        loss=Part("cross_entropy"),
        model=ModelConfig(attention="branch"),
        regularizers={"channel_correlation": Term(weight, args)},
    )


def test_the_loss_is_the_weighted_sum_of_its_terms():
    _, _, log = train(recipe_with_correlation(0.3, form="hinge"))
    for terms in log:
        assert terms["loss"] == pytest.approx(terms["metric"] + 0.3 * terms["channel_correlation"], abs=1e-6)
        assert terms["channel_correlation"] > 0


def test_a_weight_of_zero_is_the_loss_alone():
    _, with_zero, _ = train(recipe_with_correlation(0.0))
    _, without, _ = train(Recipe(loss=Part("cross_entropy")))
    assert torch.equal(with_zero.linear.weight, without.linear.weight)


def test_channel_correlation_reaches_the_attention():
    _, model, _ = train(recipe_with_correlation(1.0))
    torch.manual_seed(0)
    assert not torch.equal(model.attention.weight, Net().attention.weight)


def test_a_regulariser_without_what_it_reads_is_refused():
    class Bare(Net):
        def forward(self, inputs):
            output = super().forward(inputs)
            return Output(output.raw, output.unit)

    objective = Supervised(MultiSimilarityLoss(), regularizers={"channel_correlation": ChannelCorrelation()})
    with pytest.raises(ConfigError, match="reads the model's attention, and this model makes none"):
        objective(Bare(), training_set()[0])


def test_negative_weights_and_unknown_parts_are_refused():
    with pytest.raises(ConfigError, match="at least 0, got .*-1"):
        objective_of(recipe_with_correlation(-1))
    with pytest.raises(ConfigError, match='Unknown regulariser "channel_corelation".*Did you mean'):
        objective_of(Recipe(regularizers={"channel_corelation": Term()}))
    with pytest.raises(ConfigError, match='Unknown augment stage "intra_clas"'):
        objective_of(Recipe(augment=Part("intra_clas")))
    with pytest.raises(ConfigError, match='no argument "copys".*Did you mean "copies"'):
        objective_of(Recipe(augment=Part("intra_class", {"copys": 2})))
    with pytest.raises(ConfigError, match="size must be at least 1|at least 1"):
        objective_of(Recipe(memory=Part("cross_batch", {"size": 0})))
    with pytest.raises(ConfigError, match='Unknown method "supervized"'):
        objective_of(Recipe(method=Part("supervized")))
    with pytest.raises(ConfigError, match='method "supervised" has no argument "depth"'):
        objective_of(Recipe(method=Part("supervised", {"depth": 2})))


class EvenIds(nn.Module):
    def forward(self, unit, labels, ids):
        assert not unit.requires_grad
        return ids % 2 == 0


def test_rows_that_the_cleaner_drops_are_neither_anchors_nor_candidates_nor_remembered():
    recipe = Recipe(clean=Part(f"{__name__}:EvenIds"), augment=INTRA_CLASS, memory=MEMORY)
    objective, _, log = train(recipe)
    assert log[-1]["kept"] == 0.5
    assert log[-1]["synthetic"] == 16
    assert (objective.memory().ids % 2 == 0).all()


class Nobody(nn.Module):
    def forward(self, unit, labels, ids):
        return torch.zeros_like(ids, dtype=torch.bool)


def test_a_batch_that_nobody_trusts_costs_nothing():
    stages = {"augment": INTRA_CLASS, "memory": MEMORY}
    recipe = Recipe(clean=Part(f"{__name__}:Nobody"), **stages)
    _, model, log = train(recipe)
    assert [terms["loss"] for terms in log] == [0.0] * 6
    assert not model.linear.weight.grad.any()


def test_unlabelled_rows_are_left_out():
    batch = training_set()[0]
    labelled = torch.arange(16) < 8
    partly = Batch(batch.ids, batch.inputs, batch.labels, labelled=labelled)
    objective, model = Supervised(Spy()), Net()
    terms = objective(model, partly)
    assert len(objective.loss.seen[0]) == 8
    assert terms["kept"] == 0.5
    with pytest.raises(DataError, match="needs labels"):
        objective(model, Batch(batch.ids, batch.inputs))


# -------- repeatability


@pytest.mark.parametrize("stages", STAGES)
def test_two_runs_of_one_recipe_give_the_same_numbers(stages):
    recipe = recipe_of("contrastive_bayesian", stages)
    assert train(recipe)[2] == train(recipe)[2]


def test_the_seed_of_the_recipe_decides_the_noise():
    first = train(Recipe(augment=INTRA_CLASS, train=TrainConfig(seed=1)))[2]
    second = train(Recipe(augment=INTRA_CLASS, train=TrainConfig(seed=2)))[2]
    assert first[0]["metric"] != second[0]["metric"]


def test_a_run_that_is_cut_and_resumed_gives_the_same_numbers():
    recipe = Recipe(
        loss=Part("proxy_anchor"), augment=Part("intra_class", {"start": 0.0, "neighbor_correction": True})
    )
    both = Recipe(augment=INTRA_CLASS, memory=MEMORY)
    for one in (recipe, both):
        torch.manual_seed(0)
        model, objective = Net(), objective_of(one)
        batches = training_set()
        objective.before_epoch(model, lambda batches=batches: iter(batches), Progress(0, 2, 0, 6))
        objective(model, batches[0])
        objective.after_step(model, Progress(0, 2, 1, 6))

        again, resumed = Net(), objective_of(one)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(objective.state_dict())
        expected, actual = objective(model, batches[1]), resumed(again, batches[1])
        assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}


# -------- the tables


def test_every_part_is_described_in_one_line():
    named = {*METHODS, *CLEANERS, *AUGMENTERS, *MEMORIES, *REGULARIZERS}
    assert set(DESCRIPTIONS) == named
    assert all(line and "\n" not in line for line in DESCRIPTIONS.values())


def test_every_loss_and_stage_is_in_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    parts = {*LOSSES, *CLEANERS, *AUGMENTERS, *MEMORIES, *REGULARIZERS}
    assert [name for name in sorted(parts) if name not in page] == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_makes_an_objective(name):
    objective = objective_of(load_recipe(name))
    terms = objective(Net(), training_set()[0])
    assert terms["loss"].isfinite()


def test_settings_reach_the_parts():
    recipe = Recipe(
        loss=Part("contrastive_bayesian", {"form": "sqrt"}), augment=Part("intra_class", {"copies": 5})
    )
    objective = objective_of(recipe)
    assert isinstance(objective.loss, ContrastiveBayesianLoss)
    assert objective.loss.form == "sqrt"
    assert (objective.augment.copies, objective.augment.num_classes, objective.augment.dim) == (
        5,
        CLASSES,
        DIM,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stages", STAGES)
def test_a_gpu_gives_the_numbers_of_the_cpu(stages):
    recipe = Recipe(**STAGES[stages])
    _, _, expected = train(recipe)
    _, _, actual = train(recipe, device="cuda")
    for step, other in zip(expected, actual, strict=True):
        assert other == pytest.approx(step, rel=1e-3, abs=1e-4)
