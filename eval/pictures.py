"""The pictures of docs/methods.md, drawn from what the methods really compute.

Every curve, weight, point and matrix comes out of the losses and stages themselves, so a picture cannot say
something else than the code. `python -m eval.pictures` draws all of them again.
"""

import argparse
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dml.errors import MissingExtra
from dml.losses import (
    ChannelCorrelation,
    ContrastiveBayesianLoss,
    ContrastiveLoss,
    MultiSimilarityLoss,
    TripletLoss,
)
from dml.losses.pairs import relate
from dml.models.channel_attention import ChannelAttention
from dml.storage import write_aside
from dml.training.intra_class import IntraClassAugmentation
from dml.training.memory import CrossBatchMemory

WIDTH, HEIGHT = 760, 300
"""Of a picture, in pixels."""
POSITIVE, NEGATIVE, SYNTHETIC, OTHER = "#2a6fbb", "#c8501e", "#12906b", "#8d9098"
INK, MUTED, LINE, CARD = "#24272c", "#6a6e76", "#d6d7db", "#fbfaf7"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PLACE = Path(__file__).parent.parent / "docs" / "pictures"

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's font
    "svg.hashsalt": "dml",
    "font.size": 12,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.linewidth": 1,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}


class Canvas:
    """A card of 760 x 300 pixels, on which panels are placed in pixels from its top left corner.

    Raises:
        MissingExtra: without matplotlib.
    """

    def __init__(self, title: str, description: str) -> None:
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import FancyBboxPatch
        except ModuleNotFoundError:
            raise MissingExtra("matplotlib, which draws the pictures,", "train") from None
        self.description = description
        # At 72 dots per inch a point is a pixel.
        self.figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        card = FancyBboxPatch(
            (0.5, 0.5),
            WIDTH - 1,
            HEIGHT - 1,
            boxstyle="round,pad=0,rounding_size=10",
            facecolor=CARD,
            edgecolor=LINE,
            transform=None,
            zorder=-1,
        )
        self.figure.add_artist(card)
        self.text(28, 32, title, size=15, weight="bold")

    def panel(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes whose inside lies there."""
        return self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        )

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Words on a base line, in pixels from the top left corner."""
        style = {"size": 12, "va": "baseline"} | style
        self.figure.text(x / WIDTH, 1 - y / HEIGHT, words, **style)

    def svg(self) -> str:
        """A file that is the same, byte for byte, whenever the same is drawn."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="none")
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r"^<svg[^>]*>", opening(self.description), text, count=1)
        text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
        text = re.sub(r"(font: [^\"]*?px )[^;\"]*|font-family: [^;\"]*", in_our_font, text)
        # A hundredth of a pixel is not seen, and more digits would differ from one processor to another.
        return re.sub(r"-?\d+\.\d{3,}(?![\w%])", lambda m: f"{float(m[0]):.2f}", text)


def opening(description: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="stroke-linejoin: round; stroke-linecap: butt">\n<title>{description}</title>'
    )


def in_our_font(found: re.Match[str]) -> str:
    return f"{found[1]}{FONT}" if found[1] else f"font-family: {FONT}"


# -------- asking the losses


def beside_anchor(similarities: Tensor) -> Tensor:
    """(N, 2) unit vectors with these cosines to the anchor (1, 0)."""
    return torch.stack([similarities, (1 - similarities.square()).clamp_min(0).sqrt()], dim=1)


def asked(loss: nn.Module, similarities: Sequence[float], labels: Sequence[int]) -> tuple[float, Tensor]:
    """What one anchor of class 0 pays beside candidates, and (N,) the slope of that in each similarity."""
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    given = torch.tensor(similarities, dtype=torch.float64)
    candidates = beside_anchor(given).requires_grad_()
    ids = torch.arange(1, len(given) + 1)
    value = loss(
        anchor,
        torch.zeros(1, dtype=torch.int64),
        None,
        candidates,
        torch.tensor(labels),
        ids=torch.zeros(1, dtype=torch.int64),
        ref_ids=ids,
    )
    (moved,) = torch.autograd.grad(value, candidates)
    # On the circle a candidate moves across itself: its gradient is slope * (anchor - s * candidate).
    return value.item(), (moved @ anchor[0]) / (1 - given.square()).clamp_min(1e-12)


def paid(loss: nn.Module, similarities: Tensor, *, positive: bool) -> list[float]:
    """What a single pair pays at each similarity."""
    return [asked(loss, [s], [0 if positive else 1])[0] for s in similarities.tolist()]


# -------- the pictures


def contrastive() -> Canvas:
    canvas = Canvas(
        "Pairs pay for what they lack to their margin, and nothing beyond it",
        "Contrastive loss: charge of a positive and of a negative pair over their similarity",
    )
    published = ContrastiveLoss(measure="cosine", average="anchors", positive_margin=0.8, negative_margin=0.5)
    s = torch.linspace(-0.25, 0.9999, 251, dtype=torch.float64)
    for left, title, loss, margins in (
        (28, 'measure = "cosine", margins 0.8 and 0.5', published, (0.8, 0.5)),
        (420, 'measure = "euclidean", margins 0 and 1', ContrastiveLoss(), (1.0, 0.5)),
    ):
        axes = canvas.panel(left, 88, 304, 152)
        canvas.text(left, 68, title, color=MUTED)
        pull, push = paid(loss, s, positive=True), paid(loss, s, positive=False)
        axes.plot(s, pull, color=POSITIVE)
        axes.plot(s, push, color=NEGATIVE)
        top = 1.08 * max(pull)
        axes.set(xlim=(-0.25, 1.02), ylim=(-0.04 * top, top), yticks=[], xlabel="similarity to the anchor")
        marked(axes, [0, 0.5, 0.8, 1] if loss is published else [0, 0.5, 1])
        for margin, colour in zip(margins, (POSITIVE, NEGATIVE), strict=True):
            axes.plot([margin], [0], "o", color=colour, markersize=7, markeredgecolor=CARD, zorder=3)
        at = int((s - 0.12).abs().argmin())
        axes.annotate(
            "positives pay", (0.12, pull[at]), (10, 6), textcoords="offset points", color=POSITIVE, size=12
        )
        last = push[-1]
        axes.annotate(
            "negatives pay", (0.99, last), (-2, 9), textcoords="offset points", color=NEGATIVE, ha="right"
        )
    return canvas


def triplet() -> Canvas:
    canvas = Canvas(
        "Each positive nearer than each negative, by a margin",
        "Triplet loss: anchor, positive and negatives on the circle, and which negatives each mining takes",
    )
    margin = 0.3
    circle_of_a_triplet(canvas, TripletLoss(margin=margin, mining="hardest", average="anchors"))
    axes = canvas.panel(440, 92, 284, 148)
    canvas.text(440, 68, "which negatives pay, beside one positive", color=MUTED)
    near = 0.7
    far = [0.28, 0.42, 0.55, 0.64, 0.76, 0.83, 0.94, 1.06, 1.17, 1.31, 1.42]
    similarities = [1 - d * d / 2 for d in [near, *far]]
    rows = ("all", "semihard", "hard", "hardest")
    axes.axvspan(near, near + margin, color=POSITIVE, alpha=0.1, linewidth=0)
    axes.axvline(near, color=POSITIVE)
    for height, mining in enumerate(reversed(rows)):
        loss = TripletLoss(margin=margin, mining=mining, average="anchors")  # type: ignore[arg-type]
        _, slopes = asked(loss, similarities, [0] + [1] * len(far))
        for d, slope in zip(far, slopes[1:].tolist(), strict=True):
            axes.plot([d], [height], "o", color=NEGATIVE if slope else LINE, markersize=8)
        axes.text(0.16, height, f'"{mining}"', ha="right", va="center", size=12)
    axes.text(near - 0.02, len(rows) - 0.28, "positive", color=POSITIVE, ha="right", va="center")
    axes.text(near + 0.02, len(rows) - 0.28, "+ margin", color=POSITIVE, va="center")
    axes.set(xlim=(0.2, 1.5), ylim=(-0.6, len(rows) - 0.05), yticks=[], xlabel="distance to the anchor")
    marked(axes, [0.5, 1, 1.5])
    return canvas


def circle_of_a_triplet(canvas: Canvas, loss: TripletLoss) -> None:
    """Anchor, positive and negatives on the unit circle, with the steps that lower the loss."""
    from matplotlib.patches import Arc

    axes = canvas.panel(10, 52, 330, 236)
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.16, 1.343), aspect="equal")
    axes.axis("off")
    axes.add_patch(Arc((0, 0), 2, 2, color=LINE, linewidth=1.5))
    degrees = torch.tensor([90.0, 141, 28, -25, -80, -150], dtype=torch.float64)
    angle = torch.deg2rad(degrees)
    points = torch.stack([angle.cos(), angle.sin()], dim=1).requires_grad_()
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    # Only the first is an anchor here; in training every row is one.
    value = loss(
        points[:1], labels[:1], None, points, labels, ids=torch.tensor([0]), ref_ids=torch.arange(len(points))
    )
    (gradient,) = torch.autograd.grad(value, points)
    anchor, positive, nearest = (points[i].detach() for i in range(3))
    reach = float((anchor - positive).norm()) + loss.margin
    widest = math.degrees(2 * math.asin(reach / 2))
    axes.add_patch(Arc((0, 0), 2, 2, theta1=90 - widest, theta2=90, color=NEGATIVE, alpha=0.22, linewidth=11))
    for other, colour in ((positive, POSITIVE), (nearest, NEGATIVE)):
        axes.plot(*zip(anchor.tolist(), other.tolist(), strict=True), color=colour, linewidth=1.6)
    for place in (1, 2):
        start, way = points[place].detach(), -gradient[place]
        end = start + 0.42 * way / way.norm()
        axes.annotate(
            "",
            end.tolist(),
            start.tolist(),
            arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 7, "lw": 1.4},
        )
    for place, colour in enumerate((INK, POSITIVE, *[NEGATIVE] * 4)):
        paying = place < 2 or bool(gradient[place].any())
        axes.plot(
            *points[place].detach().tolist(),
            "o",
            color=colour,
            markersize=11 if place < 3 else 8,
            alpha=1 if paying else 0.35,
            markeredgecolor=CARD,
        )
    axes.text(0, 1.13, "anchor", ha="center", va="bottom")
    axes.text(-0.9, 0.72, "positive", ha="right", color=POSITIVE)
    axes.text(0.74, 0.24, "nearest negative", color=NEGATIVE, ha="right")
    axes.text(0.72, 0.92, "negatives here pay", color=NEGATIVE, size=11)
    axes.text(0, -0.5, "far enough: free", color=NEGATIVE, ha="center", size=11, alpha=0.75)


def multi_similarity() -> Canvas:
    canvas = Canvas(
        "Of the hard pairs, the hardest weigh most",
        "Multi-Similarity: weight of each pair of an anchor over its similarity, and the mining band",
    )
    loss = MultiSimilarityLoss()
    positives = [0.36, 0.46, 0.57, 0.66, 0.79, 0.86]
    negatives = [-0.14, -0.05, 0.03, 0.11, 0.2, 0.29, 0.38, 0.49, 0.54, 0.59, 0.62]
    _, slopes = asked(loss, positives + negatives, [0] * len(positives) + [1] * len(negatives))
    weights = slopes.abs().tolist()
    axes = canvas.panel(28, 56, 704, 192)
    band = loss.epsilon or 0.0
    low, high = min(positives) - band, max(negatives) + band
    top, bottom = 0.42, -0.94
    for left, right, colour, end in ((-1, high, POSITIVE, top), (low, 2, NEGATIVE, bottom)):
        axes.fill_between([left, right], 0, end, color=colour, alpha=0.07, linewidth=0)
    axes.axhline(0, color=LINE, linewidth=1)
    for s, weight, colour, sign in [
        *((s, w, POSITIVE, 1) for s, w in zip(positives, weights, strict=False)),
        *((s, w, NEGATIVE, -1) for s, w in zip(negatives, weights[len(positives) :], strict=True)),
    ]:
        if weight:
            axes.plot([s, s], [0, sign * weight], color=colour, linewidth=4)
            axes.plot([s], [sign * weight], "o", color=colour, markersize=8)
        else:
            axes.plot([s], [sign * 0.05], "o", color=CARD, markeredgecolor=colour, markersize=7)
    edge = {"size": 11, "color": MUTED}
    axes.text(high + 0.012, top - 0.09, "nearest negative + ε", **edge)
    axes.text(low - 0.012, bottom + 0.05, "farthest positive − ε", ha="right", **edge)
    axes.text(-0.2, top - 0.12, "weight of positives", color=POSITIVE)
    axes.text(0.985, bottom + 0.08, "weight of negatives", color=NEGATIVE, ha="right")
    axes.text(max(negatives) - 0.015, -0.62, "the nearest takes most", color=NEGATIVE, size=11, ha="right")
    axes.text(high + 0.012, 0.12, "already near: ignored", color=POSITIVE, size=11)
    axes.text(-0.2, -0.2, "already far: ignored", color=NEGATIVE, size=11)
    axes.set(xlim=(-0.22, 1), ylim=(bottom, top), yticks=[], xlabel="similarity to the anchor")
    marked(axes, [0, 0.5, 1])
    return canvas


def marked(axes: Any, places: Sequence[float]) -> None:
    """Ticks with their numbers in the shortest form, above a line that ends where the last tick is."""
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(axes.get_xlim()[0], places[-1])


class Similarities(NamedTuple):
    """Of the pairs of a batch."""

    positive: Tensor
    negative: Tensor


def contrastive_bayesian() -> Canvas:
    canvas = Canvas(
        "Negatives pay only when very near; a constraint keeps them together",
        "CBML: charges of pairs over their similarity, and similarities before and after some steps with and "
        "without the metric variance constraint",
    )
    charges_of_odds(canvas)
    before, without = optimised(variance_weight=0)
    _, constrained = optimised(variance_weight=1)
    canvas.text(420, 68, "similarities of all pairs, before and after 120 steps", color=MUTED)
    rows = (("start", before), ("without\nconstraint", without), ("with\nconstraint", constrained))
    for row, (name, found) in enumerate(rows):
        axes = canvas.panel(420, 84 + 53 * row, 318, 50)
        axes.set(xlim=(0, 1.25), ylim=(0, 1.15), yticks=[])
        for values, colour in ((found.negative, NEGATIVE), (found.positive, POSITIVE)):
            count = torch.histc(values, bins=80, min=0, max=1)
            axes.fill_between(
                (torch.arange(80) + 0.5) / 80, count / count.max(), color=colour, alpha=0.7, linewidth=0
            )
        axes.text(0, 0.5, name, va="center", linespacing=1.25)
        marked(axes, [0, 0.5, 1])
        if row == 0:
            axes.text(0.36, 0.62, "negatives", color=NEGATIVE, ha="right")
            axes.text(1, 0.62, "positives", color=POSITIVE)
        if row < 2:
            axes.set_xticks([])
    axes.set_xlabel("similarity", x=0.4)
    return canvas


def charges_of_odds(canvas: Canvas) -> None:
    """Minus the log posterior of a single pair, at the released centres and scales."""
    loss = ContrastiveBayesianLoss(variance_weight=0, margin=3)
    s = torch.linspace(-0.2, 0.9999, 400, dtype=torch.float64)
    # A loss of two kinds of pairs says nothing of a pair alone: the other kind stands where it is constant.
    pull = torch.tensor([asked(loss, [v, -1.0], [0, 1])[0] for v in s.tolist()])
    push = torch.tensor([asked(loss, [v, 0.5], [1, 0])[0] for v in s.tolist()])
    push -= push[0].clone()
    axes = canvas.panel(28, 88, 304, 152)
    canvas.text(28, 68, "charge of a pair: −log P(right about it)", color=MUTED)
    axes.plot(s, pull, color=POSITIVE)
    axes.plot(s, push, color=NEGATIVE)
    for center, colour, values in (
        (loss.positive_center, POSITIVE, pull),
        (loss.negative_center, NEGATIVE, push),
    ):
        height = float(values[int((s - center).abs().argmin())])
        axes.plot([center], [height], "o", color=colour, markersize=8, markeredgecolor=CARD, zorder=3)
    axes.annotate(
        "positives: centre 0.5, scale 0.5", (0.12, 1.1), (12, 10), textcoords="offset points", color=POSITIVE
    )
    axes.text(0.93, 0.08, "negatives: centre 1, scale 0.01", color=NEGATIVE, ha="right")
    axes.set(xlim=(-0.2, 1.03), ylim=(-0.05, 1.8), yticks=[], xlabel="similarity to the anchor")
    marked(axes, [0, 0.5, 1])


def optimised(*, variance_weight: float, steps: int = 120) -> tuple[Similarities, Similarities]:
    """Similarities before and after descending the loss with free embeddings: 12 classes of 8, near each
    other as those of a pretrained trunk are."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(8)
    centers = 1.5 + torch.randn(12, 16, generator=random, dtype=torch.float64)
    noise = torch.randn(len(labels), 16, generator=random, dtype=torch.float64)
    rows = nn.Parameter(centers[labels] + 0.9 * noise)
    loss = ContrastiveBayesianLoss(variance_weight=variance_weight)
    optimizer = torch.optim.Adam([rows], lr=0.02)
    before = similarities_of(rows, labels)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows, labels).backward()
        optimizer.step()
    return before, similarities_of(rows, labels)


