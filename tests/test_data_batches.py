"""Pictures to batches: order, repeatability, bad files, crops that show what they should."""

import numpy as np
import pytest
import torch
from PIL import Image

from dml.config import DataConfig, Part
from dml.data.augment import Standard, build_augmentation, jitter
from dml.data.images import ImageSource, training_batches
from dml.data.reading import batches_of, read, read_ahead
from dml.data.sampler import ClassBalancedSampler
from dml.data.table import Record, open_table
from dml.errors import ConfigError, DataError, InvalidImage, TooManyBadImages

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def pixels(picture):
    return np.asarray(picture.resize((8, 8)), dtype=np.float32).transpose(2, 0, 1)


# --- reading ---


def test_batches_come_in_order_and_complete(tiny_folder):
    records = open_table(tiny_folder).records
    batches = list(batches_of(records, pixels, batch_size=20, workers=3))
    assert [len(indices) for indices, _ in batches] == [20, 20, 8]
    assert np.concatenate([indices for indices, _ in batches]).tolist() == list(range(48))
    for indices, arrays in batches:
        assert arrays.shape == (len(indices), 3, 8, 8)
        for index, array in zip(indices, arrays, strict=True):
            assert np.array_equal(array, pixels(read(records[index])))


def test_bad_pictures_are_left_out_and_listed(tiny_folder, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    good = [r.path for r in open_table(tiny_folder).records[:5]]
    paths = [tmp_path / "gone.jpg", *good, tmp_path / "text.jpg"]
    bad = []
    ((indices, _),) = batches_of(paths, pixels, batch_size=5, bad=bad)
    assert indices.tolist() == [1, 2, 3, 4, 5]
    assert [b.path for b in bad] == [str(tmp_path / "gone.jpg"), str(tmp_path / "text.jpg")]
    assert "does not exist" in bad[0].reason


def test_nothing_but_bad_pictures_gives_no_batch(tmp_path):
    assert list(batches_of([tmp_path / "a.jpg"], pixels)) == []


def test_a_mistake_in_preprocessing_is_not_taken_for_a_bad_picture(tiny_folder):
    def broken(picture):
        raise RuntimeError("our mistake")

    with pytest.raises(RuntimeError, match="our mistake"):
        list(batches_of(open_table(tiny_folder).records, broken))


def test_reading_ahead_is_bounded():
    started = []

    def work(i):
        started.append(i)
        return i

    results = read_ahead(work, range(1000), workers=2, ahead=10)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(started) <= 16
    results.close()


def test_a_record_is_cut_to_its_box(tmp_path):
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste("red", (10, 10, 20, 30))
    picture.save(tmp_path / "a.png")
    cut = read(Record(tmp_path / "a.png", None, box=(10, 10, 20, 30)))
    assert cut.size == (10, 20)
    assert cut.getcolors() == [(200, (255, 0, 0))]
    with pytest.raises(InvalidImage, match="outside the picture"):
        read(Record(tmp_path / "a.png", None, box=(50, 50, 60, 60)))


# --- sampler ---


def make_sampler(sizes, p=4, k=3, **options):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return labels, ClassBalancedSampler(labels, classes_per_batch=p, images_per_class=k, **options)


@pytest.mark.parametrize("sizes", [[5] * 4, [5] * 9, [1, 2, 3, 50, 7, 8, 4], list(range(1, 30))])
def test_a_batch_holds_p_classes_with_k_images_each(sizes):
    labels, sampler = make_sampler(sizes, steps_per_epoch=40)
    for rows in sampler.epoch(0):
        found, counts = np.unique(labels[rows], return_counts=True)
        assert len(found) == 4
        assert (counts == 3).all()
        for c in found:
            images = rows[labels[rows] == c]
            assert len(set(images.tolist())) == min(3, sizes[c])


def test_every_class_is_drawn_equally_often_whatever_its_size():
    labels, sampler = make_sampler([2, 100, 5, 9, 4, 7, 30, 3], steps_per_epoch=20)
    drawn = np.bincount(np.concatenate([labels[rows] for rows in sampler.epoch(0)]), minlength=8)
    assert (drawn == 30).all()


def test_every_class_is_seen_in_every_round_and_no_class_is_rare():
    labels, sampler = make_sampler([6] * 11, steps_per_epoch=300)
    batches = [labels[rows] for rows in sampler.epoch(0)]
    for start in range(0, 300, 3):
        assert len(np.unique(np.concatenate(batches[start : start + 3]))) == 11
    drawn = np.bincount(np.concatenate(batches), minlength=11) / 3
    assert drawn.min() >= 100
    assert drawn.max() <= 1.3 * drawn.min()


def test_every_image_of_a_class_is_shown_before_any_is_shown_twice_as_often():
    _, sampler = make_sampler([10, 10, 10, 10], p=4, k=3, steps_per_epoch=4)
    shown = np.bincount(np.concatenate(list(sampler.epoch(0))), minlength=40)
    assert shown.min() >= 1
    assert shown.max() <= 2


def test_batches_depend_on_seed_and_number_only():
    _, one = make_sampler([7] * 10, steps_per_epoch=6, seed=3)
    _, two = make_sampler([7] * 10, steps_per_epoch=6, seed=3)
    _, other = make_sampler([7] * 10, steps_per_epoch=6, seed=4)
    late = list(two.epoch(2, start=4))
    assert all(np.array_equal(a, b) for a, b in zip(list(one.epoch(2))[4:], late, strict=True))
    assert not np.array_equal(one.batch(0), one.batch(6))
    assert not np.array_equal(one.batch(0), other.batch(0))


def test_an_epoch_shows_about_as_many_images_as_there_are():
    _, sampler = make_sampler([10] * 10, p=4, k=3)
    assert len(sampler) == 9
    assert len(list(sampler.epoch(0))) == 9


def test_fewer_classes_than_asked_give_batches_of_the_same_size_and_a_note():
    labels, sampler = make_sampler([20] * 10, p=16, k=4)
    assert (sampler.classes_per_batch, sampler.images_per_class) == (10, 7)
    assert "16 classes x 4 images were asked for" in sampler.note
    assert len(np.unique(labels[sampler.batch(0)])) == 10


def test_one_class_cannot_be_sampled():
    with pytest.raises(DataError, match="at least two classes"):
        make_sampler([20])


# --- augmentation ---


def coordinates(side=80):
    """A picture whose red is x and whose green is y, so that a crop tells where it was taken."""
    ramp = torch.linspace(0, 255, side)
    x, y = ramp.expand(side, side), ramp[:, None].expand(side, side)
    return torch.stack([x, y, torch.zeros(side, side)]).to(torch.uint8)


def test_no_augmentation_shows_the_middle_square():
    pictures = coordinates()[None].repeat(3, 1, 1, 1)
    aspect = torch.tensor([1.0, 2.0, 0.5])
    out = build_augmentation(Part("none")).on_batch(pictures, aspect, 64, torch.Generator())
    assert out.shape == (3, 3, 64, 64)
    for picture, left, top in zip(out, (0, 0.25, 0), (0, 0, 0.25), strict=True):
        assert picture[0].min().item() == pytest.approx(left, abs=0.02)
        assert picture[0].max().item() == pytest.approx(1 - left, abs=0.02)
        assert picture[1].min().item() == pytest.approx(top, abs=0.02)
        assert picture[1].max().item() == pytest.approx(1 - top, abs=0.02)


def test_crops_stay_inside_and_cover_the_asked_share():
    still = Standard(scale=(0.25, 0.25), ratio=(1, 1), flip=0, brightness=0, contrast=0, saturation=0)
    count = 200
    out = still.on_batch(
        coordinates()[None].expand(count, -1, -1, -1), torch.ones(count), 32, torch.Generator().manual_seed(0)
    )
    width = out[:, 0].amax(dim=(1, 2)) - out[:, 0].amin(dim=(1, 2))
    assert width.min() > 0.45
    assert width.max() < 0.51
    left = out[:, 0].amin(dim=(1, 2))
    assert left.min() < 0.03
    assert left.max() > 0.44  # both ends are reached


def test_a_crop_of_a_wide_picture_has_the_proportions_of_the_scene():
    still = Standard(scale=(0.5, 0.5), ratio=(1, 1), flip=0, brightness=0, contrast=0, saturation=0)
    out = still.on_batch(coordinates()[None], torch.tensor([2.0]), 64, torch.Generator().manual_seed(1))
    width = (out[0, 0].max() - out[0, 0].min()) * 2  # the scene is twice as wide as high
    height = out[0, 1].max() - out[0, 1].min()
    assert width.item() == pytest.approx(height.item(), rel=0.05)


def test_mirroring_turns_left_and_right_only():
    still = Standard(scale=(1, 1), ratio=(1, 1), flip=1, brightness=0, contrast=0, saturation=0)
    out = still.on_batch(coordinates()[None], torch.ones(1), 80, torch.Generator())[0]
    expected = coordinates().flip(-1) / 255
    torch.testing.assert_close(out, expected, atol=0.01, rtol=0)


def test_every_sample_gets_changes_of_its_own():
    out = Standard().on_batch(
        coordinates()[None].repeat(8, 1, 1, 1), torch.ones(8), 16, torch.Generator().manual_seed(0)
    )
    assert len(torch.unique(out.flatten(1), dim=0)) == 8


def test_jitter_by_one_changes_nothing_and_zero_saturation_is_grey():
    picture = torch.rand(2, 3, 8, 8)
    one = torch.ones(2)
    torch.testing.assert_close(jitter(picture, one, one, one), picture)
    grey = jitter(picture, one, one, torch.zeros(2))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    flat = jitter(picture, one, torch.zeros(2), torch.zeros(2))
    assert flat.flatten(1).std(dim=1).max() < 1e-6


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("standart"), "standard"),
        (Part("standard", {"flips": 1}), "flips"),
        (Part("standard", {"flip": 2}), "flip must be a probability, got 2"),
        (Part("standard", {"scale": [0.5, 2]}), "scale must be two shares"),
    ],
)
def test_a_wrong_augmentation_is_refused(part, message):
    with pytest.raises(ConfigError, match=message):
        build_augmentation(part)


