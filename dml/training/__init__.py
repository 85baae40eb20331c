"""Training: objectives, stages, the loop, its run folder. The tables hold import paths, loading nothing."""

METHODS = {
    "supervised": "dml.training.supervised:build_supervised",
}
"""Objectives: callables (recipe, num_classes, dim, channels) -> Objective."""

CLEANERS: dict[str, str] = {}
"""Stages that drop rows: modules (unit, labels, ids) -> (B,) bool, the rows to trust."""

AUGMENTERS = {
    "intra_class": "dml.training.intra_class:IntraClassAugmentation",
}
"""Stages that add synthetic candidates: modules (raw, labels, ids) -> Candidates or None."""

MEMORIES = {
    "cross_batch": "dml.training.memory:CrossBatchMemory",
}
"""Stages that remember candidates: modules () -> Candidates or None, with `add(unit, labels, ids)`."""

REGULARIZERS = {
    "channel_correlation": "dml.losses.channel_correlation:ChannelCorrelation",
}
"""Terms: modules (field of the model's output, labels) -> () tensor; their `reads` names the field."""

STAGES = {
    "clean": CLEANERS,
    "augment": AUGMENTERS,
    "memory": MEMORIES,
    "regularizers": REGULARIZERS,
}
"""Section of a recipe -> what may be named there."""

DESCRIPTIONS = {
    "supervised": "method: a loss on labelled images, with any of the stages below",
    "intra_class": "augment: IAA, synthetic candidates with the measured variance of each class",
    "cross_batch": "memory: embeddings of past batches as further candidates (XBM)",
    "channel_correlation": "regularizers: CC-Loss, one pattern of channels per class (a reconstruction)",
}