def similarities_of(rows: Tensor, labels: Tensor) -> Similarities:
    unit = functional.normalize(rows.detach())
    positive, negative, _ = relate(labels, None, None, None)
    cosine = unit @ unit.T
    return Similarities(cosine[positive], cosine[negative])


def intra_class() -> Canvas:
    canvas = Canvas(
        "Synthetic points, as spread out as their class really is",
        "IAA: synthetic embeddings around real ones of three classes, and the corrected variance of a class "
        "of three images",
    )
    random = torch.Generator().manual_seed(4)
    spreads = torch.tensor([[0.62, 0.34], [0.2, 0.24], [0.3, 0.48]])
    centers = torch.tensor([[-1.6, 0.2], [0.35, -0.45], [1.8, 0.1]])
    labels = torch.arange(3).repeat_interleave(9)
    raw = centers[labels] + spreads[labels] * torch.randn(27, 2, generator=random)
    stage = IntraClassAugmentation(3, 2, copies=3)
    stage.update(raw, labels)
    made = stage.synthesize(raw, labels, torch.arange(27)).embeddings
    axes = canvas.panel(28, 76, 372, 200)
    axes.set(xlim=(-3.85, 2.7), ylim=(-1.66, 1.86), aspect="equal")
    axes.axis("off")
    for k in range(3):
        ellipse(axes, stage.mean[k], stage.variance[k], edgecolor=LINE, facecolor="white", linewidth=1.2)
    axes.plot(*made.T, "o", color=SYNTHETIC, alpha=0.5, markersize=4, markeredgewidth=0)
    axes.plot(*raw.T, "o", color=INK, markersize=6, markeredgecolor=CARD)
    canvas.text(28, 62, "real images", color=INK)
    canvas.text(106, 62, "and three synthetic copies of each", color=SYNTHETIC)
    neighbour_correction(canvas)
    return canvas