# --- sources and training batches ---


def make_batches(folder, *, seed=0, **config):
    settings = DataConfig(image_size=32, **config)
    table = open_table(folder)
    source = ImageSource(table.records, table.classes, settings, **HALF)
    sampler = ClassBalancedSampler(source.labels.tolist(), classes_per_batch=3, images_per_class=4, seed=seed)
    return source, training_batches(source, sampler, build_augmentation(settings.augmentation), seed=seed)


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "from disk"])
def test_batches_are_repeatable_and_can_be_resumed(tiny_folder, memory_gb):
    source, batches = make_batches(tiny_folder, memory_gb=memory_gb)
    assert (source.pixels is None) == (memory_gb == 0)
    first = list(batches.epoch(1))
    assert len(first) == len(batches) == 4
    _, again = make_batches(tiny_folder, memory_gb=memory_gb)
    for a, b in zip(first[2:], again.epoch(1, start=2), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.inputs, b.inputs)
    assert not torch.equal(first[0].inputs, next(iter(batches.epoch(2))).inputs)


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "from disk"])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_batch_is_normalised_and_labelled(tiny_folder, memory_gb, fit):
    source, batches = make_batches(tiny_folder, memory_gb=memory_gb, fit=fit)
    batch = next(iter(batches.epoch(0)))
    assert batch.inputs.shape == (12, 3, 32, 32)
    assert batch.inputs.dtype == torch.float32
    assert -1 <= batch.inputs.min() < batch.inputs.max() <= 1
    for row, label in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
        assert source.classes[label] == source.records[row].path.parent.name


