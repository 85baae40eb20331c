"""Trunks: pictures (N, 3, S, S) in, a feature map (N, C, H, W) out, whatever the network inside returns."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dml.config import ModelConfig
from dml.errors import ConfigError
from dml.models import TRUNKS
from dml.registry import resolve

Layout = Literal["map", "map, channels last", "tokens", "vector"]
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHOWN_KEYS = 8
HUB_SECONDS = 5
"""The server of published weights has this long to show that it is there."""
INSTEAD = (
    "Without them: `dml encoder create --weights FILE.safetensors` or `--weights none`; in a recipe, "
    'model.weights = "FILE.safetensors" or model.pretrained = false.'
)


class Trunk(nn.Module):
    """A network and the way its output becomes a feature map.

    Attributes:
        net: the network itself.
        channels: C of the feature map.
        layout: what `net` returns for a batch. "map" (N, C, H, W); "map, channels last" (N, H, W, C) (Swin);
            "tokens" (N, T, C) (ViT): the first `prefix` (class, register) are dropped, the rest becomes a
            square map where its number is a square, else a map of T x 1; "vector" (N, C): a map of 1 x 1.
        mean, std: of the pixel values in [0, 1] that the net expects, per channel.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        channels: int,
        layout: Layout,
        prefix: int = 0,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.net, self.channels, self.layout, self.prefix = net, channels, layout, prefix
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.layout == "map":
            return out
        if self.layout == "map, channels last":
            return out.permute(0, 3, 1, 2)
        if self.layout == "vector":
            return out[:, :, None, None]
        patches = out[:, self.prefix :].transpose(1, 2)
        side = isqrt(patches.shape[2])
        if side * side == patches.shape[2]:
            return patches.reshape(patches.shape[0], patches.shape[1], side, side)
        return patches[:, :, :, None]


def build_trunk(config: ModelConfig, *, image_size: int) -> Trunk:
    """Make the trunk that `config` names, with fresh, published or local weights.

    Raises:
        ConfigError: for an unknown name, arguments or a picture size the network does not take, pretrained
            weights that cannot be loaded, or a weights file that does not fit.
    """
    if config.trunk in TRUNKS or ":" in config.trunk:
        if config.pretrained:
            raise ConfigError(f'There are no pretrained weights for the trunk "{config.trunk}". {INSTEAD}')
        net = build_own(config, image_size=image_size)
    else:
        net = build_timm(config, image_size=image_size)
    if config.weights:
        load_weights(net, Path(config.weights))
    return measure(net, config, image_size=image_size)


def build_own(config: ModelConfig, *, image_size: int) -> nn.Module:
    """A trunk of `TRUNKS` or of the user's own code. `image_size` is passed where the constructor takes
    it.
    """
    factory = resolve("trunk", config.trunk, TRUNKS)
    takes = inspect.signature(factory).parameters
    args = {"image_size": image_size, **config.trunk_args} if "image_size" in takes else config.trunk_args
    try:
        inspect.signature(factory).bind(**args)
    except TypeError as error:
        known = ", ".join(name for name in takes if name != "self")
        raise ConfigError(
            f'The trunk "{config.trunk}" cannot take model.trunk_args: {error}. Known: {known}.'
        ) from None
    try:
        return factory(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'The trunk "{config.trunk}" refuses model.trunk_args: {error}') from error


def build_timm(config: ModelConfig, *, image_size: int) -> nn.Module:
    """A timm model without its classifier and pooling, told the picture size where it is built for one
    size.
    """
    import timm

    check_timm_name(config.trunk)
    settings = timm.get_pretrained_cfg(config.trunk, allow_unregistered=True)
    args: dict[str, Any] = {"num_classes": 0, "global_pool": "", **config.trunk_args}
    if settings is not None and settings.fixed_input_size:
        args.setdefault("img_size", image_size)
    try:
        return create(config, args)
    except AssertionError:  # a few (distilled, CoaT, CaiT) read one token and cannot return the map
        args.pop("global_pool")
    return create(config, args)


def create(config: ModelConfig, args: Mapping[str, Any]) -> nn.Module:
    """timm.create_model, its errors turned into ours."""
    import timm

    try:
        net = timm.create_model(config.trunk, pretrained=False, **args)
    except AssertionError as error:
        if "global_pool" in args:
            raise
        raise ConfigError(f'The trunk "{config.trunk}" cannot be built with {dict(args)}: {error}') from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f'The trunk "{config.trunk}" cannot be built with {dict(args)}: {error}') from error
    if not config.pretrained:
        return net
    silent = hub_is_silent()
    try:
        with using_the_cache_only() if silent else nullcontext():
            return timm.create_model(config.trunk, pretrained=True, **args)
    except Exception as error:  # hub clients raise errors of several packages; all mean the same to the user
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = f"they are not in the cache, and {silent}" if silent else said
        raise ConfigError(
            f'The published weights of "{config.trunk}" cannot be loaded: {reason}. A network is needed the '
            f"first time. {INSTEAD}"
        ) from error


def hub_is_silent() -> str:
    """Why the server of published weights cannot be reached; "" where it answers, or nobody knows.

    Its client asks six times for each of two files, with a minute of pauses, before it looks into its cache.
    """
    try:
        from huggingface_hub import constants, get_session
    except ImportError:
        return ""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of httpx or requests, as the client's version has it
        return f"{constants.ENDPOINT} does not answer ({str(error) or type(error).__name__:.200})"
    return ""


