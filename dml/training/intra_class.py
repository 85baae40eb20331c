"""Intra-class adaptive augmentation (IAA): synthetic embeddings as spread out as their class really is."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dml.data.batch import Batch
from dml.training.objective import Batches, Candidates, Progress
from dml.training.processes import added_up, connected, from_everyone

BLOCK = 256
"""Classes corrected at once: neither C × C distances nor C × K × D variances are ever held as a whole."""

Moments = tuple[Tensor, Tensor, Tensor]
"""(C, D) means, (C, D) variances, (C,) numbers of rows."""


class IntraClassAugmentation(nn.Module):
    """Draw synthetic embeddings around each real one, with the measured variance of its class.

    Per class k, over the raw embeddings z of its images::

        μ_k = mean(z)          Σ_k = mean((z - μ_k)²)          diagonal, divided by n_k

    For an image i of class k, copies m = 1 … M, λ `scale`::

        ẑ_i^m = z_i + sqrt(λ Σ_k) ⊙ ε,     ε ~ N(0, 1)

    centred on the image, not on its class. Synthetic rows are candidates only (never anchors), made unit
    length after synthesis; the gradient passes through z_i, Σ is a constant. They carry their source's id, so
    an image never meets its own copies.

    Classes with few images have a poor Σ_k. With `neighbor_correction` it is mixed with that of classes whose
    mean is near (K nearest donors N_k, of two images or more)::

        D_m(i, k) = |μ_i² - μ_k²|        D_cv(i, k) = |Σ_i - Σ_k|        squares by element
        w_i   = n_i exp(-D_m² / (2 σ_m²) - D_cv² / (2 σ_cv²))
        Σ^nb  = Σ_i w_i Σ_i / Σ_i w_i                     Σ^glob = Σ_k n_k Σ_k / Σ_k n_k
        α_k   = 1 / (1 + log(1 + β (n_k - 1)))  if n_k <= τ, else 0
        Σ_k^cr = (1 - α_k) Σ_k + α_k ((1 - γ) Σ^nb + γ Σ^glob)

    Statistics are renewed by a pass over the training set every `refresh_every` epochs from `start` on, and
    merged with what is known: w = n̂ / (n + n̂), at least 1 - `momentum` (and 1 the first time), then Σ ←
    (1-w) Σ + w Σ̂ + w (1-w)(μ - μ̂)²,  μ ← (1-w) μ + w μ̂,  n ← n + n̂.

    Args:
        num_classes: C.
        dim: D, length of the embedding.
        copies: M, synthetic rows per image (>= 1).
        scale: λ (>= 0); published: 0.8 on CUB and Cars, 0.5 to 0.6 on larger sets.
        momentum: in [0, 1]; 1 gives the exact mean and variance of everything ever seen.
        neighbor_correction: use Σ^cr; meant for data with few images per class.
        start: share of the epochs without synthesis at the start.
        refresh_every: epochs between passes.
        statistics: "pass": embed the whole training set with the weights of the moment, as published;
            "batches": take the embeddings of the batches since the last time, which costs nothing, though
            weights have moved under them; not with `neighbor_correction`, which must count images.
        decay_scale: multiply λ by 0.9, 0.75 and 0.6 behind 40, 60 and 80 % of the epochs.
        neighbors: K.
        threshold: τ, images; classes with more keep their own Σ_k.
        few_slope: β (> 0).
        global_share: γ in [0, 1].
        mean_width, variance_width: σ_m, σ_cv (> 0).
        normalize_distances: bring the distances of each class to [0, 1] first, since raw ones depend on the
            embedding's scale; False: raw, as the paper prints.
        seed: of the noise, which depends on (seed, step, image id) only: not on the batch or the process.

    State: buffers `mean` (C, D), `variance` (C, D), `count` (C,) of the merge; `images` (C,) distinct images
    in the last pass, `corrected` (C, D), `strength` (λ now; 0: no synthesis), `step`, `refreshed` (epoch of
    the last pass), and with "batches" `gathered_mean`, `gathered_variance` (C, D) float64 and
    `gathered_count` (C,) since then.

    Source: Fu et al., "Intra-class Adaptive Augmentation with Neighbor Correction for Deep Metric Learning",
    TMM 2022, arXiv:2211.16264. Where the released code slips, this follows the paper: the deviation is the
    same for every copy, the correction is really used, and τ is inclusive. Schedule of λ, refresh interval
    and own copies excluded: as in the released code. Normalised distances, means of classes with one image,
    and statistics of batches: ours.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    images: Tensor
    corrected: Tensor
    strength: Tensor
    step: Tensor
    refreshed: Tensor
    gathered_mean: Tensor
    gathered_variance: Tensor
    gathered_count: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        copies: int = 3,
        scale: float = 0.8,
        momentum: float = 0.2,
        neighbor_correction: bool = False,
        start: float = 0.3,
        refresh_every: int = 2,
        decay_scale: bool = True,
        neighbors: int = 25,
        threshold: int = 40,
        few_slope: float = 0.1,
        global_share: float = 0.1,
        mean_width: float = 1.0,
        variance_width: float = 1.0,
        normalize_distances: bool = True,
        statistics: Literal["pass", "batches"] = "pass",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if statistics not in ("pass", "batches"):
            raise ValueError(f'statistics must be "pass" or "batches", got {statistics!r}')
        if statistics == "batches" and neighbor_correction:
            raise ValueError(
                "neighbor_correction must know how many images a class has, which only "
                'statistics="pass" counts'
            )
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("dim", dim, 1),
            ("copies", copies, 1),
            ("refresh_every", refresh_every, 1),
            ("neighbors", neighbors, 1),
            ("scale", scale, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in (("momentum", momentum), ("global_share", global_share), ("start", start)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        for name, value in (
            ("few_slope", few_slope),
            ("mean_width", mean_width),
            ("variance_width", variance_width),
        ):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.num_classes, self.dim, self.copies, self.scale = num_classes, dim, copies, scale
        self.momentum, self.neighbor_correction = momentum, neighbor_correction
        self.start, self.refresh_every, self.decay_scale, self.seed = start, refresh_every, decay_scale, seed
        self.neighbors, self.threshold = neighbors, threshold
        self.few_slope, self.global_share = few_slope, global_share
        self.mean_width, self.variance_width = mean_width, variance_width
        self.normalize_distances = normalize_distances
        self.statistics = statistics
        self.register_state()
        self.register_load_state_dict_post_hook(lambda module, keys: module.recall())
        self.recall()

    def register_state(self) -> None:
        """Make the buffers, empty."""
        num_classes, dim = self.num_classes, self.dim
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("variance", torch.zeros(num_classes, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("images", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("corrected", torch.zeros(num_classes if self.neighbor_correction else 0, dim))
        self.register_buffer("strength", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("refreshed", torch.tensor(-1))
        gathered = num_classes if self.statistics == "batches" else 0
        for name in ("gathered_mean", "gathered_variance"):
            self.register_buffer(name, torch.zeros(gathered, dim, dtype=torch.float64))
        self.register_buffer("gathered_count", torch.zeros(gathered, dtype=torch.int64))

    def recall(self) -> None:
        """Read λ into a plain number once, so that a step on a GPU does not wait for it."""
        self._strength = float(self.strength)

    def forward(self, raw: Tensor, labels: Tensor, ids: Tensor) -> Candidates | None:
        """Synthetic rows of a batch at the current λ; None before synthesis has started."""
        if self.statistics == "batches":
            self.gather(raw.detach(), labels)
        return self.synthesize(raw, labels, ids) if self._strength > 0 else None

    def synthesize(
        self,
        raw: Tensor,
        labels: Tensor,
        ids: Tensor,
        *,
        scale: float | None = None,
        noise: Tensor | None = None,
    ) -> Candidates:
        """Draw M copies of each row; copy m of row i is row m·B + i.

        Args:
            raw: (B, D) embeddings before their length is made 1.
            labels: (B,) class ids.
            ids: (B,) image ids; they go with the copies, and decide their noise.
            scale: λ; None: the current one of the schedule, or the full one when training has not begun.
            noise: (M, B, D) to use in place of the drawn one.

        Returns:
            (M·B, D) raw synthetic rows with the gradient of `raw`, their labels and their sources' ids.
        """
        self.check(raw, labels)
        if scale is None:
            scale = self._strength or self.scale
        with torch.autocast(raw.device.type, enabled=False):
            raw = raw if raw.dtype == torch.float64 else raw.float()
            spread = self.corrected if self.neighbor_correction else self.variance
            deviation = (scale * spread[labels].clamp_min(0)).sqrt().to(raw.dtype)
            if noise is None:
                noise = drawn_noise(ids, self.copies, self.dim, seed=self.seed, step=self.step)
            rows = raw + deviation * noise.to(raw.dtype)
        copies = len(noise)
        return Candidates(rows.reshape(-1, self.dim), labels.repeat(copies), ids.repeat(copies))

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Merge the mean and variance of some rows into those of their classes.

        Args:
            embeddings: (N, D) raw.
            labels: (N,) class ids below C.

        Raises:
            ValueError: shapes or labels that do not fit.
        """
        self.check(embeddings, labels)
        self.merge(*class_moments(embeddings.to(self.mean.dtype), labels, self.num_classes))

    def merge(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Merge (C, D) means and variances of (C,) new rows; classes without new rows stay as they are."""
        merged = merge_moments(
            (self.mean, self.variance, self.count), (mean, variance, count), least=1 - self.momentum
        )
        for buffer, value in zip((self.mean, self.variance, self.count), merged, strict=True):
            buffer.copy_(value)
        if self.neighbor_correction:
            self.corrected.copy_(self.corrected_variance())

    def gather(self, raw: Tensor, labels: Tensor) -> None:
        """Merge the embeddings of a batch into what the next statistics are made of."""
        self.check(raw, labels)
        present, place = labels.unique(return_inverse=True)
        new = class_moments(raw.to(self.gathered_mean.dtype), place, len(present))
        mean, variance, count = self.gathered()
        known = (mean[present], variance[present], count[present])
        for buffer, value in zip(self.gathered(), merge_moments(known, new), strict=True):
            buffer[present] = value

    def gathered(self) -> Moments:
        """The moments of the batches since the last statistics."""
        return self.gathered_mean, self.gathered_variance, self.gathered_count

    def merge_gathered(self, *, drop: bool) -> None:
        """Merge the statistics of the batches since the last time (or drop them), and begin anew."""
        if not drop:
            mean, variance, count = self.gathered()
            self.merge(mean.to(self.mean.dtype), variance.to(self.mean.dtype), count)
        for buffer in self.gathered():
            buffer.zero_()

    @torch.no_grad()
    def refresh(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Embed the training set and merge its statistics.

        The model runs as in training (augmented pictures, its own choice of frozen layers); the running
        statistics of its normalisation layers are left as they were, and so are the random numbers it draws
        from. Several processes share the work: each gives its part of the batches, and all end with the
        statistics of the whole.

        Raises:
            ValueError: a batch without class ids, or an empty pass.
        """
        wide = {"dtype": torch.float64, "device": self.mean.device}
        total = (
            torch.zeros(self.num_classes, self.dim, **wide),
            torch.zeros(self.num_classes, self.dim, **wide),
            torch.zeros_like(self.count),
        )
        seen = [torch.zeros(2, 0, dtype=torch.int64, device=self.mean.device)]
        with as_in_training(model):
            for batch in batches:
                if batch.labels is None:
                    raise ValueError("IAA measures classes, and a batch of the training set has no labels")
                raw = model(batch.inputs).raw.to(**wide)
                labels = batch.labels.to(raw.device)
                self.check(raw, labels)
                total = merge_moments(total, class_moments(raw, labels, self.num_classes))
                seen.append(torch.stack([batch.ids.to(raw.device), labels]))
        pictures = torch.cat(seen, dim=1)
        if connected():
            total = moments_of_everyone(total)
            pictures = torch.cat(from_everyone(pictures.cpu()), dim=1).to(self.mean.device)
        if not pictures.numel():
            raise ValueError("IAA found no batches in its pass over the training set")
        self.images.copy_(torch.bincount(pictures.unique(dim=1)[1], minlength=self.num_classes))
        mean, variance, count = total
        self.merge(mean.to(self.mean.dtype), variance.to(self.mean.dtype), count)

    @torch.no_grad()
    def corrected_variance(self) -> Tensor:
        """(C, D) Σ^cr: each class's variance, corrected by its neighbours' where it has few images.

        Classes with fewer than two images lend nothing; without any lender Σ^nb is Σ^glob.
        """
        # `count` grows with every pass; how many images a class has is what the last pass counted.
        n = torch.where(self.images > 0, self.images, self.count).to(self.mean.dtype)
        lends = n >= 2
        weight = torch.where(lends, n, 0)
        overall = (weight[:, None] * self.variance).sum(dim=0) / weight.sum().clamp_min(1)
        few = 1 / (1 + torch.log1p(self.few_slope * (n - 1).clamp_min(0)))
        share = torch.where(n <= self.threshold, few, 0)[:, None]
        lent = torch.cat([self.neighbor_variance(rows, n, lends, overall) for rows in self.blocks()])
        mixed = (1 - self.global_share) * lent + self.global_share * overall
        return ((1 - share) * self.variance + share * mixed).clamp_min(0)

    def blocks(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.num_classes, device=self.mean.device).split(BLOCK))

    def neighbor_variance(self, rows: Tensor, n: Tensor, lends: Tensor, overall: Tensor) -> Tensor:
        """(R, D) Σ^nb of some classes; `overall` where nobody lends."""
        lenders = lends[None, :] & (rows[:, None] != torch.arange(len(n), device=n.device)[None, :])
        squares = self.mean.square()
        mean_distance = torch.cdist(squares[rows], squares).masked_fill(~lenders, float("inf"))
        number = min(self.neighbors, len(n))
        nearest, lender = mean_distance.topk(number, dim=1, largest=False)
        variance_distance = torch.cdist(self.variance[rows], self.variance)
        beside = variance_distance.gather(1, lender)
        if self.normalize_distances:
            nearest = to_unit_range(nearest, mean_distance, lenders)
            beside = to_unit_range(beside, variance_distance, lenders)
        found = lenders.gather(1, lender)
        # In logarithms, so that classes far from everyone still borrow from the nearest.
        logits = n[lender].clamp_min(1).log()
        logits = logits - nearest.square() / (2 * self.mean_width**2)
        logits = logits - beside.square() / (2 * self.variance_width**2)
        anyone = found.any(dim=1, keepdim=True)
        weights = torch.where(anyone, logits.masked_fill(~found, float("-inf")), 0).softmax(dim=1)
        borrowed = (weights[:, None, :] @ self.variance[lender]).squeeze(1)
        return torch.where(anyone, borrowed, overall)

    def before_epoch(self, model: nn.Module, batches: Batches, progress: Progress) -> None:
        """Set λ for the epoch, and renew the statistics when it is time."""
        first = math.floor(self.start * progress.epochs + 1e-9)
        started = progress.epoch >= first
        due = (progress.epoch - first) % self.refresh_every == 0 or (started and int(self.refreshed) < 0)
        if due and int(self.refreshed) != progress.epoch:
            if self.statistics == "batches":
                self.merge_gathered(drop=not started)
            elif started:
                self.refresh(model, batches())
            if started:
                self.refreshed.fill_(progress.epoch)
        measured = started and bool(self.count.any())
        self._strength = self.scale_at(progress) if measured else 0.0
        self.strength.fill_(self._strength)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        self.step += 1

    def scale_at(self, progress: Progress) -> float:
        """λ in an epoch: × 1 up to 40 % of the epochs, 0.9 up to 60 %, 0.75 up to 80 %, then 0.6."""
        if not self.decay_scale:
            return self.scale
        done = (progress.epoch + 1) / max(progress.epochs, 1) - 1e-9
        return self.scale * (1.0 if done <= 0.4 else 0.9 if done <= 0.6 else 0.75 if done <= 0.8 else 0.6)

    def check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or labels.shape != (len(embeddings),):
            raise ValueError(
                f"expected embeddings (N, {self.dim}) and one class id per row, "
                f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, copies={self.copies}, scale={self.scale}, "
            f"momentum={self.momentum}, neighbor_correction={self.neighbor_correction}, start={self.start}"
        )


def class_moments(embeddings: Tensor, labels: Tensor, classes: int) -> Moments:
    """Mean, variance (divided by n) and number of rows of each class, in O(N D)."""
    count = torch.bincount(labels, minlength=classes)
    if len(count) > classes:
        raise ValueError(f"class ids must be below {classes}, got {int(labels.max())}")
    divisor = count.clamp_min(1)[:, None].to(embeddings.dtype)
    zeros = embeddings.new_zeros(classes, embeddings.shape[1])
    mean = zeros.index_add(0, labels, embeddings) / divisor
    variance = zeros.index_add(0, labels, (embeddings - mean[labels]).square()) / divisor
    return mean, variance, count


def merge_moments(known: Moments, new: Moments, *, least: float = 0.0) -> Moments:
    """The moments of two sets of rows together; the new set weighs at least `least` where it has rows."""
    mean, variance, count = known
    new_mean, new_variance, new_count = new
    exact = new_count.to(mean.dtype) / (count + new_count).clamp_min(1).to(mean.dtype)
    w = torch.where(new_count > 0, exact.clamp_min(least), 0)[:, None]
    merged = (1 - w) * variance + w * new_variance + w * (1 - w) * (mean - new_mean).square()
    return (1 - w) * mean + w * new_mean, merged, count + new_count


def moments_of_everyone(own: Moments) -> Moments:
    """The moments of the rows of all processes together, the same bits on each.

    As sums of deviations from the common mean: nothing large is subtracted.
    """
    mean, variance, count = own
    total = added_up(count)
    n = count[:, None].to(mean.dtype)
    divisor = total.clamp_min(1)[:, None].to(mean.dtype)
    middle = added_up(n * mean) / divisor
    return middle, added_up(n * (variance + (mean - middle).square())) / divisor, total


def to_unit_range(chosen: Tensor, distances: Tensor, finite: Tensor) -> Tensor:
    """Chosen distances of each row, scaled so that the row's lenders span [0, 1]."""
    low = distances.masked_fill(~finite, float("inf")).amin(dim=1, keepdim=True)
    high = distances.masked_fill(~finite, float("-inf")).amax(dim=1, keepdim=True)
    span = high - low
    usable = span.isfinite() & (span > 0)
    return torch.where(usable, (chosen - low) / torch.where(usable, span, 1), 0)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Train mode, with every buffer of the model, its mode and the random state put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


def drawn_noise(ids: Tensor, copies: int, dim: int, *, seed: int, step: Tensor | int) -> Tensor:
    """(M, B, D) standard normal float32 numbers that depend on (seed, step, image id, copy, column) only.

    A counter is hashed instead of a generator advanced: the numbers of an image do not depend on its place in
    the batch, on its neighbours or on the process that holds it, and no loop over images is needed.
    """
    ids = ids.to(torch.int64)
    step = torch.as_tensor(step, dtype=torch.int64, device=ids.device)
    image = scramble(scramble(scramble(torch.full_like(step, seed)) + step) + ids)
    counter = torch.arange(copies * dim, device=ids.device).reshape(copies, 1, dim)
    bits = scramble(image[None, :, None] + counter * GOLDEN)
    first = ((bits >> 32) & 0xFFFFFFFF).double()
    second = (bits & 0xFFFFFFFF).double()
    # Box and Muller; half a step away from 0, where the logarithm has no value.
    radius = (-2 * ((first + 0.5) / 2**32).log()).sqrt()
    return (radius * (2 * math.pi * second / 2**32).cos()).float()


def signed(value: int) -> int:
    """The same 64 bits as a signed number, which is what tensors hold."""
    return value - 2**64 if value >= 2**63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def scramble(bits: Tensor) -> Tensor:
    """The SplitMix64 output function on int64 tensors, whose products wrap around as it needs.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    bits = bits + GOLDEN
    bits = (bits ^ shifted(bits, 30)) * MIX_1
    bits = (bits ^ shifted(bits, 27)) * MIX_2
    return bits ^ shifted(bits, 31)


def shifted(bits: Tensor, places: int) -> Tensor:
    """Shift right filling with zeros; the tensor operator would fill with the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