def test_the_number_of_workers_changes_nothing(tiny_folder):
    first, second = (
        list(make_batches(tiny_folder, memory_gb=0, workers=workers)[1].epoch(0)) for workers in (0, 2)
    )
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))


def test_in_memory_and_from_disk_show_the_same_scene(tiny_folder):
    plain = {"augmentation": Part("none")}
    (_, memory), (_, disk) = (make_batches(tiny_folder, memory_gb=gb, **plain) for gb in (1, 0))
    a, b = next(iter(memory.epoch(0))), next(iter(disk.epoch(0)))
    assert torch.equal(a.ids, b.ids)
    assert (a.inputs - b.inputs).abs().mean() < 0.06  # resized by two filters, otherwise the same


def with_bad_files(tmp_path, draw, good=40, bad=2):
    for i in range(good):
        path = tmp_path / f"class_{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        draw(i, (40, 30)).save(path)
    for i in range(bad):
        (tmp_path / f"class_{i % 4}" / f"bad{i}.jpg").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "from disk"])
def test_bad_files_are_skipped_listed_and_counted(tmp_path, draw, memory_gb):
    source, batches = make_batches(with_bad_files(tmp_path, draw), memory_gb=memory_gb)
    assert len(source) == len(source.labels) == len(source.records) == 40
    assert sorted(b.path.rsplit("/", 1)[1] for b in source.bad) == ["bad0.jpg", "bad1.jpg"]
    assert all("not a picture" in b.reason for b in source.bad)
    assert sum(len(b) for b in batches.epoch(0)) == 48


