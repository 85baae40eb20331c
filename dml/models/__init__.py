"""Picture to vector: a trunk makes a feature map, pooling makes it a vector, a linear head makes it an
embedding.

A trunk is a name of `TRUNKS`, any timm model by its name, or a class of your own as "package.module:Class".
Importing this package loads no torch; `build_model` does.
"""

from typing import TYPE_CHECKING

from dml.config import ModelConfig

if TYPE_CHECKING:
    from dml.models.embedder import Embedder

TRUNKS = {"tiny": "dml.models.tiny:TinyTrunk"}
"""Our own trunks. Every timm model can be named as well: they are not listed here."""

DESCRIPTIONS = {
    "tiny": "residual net of 0.5 M parameters for pictures of 32 to 96 px, made to be trained on a CPU"
}


def build_model(config: ModelConfig, *, image_size: int) -> "Embedder":
    """Make the model that a recipe describes, with fresh or loaded trunk weights and a fresh head.

    Args:
        config: the [model] part of a recipe.
        image_size: side of the square pictures it will see, in pixels.

    Raises:
        ConfigError: for an unknown trunk or wrong trunk arguments, a weights file that does not fit,
            pretrained weights that cannot be had, or a pooling that the trunk has no use for.
    """
    from dml.models.embedder import build_embedder

    return build_embedder(config, image_size=image_size)


__all__ = ["DESCRIPTIONS", "TRUNKS", "build_model"]