def neighbour_correction(canvas: Canvas) -> None:
    """The variance of a class of three images, its own and with what its neighbours lend."""
    random = torch.Generator().manual_seed(7)
    sizes = torch.tensor([3, 40, 40, 40, 40])
    labels = torch.arange(5).repeat_interleave(sizes)
    centers = torch.tensor([[0.0, 0.0], [-1.9, 0.68], [1.95, 0.68], [-1.85, -0.95], [1.9, -0.95]])
    raw = centers[labels] + torch.tensor([0.4, 0.46]) * torch.randn(len(labels), 2, generator=random)
    raw[:3] = centers[0] + torch.tensor([[-0.42, 0.06], [0.08, -0.07], [0.37, 0.05]])
    stage = IntraClassAugmentation(5, 2, neighbor_correction=True)
    stage.update(raw, labels)
    axes = canvas.panel(428, 76, 304, 200)
    axes.set(xlim=(-3.1, 3.1), ylim=(-2.08, 2.0), aspect="equal")
    axes.axis("off")
    axes.plot(*raw[3:].T, "o", color=OTHER, alpha=0.45, markersize=3, markeredgewidth=0)
    for k in range(1, 5):
        ellipse(axes, stage.mean[k], stage.variance[k], edgecolor=LINE, facecolor="none", linewidth=1.2)
    corrected = stage.corrected_variance()[0]
    ellipse(
        axes, stage.mean[0], corrected, edgecolor=SYNTHETIC, facecolor=SYNTHETIC + "1c", linewidth=2, zorder=3
    )
    own = {"edgecolor": INK, "facecolor": "none", "linewidth": 1.6, "linestyle": (0, (4, 3)), "zorder": 4}
    ellipse(axes, stage.mean[0], stage.variance[0], **own)
    axes.plot(*raw[:3].T, "o", color=INK, markersize=6, markeredgecolor=CARD, zorder=5)
    axes.text(0, -1.18, "3 images", color=INK, ha="center", size=11)
    for x, y in ((-1.9, 1.72), (1.95, 1.72)):
        axes.text(x, y, "40 images", color=MUTED, ha="center", size=11)
    canvas.text(428, 62, "own variance,")
    canvas.text(522, 62, "corrected by its neighbours", color=SYNTHETIC)