@pytest.mark.parametrize("memory_gb", [1.0, 0.0], ids=["in memory", "from disk"])
def test_too_many_bad_files_stop_the_run(tmp_path, draw, memory_gb):
    with pytest.raises(TooManyBadImages, match=r"3 of 43 images.*5\.0%[\s\S]*dml data check"):
        make_batches(with_bad_files(tmp_path, draw, bad=3), memory_gb=memory_gb)
    source, _ = make_batches(tmp_path, memory_gb=memory_gb, max_bad_share=0.1)
    assert len(source.bad) == 3


def test_a_file_damaged_behind_its_header_is_replaced_by_one_of_its_class(tmp_path, draw):
    root = with_bad_files(tmp_path, draw, bad=0)
    victim = root / "class_1" / "1.jpg"
    victim.write_bytes(victim.read_bytes()[:-60])
    source, batches = make_batches(root, memory_gb=0, max_bad_share=0.05)
    assert source.bad == []  # the header is fine
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            assert "1.jpg" not in [source.records[i].path.name for i in batch.ids.tolist()]
            assert sorted(batch.labels.bincount(minlength=4).tolist()) == [0, 4, 4, 4]
    assert [b.path for b in source.bad] == [str(victim)]


def test_only_bad_files_stop_the_run_even_without_a_limit(tmp_path, draw):
    root = with_bad_files(tmp_path, draw, good=0, bad=0)
    for label in "ab":
        (root / label).mkdir()
        (root / label / "x.jpg").write_text("x")
    with pytest.raises(DataError, match="none of the 2"):
        make_batches(root, max_bad_share=1.0)


def test_a_label_outside_the_classes_is_refused(tiny_folder):
    table = open_table(tiny_folder)
    with pytest.raises(DataError, match=r"labels are not among the 2 classes: class_2"):
        ImageSource(table.records, table.classes[:2], DataConfig(image_size=32), **HALF)


def test_grey_input_has_one_channel(tiny_folder):
    table = open_table(tiny_folder)
    source = ImageSource(table.records, table.classes, DataConfig(image_size=32), **HALF, channels=1)
    sampler = ClassBalancedSampler(source.labels.tolist(), classes_per_batch=2, images_per_class=2)
    batch = next(iter(training_batches(source, sampler, Standard(), seed=0).epoch(0)))
    assert batch.inputs.shape == (4, 1, 32, 32)


def test_progress_is_told(tiny_folder):
    seen = []
    table = open_table(tiny_folder)
    ImageSource(
        table.records,
        table.classes,
        DataConfig(image_size=32),
        **HALF,
        progress=lambda done, all: seen.append((done, all)),
    )
    assert seen == [(i, 48) for i in range(1, 49)]