@contextmanager
def using_the_cache_only() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, which is read only once, when the client is imported."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_timm_name(name: str) -> None:
    """Raise ConfigError, with the nearest names, when neither `TRUNKS` nor timm knows this one."""
    import timm

    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")] if tag else []
        if not tag or tag in tags:
            return
        guess = " or ".join(get_close_matches(tag, tags, n=3))
        raise ConfigError(
            f'The trunk "{architecture}" has no published weights "{tag}". '
            f"{f'Did you mean {guess}? ' if guess else ''}Known: {', '.join(tags) or 'none'}."
        )
    guess = get_close_matches(name, [*TRUNKS, *timm.list_models()], n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(guess)}? " if guess else ""
    raise ConfigError(
        f'Unknown trunk "{name}". {hint}Known: {", ".join(TRUNKS)}, and all of timm {timm.__version__}. '
        f'Your own class works too: write it as "my_package.my_module:MyClass".'
    )


class PublishedInput(NamedTuple):
    """How pictures were prepared for a trunk's published weights."""

    size: int  # side in pixels
    margin: float  # whole picture over the part that is used, per side
    interpolation: Literal["bilinear", "bicubic", "lanczos"]


def published_input(trunk: str) -> PublishedInput:
    """What a timm trunk's published weights expect; 64 px, the whole picture and bilinear for all others."""
    if trunk in TRUNKS or ":" in trunk:
        return PublishedInput(64, 1.0, "bilinear")
    import timm

    check_timm_name(trunk)
    settings = timm.get_pretrained_cfg(trunk, allow_unregistered=True)
    if settings is None:
        return PublishedInput(64, 1.0, "bilinear")
    filters: dict[str, Literal["bilinear", "bicubic", "lanczos"]] = {
        "bilinear": "bilinear",
        "lanczos": "lanczos",
    }
    return PublishedInput(
        size=int(settings.input_size[-1]),
        margin=1 / (settings.crop_pct or 1.0),
        interpolation=filters.get(settings.interpolation, "bicubic"),
    )


def measure(net: nn.Module, config: ModelConfig, *, image_size: int) -> Trunk:
    """Run one grey picture through the net to learn what it returns: names and attributes are not
    reliable.
    """
    was_training = net.training
    net.eval()
    try:
        with torch.no_grad():
            out = net(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(
            f'The trunk "{config.trunk}" cannot read pictures of {image_size} x {image_size} px: {error}. '
            f"Change data.image_size, or give what it needs in model.trunk_args."
        ) from error
    finally:
        net.train(was_training)
    if not isinstance(out, Tensor) or out.ndim not in (2, 3, 4):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f'The trunk "{config.trunk}" must return a tensor (N, C, H, W), (N, T, C) or (N, C); '
            f"it gave {given}."
        )
    layout: Layout = ("vector", "tokens", "map")[out.ndim - 2]
    if layout == "map" and str(getattr(net, "output_fmt", "")).endswith("NHWC"):
        layout = "map, channels last"
    settings = getattr(net, "pretrained_cfg", None) or {}
    mean = tuple(settings.get("mean") or getattr(net, "mean", IMAGENET_STATS[0]))
    std = tuple(settings.get("std") or getattr(net, "std", IMAGENET_STATS[1]))
    return Trunk(
        net,
        channels=out.shape[1] if layout in ("map", "vector") else out.shape[-1],
        layout=layout,
        prefix=int(getattr(net, "num_prefix_tokens", 0) or 0) if layout == "tokens" else 0,
        mean=tuple(float(v) for v in mean),
        std=tuple(float(v) for v in std),
    )


def load_weights(net: nn.Module, path: Path) -> None:
    """Fill a trunk from a safetensors file: bare keys, or those of an encoder folder ("trunk.net.…").

    The classifier of a published model may be there (it is not used); nothing else may be missing or left
    over.

    Raises:
        ConfigError: for a missing or damaged file, and for keys or shapes that do not fit (listed).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"There is no weights file {path}.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors: {error}. Pickled files (.pt, .pth, .bin) are not read, "
            f"because they can run code; convert them with safetensors.torch.save_file."
        ) from error
    own = {
        key.removeprefix("trunk.net."): value for key, value in state.items() if key.startswith("trunk.net.")
    }
    state = fit_to_timm(net, own or state)
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted and not belongs_to_classifier(net, key)]
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, trunk {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{title} ({len(keys)}): {', '.join(keys[:SHOWN_KEYS])}{', …' if len(keys) > SHOWN_KEYS else ''}"
        for title, keys in (("missing", missing), ("not in the trunk", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ConfigError(f"The weights in {path} do not fit this trunk:\n  {listed}")
    net.load_state_dict({key: value for key, value in state.items() if key in wanted})


def fit_to_timm(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What timm does to published weights: rename old keys, resize position embeddings to the picture
    size.
    """
    module = sys.modules[type(net).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None)
    return adapt(state, net) if adapt is not None and module.__name__.startswith("timm.") else state


def belongs_to_classifier(net: nn.Module, key: str) -> bool:
    names = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))