def ellipse(axes: Any, mean: Tensor, variance: Tensor, **style: Any) -> None:
    """Two standard deviations around a mean."""
    from matplotlib.patches import Ellipse

    width, height = (4 * variance.sqrt()).tolist()
    axes.add_patch(Ellipse(tuple(mean.tolist()), width, height, **style))


class Attended(NamedTuple):
    """Attentions of some images, and what the regulariser says of them."""

    attention: Tensor
    distances: Tensor
    intra: float
    inter: float


def channel_correlation() -> Canvas:
    canvas = Canvas(
        "One class, one pattern of channels",
        "CC-Loss: channel attentions of two classes and their distances, before and after descending it",
    )
    before, after = attentions()
    largest = float(after.distances.max())
    for left, name, found in ((28, "start", before), (404, "after 10 steps", after)):
        canvas.text(left, 62, name, weight="bold")
        heat = canvas.panel(left, 92, 192, 160)
        tiles(heat, found.attention, low=0, high=1, colour="#5b4a8a")
        canvas.text(left, 84, "attention: images × channels", color=MUTED, size=11)
        square = canvas.panel(left + 208, 92, 120, 160)
        tiles(square, found.distances, low=0, high=largest, colour="#4a4d55")
        canvas.text(left + 208, 84, "distances", color=MUTED, size=11)
        half = len(found.distances) // 2
        for start in (0, half):
            frame(square, start, start, half, POSITIVE)
        frame(square, half, 0, half, NEGATIVE)
        frame(square, 0, half, half, NEGATIVE)
        canvas.text(left, 276, f"within {found.intra:.2f}", color=POSITIVE)
        canvas.text(left + 84, 276, f"between {found.inter:.2f}", color=NEGATIVE)
        heat.axhline(half - 0.5, color=CARD, linewidth=3)
    return canvas


