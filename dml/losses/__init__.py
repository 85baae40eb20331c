"""Losses by name: our own, and pytorch-metric-learning's.

Every loss is a module with that library's call signature plus ids::

    (embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None, *, ids=None, ref_ids=None) -> ()
    tensor

Ours say two things more, as class attributes: `takes` ("unit" or "raw" embeddings of the model's output), and
`candidates` (whether `ref_emb` may hold rows besides the batch). The table holds import paths, so that
listing it loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dml.config import Part
from dml.registry import construct

if TYPE_CHECKING:
    from torch import nn

    from dml.losses.channel_correlation import ChannelCorrelation
    from dml.losses.contrastive import ContrastiveLoss
    from dml.losses.contrastive_bayesian import ContrastiveBayesianLoss
    from dml.losses.cross_entropy import CrossEntropyLoss
    from dml.losses.multi_similarity import MultiSimilarityLoss
    from dml.losses.triplet import TripletLoss

LOSSES = {
    "multi_similarity": "dml.losses.multi_similarity:MultiSimilarityLoss",
    "contrastive_bayesian": "dml.losses.contrastive_bayesian:ContrastiveBayesianLoss",
    "contrastive": "dml.losses.contrastive:ContrastiveLoss",
    "triplet": "dml.losses.triplet:TripletLoss",
    "cross_entropy": "dml.losses.cross_entropy:CrossEntropyLoss",
    "proxy_nca": "pytorch_metric_learning.losses:ProxyNCALoss",
    "proxy_anchor": "pytorch_metric_learning.losses:ProxyAnchorLoss",
    "soft_triple": "pytorch_metric_learning.losses:SoftTripleLoss",
    "normalized_softmax": "pytorch_metric_learning.losses:NormalizedSoftmaxLoss",
    "arcface": "pytorch_metric_learning.losses:ArcFaceLoss",
    "subcenter_arcface": "pytorch_metric_learning.losses:SubCenterArcFaceLoss",
    "cosface": "pytorch_metric_learning.losses:CosFaceLoss",
    "circle": "pytorch_metric_learning.losses:CircleLoss",
    "margin": "pytorch_metric_learning.losses:MarginLoss",
    "lifted_structure": "pytorch_metric_learning.losses:GeneralizedLiftedStructureLoss",
    "nca": "pytorch_metric_learning.losses:NCALoss",
    "nt_xent": "pytorch_metric_learning.losses:NTXentLoss",
    "supcon": "pytorch_metric_learning.losses:SupConLoss",
    "tuplet_margin": "pytorch_metric_learning.losses:TupletMarginLoss",
    "fast_ap": "pytorch_metric_learning.losses:FastAPLoss",
    "smooth_ap": "pytorch_metric_learning.losses:SmoothAPLoss",
}

DESCRIPTIONS = {
    "multi_similarity": "Multi-Similarity with its mining: the strong, simple default",
    "contrastive_bayesian": "CBML: posterior odds of each pair, and a constraint on the spread of negatives",
    "contrastive": "positives within one margin, negatives beyond another",
    "triplet": "each positive nearer than each negative by a margin; semi-hard, hard, hardest or all",
    "cross_entropy": "softmax on a linear classifier of the raw embedding",
    "proxy_nca": "softmax over distances to one learned proxy per class (pytorch-metric-learning)",
    "proxy_anchor": "each class's proxy as anchor of the whole batch (pytorch-metric-learning)",
    "soft_triple": "several learned centres per class (pytorch-metric-learning)",
    "normalized_softmax": "softmax over cosines to class weights (pytorch-metric-learning)",
    "arcface": "softmax over cosines with an angular margin (pytorch-metric-learning)",
    "subcenter_arcface": "ArcFace with several centres per class (pytorch-metric-learning)",
    "cosface": "softmax over cosines with a cosine margin (pytorch-metric-learning)",
    "circle": "pairs weighted by how far they are from their optimum (pytorch-metric-learning)",
    "margin": "pairs on either side of a boundary distance (pytorch-metric-learning)",
    "lifted_structure": "soft hardest pairs per anchor, generalised (pytorch-metric-learning)",
    "nca": "neighbourhood component analysis over the batch (pytorch-metric-learning)",
    "nt_xent": "normalised temperature cross entropy, also known as InfoNCE (pytorch-metric-learning)",
    "supcon": "supervised contrastive: all positives against all others (pytorch-metric-learning)",
    "tuplet_margin": "one positive against many negatives with an angular slack (pytorch-metric-learning)",
    "fast_ap": "average precision through soft histograms (pytorch-metric-learning)",
    "smooth_ap": "average precision through smoothed ranks (pytorch-metric-learning)",
}

OURS = {path.partition(":")[2]: path for path in LOSSES.values() if path.startswith("dml.")} | {
    "ChannelCorrelation": "dml.losses.channel_correlation:ChannelCorrelation"
}

__all__ = [
    "DESCRIPTIONS",
    "LOSSES",
    "ChannelCorrelation",
    "ContrastiveBayesianLoss",
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "MultiSimilarityLoss",
    "TripletLoss",
    "build_loss",
]


def __getattr__(name: str) -> Any:
    """Our loss classes, loaded when first asked for."""
    if name not in OURS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = OURS[name].partition(":")
    return getattr(import_module(module), attribute)


def build_loss(part: Part, *, num_classes: int, dim: int) -> "nn.Module":
    """Make the loss a recipe names.

    Args:
        part: a name of `LOSSES` or "package.module:Class", and its keyword arguments.
        num_classes: classes of the training set.
        dim: length of the embedding. Both are passed where the constructor has a parameter for them.

    Raises:
        ConfigError: an unknown name or argument, with the nearest known one, or values that the loss refuses.
    """
    context = {
        "num_classes": num_classes,
        "embedding_size": dim,
        "in_features": dim,
        "descriptors_dim": dim,
        "dim": dim,
    }
    return construct("loss", part.name, part.args, LOSSES, context)
