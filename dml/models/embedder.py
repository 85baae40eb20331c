"""The whole model: trunk → attention → pooling → head → unit vectors."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dml.config import ModelConfig
from dml.errors import ConfigError
from dml.models.channel_attention import ChannelAttention
from dml.models.output import Output
from dml.models.pooling import POOLINGS
from dml.models.trunks import Trunk, build_trunk


class Embedder(nn.Module):
    """Pictures to unit vectors.

    ::

        X = trunk(pictures)                    (N, C, H, W)
        a = attention(X)                       (N, C), when there is one
        raw  = W pool(X or a ⊙ X) + b          (N, D)
        unit = raw / ‖raw‖                     (N, D), in float32 under any autocast

    Args:
        trunk: the network that makes the feature map.
        pooling: (N, C, H, W) → (N, C).
        dim: D, length of the embedding.
        attention: channel attention, or None.
        gate: multiply the features by the attention; otherwise the attention is a side branch that only a
            loss reads.
        freeze_batch_norm: BatchNorm keeps its running statistics in train mode too; its weights are still
            trained.

    The head starts Kaiming-normal (fan out) with zero bias, as in the released CBML code.
    """

    def __init__(
        self,
        trunk: Trunk,
        pooling: nn.Module,
        *,
        dim: int,
        attention: ChannelAttention | None = None,
        gate: bool = False,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.trunk, self.pooling, self.attention = trunk, pooling, attention
        self.gate, self.freeze_batch_norm = gate, freeze_batch_norm
        self.head = nn.Linear(trunk.channels, dim)
        nn.init.kaiming_normal_(self.head.weight, a=0, mode="fan_out")
        nn.init.zeros_(self.head.bias)

    @property
    def dim(self) -> int:
        """D, length of the embedding."""
        return self.head.out_features

    @property
    def channels(self) -> int:
        """C, channels of the feature map."""
        return self.trunk.channels

    @property
    def input_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, per channel of pixels in [0, 1], that pictures must be normalised
        with.
        """
        return self.trunk.mean, self.trunk.std

    def train(self, mode: bool = True) -> "Embedder":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor, *, features: bool = False) -> Output:
        """Embed pictures (N, 3, S, S).

        Args:
            features: also return the trunk's feature map, before any gate.
        """
        maps = self.trunk(x)
        attention = None if self.attention is None else self.attention(maps)
        gated = maps * attention[:, :, None, None] if attention is not None and self.gate else maps
        raw = self.project(self.pooling(gated))
        return Output(
            raw=raw,
            unit=functional.normalize(raw, dim=1),
            features=maps if features else None,
            attention=attention,
        )

    def synchronize_batch_norm(self) -> None:
        """Make BatchNorm measure the batches of all processes together. Only for GPUs; names of parameters
        stay as they are.
        """
        # torch's own loses the activation in timm's layers
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(self)  # changes what is inside

    def project(self, pooled: Tensor) -> Tensor:
        """The head, in float32: it costs nothing, and half precision would cost neighbours."""
        kind = pooled.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.head(pooled.float())
        return self.head(pooled)


def build_embedder(config: ModelConfig, *, image_size: int) -> Embedder:
    """See `dml.models.build_model`."""
    trunk = build_trunk(config, image_size=image_size)
    if trunk.layout == "vector" and config.pooling != "avg":
        raise ConfigError(
            f'The trunk "{config.trunk}" pools its features itself, so model.pooling = "{config.pooling}" '
            f'has no map to work on. Leave it at "avg", or choose another trunk.'
        )
    attention = None
    if config.attention != "none":
        attention = ChannelAttention(trunk.channels, config.attention_reduction)
    return Embedder(
        trunk,
        POOLINGS[config.pooling](),
        dim=config.dim,
        attention=attention,
        gate=config.attention == "gate",
        freeze_batch_norm=config.freeze_batch_norm,
    )


def deployed_config(config: ModelConfig) -> ModelConfig:
    """The model as it is used after training: no side branch, and nothing to download or to load from
    elsewhere.
    """
    attention = "gate" if config.attention == "gate" else "none"
    return replace(config, attention=attention, pretrained=False, weights="")
