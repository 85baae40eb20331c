"""The one eval-time preprocessing: what is cut, how it is resized, and which numbers come out."""

import numpy as np
import pytest
from PIL import Image

from dml.encoder.preprocess import Preprocess
from dml.errors import EncoderError

HALF = (0.5, 0.5, 0.5)
FITS = ("crop", "pad", "squash")


def plain(size: int = 8, fit: str = "crop", **others) -> Preprocess:
    return Preprocess(size, fit, others.pop("mean", HALF), others.pop("std", HALF), **others)  # type: ignore[arg-type]


def stripes(width: int, height: int, edge: int) -> Image.Image:
    """Green in the middle; red at the two ends of the longer side, `edge` pixels each."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 255
    ends = (slice(None), slice(edge)), (slice(None), slice(-edge, None))
    for rows, columns in ends if width >= height else tuple((c, r) for r, c in ends):
        pixels[rows, columns] = (255, 0, 0)
    return Image.fromarray(pixels)


def test_the_numbers_are_value_over_255_minus_mean_over_std() -> None:
    prepare = plain(4, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    out = prepare(Image.new("RGB", (9, 7), (10, 128, 255)))
    assert out.shape == (3, 4, 4)
    assert out.dtype == np.float32
    assert out.flags["C_CONTIGUOUS"]
    expected = (np.array([10, 128, 255]) / 255 - prepare.mean) / prepare.std
    np.testing.assert_allclose(out, np.broadcast_to(expected[:, None, None], (3, 4, 4)), atol=1e-6)


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_crop_cuts_the_ends_of_the_longer_side(size: tuple[int, int]) -> None:
    pixels = plain(10, "crop").pixels(stripes(*size, edge=8))
    assert (pixels[..., 0] == 0).all(), "the red ends lie outside the central square"
    assert (pixels[..., 1] == 255).all()


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_pad_keeps_everything_and_fills_with_the_mean_colour(size: tuple[int, int]) -> None:
    pixels = plain(16, "pad", mean=(0.2, 0.4, 0.6)).pixels(stripes(*size, edge=10))
    if size[0] < size[1]:
        pixels = pixels.transpose(1, 0, 2)
    assert (pixels[[0, 3, 12, 15]] == (51, 102, 153)).all(), "4 rows of border above and below"
    assert (pixels[8, [0, -1]] == (255, 0, 0)).all(), "the ends are there"
    assert (pixels[8, 8] == (0, 255, 0)).all()


def test_the_border_of_pad_is_zero_for_the_model() -> None:
    out = plain(16, "pad", mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))(stripes(40, 20, edge=10))
    np.testing.assert_allclose(out[:, 0], 0, atol=1e-6)


def test_squash_keeps_everything_and_no_proportions() -> None:
    pixels = plain(16, "squash").pixels(stripes(40, 20, edge=10))
    assert (pixels[:, 0] == (255, 0, 0)).all()
    assert (pixels[:, -1] == (255, 0, 0)).all()
    assert (pixels[:, 8] == (0, 255, 0)).all()


def test_margin_uses_the_middle() -> None:
    picture = stripes(32, 32, edge=3)
    assert (plain(8, "crop").pixels(picture)[..., 0] > 0).any()
    assert (plain(8, "crop", margin=32 / 22).pixels(picture)[..., 0] == 0).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (64, 64), (700, 31)])
def test_any_size_becomes_the_square(fit: str, size: tuple[int, int]) -> None:
    out = plain(24, fit)(Image.new("RGB", size, (200, 100, 50)))
    assert out.shape == (3, 24, 24)
    assert np.isfinite(out).all()


def test_a_fine_pattern_becomes_grey_not_moiré() -> None:
    fine = np.indices((512, 512)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(fine[..., None], 3, axis=2).astype(np.uint8))
    pixels = plain(48, "crop").pixels(picture).astype(int)
    assert (abs(pixels - 127) <= 3).all()


@pytest.mark.parametrize("fit", FITS)
def test_block_averaging_of_large_photos_cannot_be_told_from_filtering_all(fit: str, draw) -> None:
    photo = draw(5, (1900, 1400))
    quick = plain(64, fit).pixels(photo).astype(int)
    side = min(photo.size)
    box = {"crop": ((1900 - side) / 2, 0, (1900 + side) / 2, side)}.get(fit, (0, 0, 1900, 1400))
    size = (64, round(1400 * 64 / 1900)) if fit == "pad" else (64, 64)
    slow = np.asarray(photo.resize(size, Image.Resampling.BILINEAR, box=box)).astype(int)
    top = (64 - size[1]) // 2
    difference = abs(quick[top : top + size[1]] - slow)
    assert difference.mean() < 0.5
    assert difference.max() <= 12


def test_the_same_picture_gives_the_same_numbers(draw) -> None:
    prepare = plain(32, "crop", interpolation="bicubic", margin=1.1)
    assert np.array_equal(prepare(draw(3, (90, 70))), prepare(draw(3, (90, 70))))


def test_batches_are_normalised_like_single_pictures(draw) -> None:
    prepare = plain(16)
    pictures = [draw(seed, (40, 30)) for seed in range(4)]
    batch = prepare.normalise(np.stack([prepare.pixels(p) for p in pictures]))
    assert np.array_equal(batch, np.stack([prepare(p) for p in pictures]))


def test_it_comes_back_from_json_as_it_was() -> None:
    prepare = plain(16, "pad", mean=(0.1, 0.2, 1 / 3), margin=256 / 224, interpolation="lanczos")
    import json

    assert Preprocess.from_json(json.loads(json.dumps(prepare.as_json()))) == prepare


@pytest.mark.parametrize(
    "change",
    [{"fit": "stretch"}, {"size": 0}, {"std": [0, 1, 1]}, {"margin": 0.5}, {"mean": [0.5]}, {"mean": "x"}],
)
def test_json_out_of_range_is_refused(change: dict) -> None:
    with pytest.raises(EncoderError, match="preprocessing of this encoder cannot be read"):
        Preprocess.from_json({**plain().as_json(), **change})


@pytest.mark.parametrize("change", [{"sharpen": 1}, {"size": None}])
def test_json_with_other_keys_is_refused(change: dict) -> None:
    tree = {**plain().as_json(), **change}
    tree = {key: value for key, value in tree.items() if value is not None}
    with pytest.raises(EncoderError, match="exactly fit, interpolation, margin, mean, size, std"):
        Preprocess.from_json(tree)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_only_decoded_pictures_are_taken(mode: str) -> None:
    with pytest.raises(ValueError, match=r"expected an RGB picture.*decode"):
        plain()(Image.new(mode, (4, 4)))


def test_nan_is_no_margin() -> None:
    with pytest.raises(ValueError, match="margin"):
        plain(margin=float("nan"))