def attentions(steps: int = 10) -> tuple[Attended, Attended]:
    """Attentions of free features of two classes, before and after descending the regulariser."""
    random = torch.Generator().manual_seed(2)
    labels = torch.arange(2).repeat_interleave(6)
    features = nn.Parameter(torch.randn(12, 16, generator=random))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = ChannelAttention(16, reduction=2)
    nn.init.normal_(module.excite.weight, std=0.5, generator=random)
    loss = ChannelCorrelation()
    optimizer = torch.optim.Adam([features, *module.parameters()], lr=0.03)
    before = attended(module(features), labels, loss)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module(features), labels).backward()
        optimizer.step()
    return before, attended(module(features), labels, loss)


def attended(attention: Tensor, labels: Tensor, loss: ChannelCorrelation) -> Attended:
    attention = attention.detach()
    measured = loss.measure(attention, labels)
    distances = torch.cdist(attention, attention) / attention.shape[1] ** 0.5
    return Attended(attention, distances, float(measured.intra), float(measured.inter))


def tiles(axes: Any, values: Tensor, *, low: float, high: float, colour: str) -> None:
    """A matrix as squares, from pale (low) to the colour (high)."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades = LinearSegmentedColormap.from_list("shades", ["#f1eff0", colour])
    share = ((values - low) / (high - low)).clamp(0, 1)
    paint(axes, [[to_hex(tuple(shades(round(v, 2)))) for v in row] for row in share.tolist()])


def paint(axes: Any, colours: Sequence[Sequence[str]], gap: float = 0.06) -> None:
    """A matrix of coloured squares with a small gap between them."""
    from matplotlib.collections import PolyCollection

    near, far = gap - 0.5, 0.5 - gap
    corners = [(near, near), (near, far), (far, far), (far, near)]
    squares = [
        [(column + x, row + y) for x, y in corners]
        for row, line in enumerate(colours)
        for column in range(len(line))
    ]
    shades = [colour for line in colours for colour in line]
    axes.add_collection(PolyCollection(squares, facecolors=shades, linewidths=0))
    axes.set(xlim=(-0.5, len(colours[0]) - 0.5), ylim=(len(colours) - 0.5, -0.5))
    axes.axis("off")


def frame(axes: Any, row: int, column: int, side: int, colour: str) -> None:
    from matplotlib.patches import Rectangle

    inset = 0.02
    axes.add_patch(
        Rectangle(
            (column - 0.5 + inset, row - 0.5 + inset),
            side - 2 * inset,
            side - 2 * inset,
            facecolor="none",
            edgecolor=colour,
            linewidth=1.8,
            clip_on=False,
        )
    )


class Compared(NamedTuple):
    """Who is what to whom in a step with synthetic and remembered candidates."""

    positive: Tensor
    negative: Tensor
    excluded: Tensor
    parts: tuple[int, int, int]  # candidates of the batch, synthetic, remembered


def memory_step() -> Compared:
    """A step of 8 images with one synthetic copy each, and a memory that has seen three of them before."""
    random = torch.Generator().manual_seed(0)
    labels, ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([3, 8, 12, 17, 21, 26, 30, 34])
    rows = torch.randn(8, 4, generator=random)
    stage = IntraClassAugmentation(5, 4, copies=1)
    stage.update(rows, labels)
    made = stage.synthesize(rows, labels, ids)
    memory = CrossBatchMemory(4, size=18, start=0)
    older = torch.tensor([5, 8, 40, 14, 24, 41, 31, 22, 1, 17, 42, 11, 33, 27, 6, 43, 30, 20])
    class_of = torch.tensor([0, 0, 4, 1, 2, 4, 3, 2, 0, 1, 4, 1, 3, 2, 0, 4, 3, 2])
    memory.add(torch.randn(18, 4, generator=random), class_of, older)
    remembered = memory()
    assert remembered is not None
    known = relate(
        labels,
        torch.cat([labels, made.labels, remembered.labels]),
        ids,
        torch.cat([ids, made.ids, remembered.ids]),
    )
    return Compared(*known, parts=(8, len(made.ids), len(remembered.ids)))


def cross_batch() -> Canvas:
    canvas = Canvas(
        "One loss over everything there is to compare with",
        "Cross-batch memory: anchors beside the batch, synthetic rows and remembered rows; the same image is "
        "never a pair",
    )
    step = memory_step()
    size, left, top = 18.0, 88.0, 88.0
    first = 0
    for name, count, colour in zip(
        ("batch", "synthetic", "memory: older batches"), step.parts, (INK, SYNTHETIC, MUTED), strict=True
    ):
        columns = slice(first, first + count)
        axes = canvas.panel(left, top, size * count, size * len(step.positive))
        shades = [
            [
                POSITIVE if near else CARD if same else "#efc9b6"
                for near, same in zip(positive, excluded, strict=True)
            ]
            for positive, excluded in zip(
                step.positive[:, columns].tolist(), step.excluded[:, columns].tolist(), strict=True
            )
        ]
        paint(axes, shades)
        for row, column in step.excluded[:, columns].nonzero().tolist():
            axes.plot([column], [row], "x", color=OTHER, markersize=6, markeredgewidth=1.6)
        canvas.text(left, top - 10, name, color=colour)
        left, first = left + size * count + 10, first + count
    canvas.text(78, top + 78, "anchors", ha="right", color=INK)
    base = top + size * len(step.positive) + 32
    for x, mark, words in ((88, POSITIVE, "positive"), (182, "#efc9b6", "negative")):
        canvas.text(x, base, "■", color=mark, size=14)
        canvas.text(x + 18, base, words)
    canvas.text(286, base, "×", color=OTHER, size=16, weight="bold")
    canvas.text(302, base, "the same image: itself, its copies, its older self; never a pair")
    return canvas


PICTURES: dict[str, Callable[[], Canvas]] = {
    "contrastive": contrastive,
    "triplet": triplet,
    "multi-similarity": multi_similarity,
    "contrastive-bayesian": contrastive_bayesian,
    "intra-class": intra_class,
    "cross-batch": cross_batch,
    "channel-correlation": channel_correlation,
}
"""Name in `docs/pictures/method-NAME.svg` -> what draws it."""


def draw(name: str) -> str:
    """The SVG text of a picture.

    Raises:
        MissingExtra: without matplotlib.
    """
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib, which draws the pictures,", "train") from None
    with rc_context(STYLE):  # type: ignore[arg-type]
        return PICTURES[name]().svg()


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures again."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/methods.md again.")
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="which; default: all")
    parser.add_argument("--out", type=Path, default=PLACE, help="folder (default: docs/pictures)")
    options = parser.parse_args(arguments)
    for name in options.names or PICTURES:
        path = options.out / f"method-{name}.svg"
        text = draw(name)
        write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
        print(path)


if __name__ == "__main__":
    main()
