"""Dividing a table: what is held out, what is respected, what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dml.config import DataConfig
from dml.data.check import write_manifest
from dml.data.split import Splits, divide
from dml.data.table import ImageTable, Record, counted, open_table
from dml.errors import DataError, StorageError

ROOT = Path("/pictures")


def table(*groups):
    """Groups of (split, role, label, count)."""
    records = [
        Record(ROOT / f"{role or split or 'all'}/{label}/{i}.jpg", label, split, role=role)
        for split, role, label, count in groups
        for i in range(count)
    ]
    return ImageTable("drawn", ROOT, "CLASS folders", tuple(records))


def classes(count, images=6, split=None, start=0):
    return [(split, None, f"c{i:03d}", images) for i in range(start, start + count)]


def parts(splits):
    return {
        name: set(counted(getattr(splits, name)))
        for name in ("train", "validation", "test", "query", "gallery")
    }


def test_from_twenty_classes_on_whole_classes_are_held_out():
    splits = divide(table(*classes(20)), DataConfig())
    found = parts(splits)
    assert splits.protocol == "open-set"
    assert [len(found[name]) for name in ("train", "validation", "test")] == [12, 4, 4]
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert not found["validation"] & found["test"]
    assert sum(len(getattr(splits, n)) for n in ("train", "validation", "test")) == 120


def test_below_twenty_classes_images_are_held_out():
    splits = divide(table(*classes(19, images=10)), DataConfig())
    assert splits.protocol == "closed-set"
    for name in ("train", "validation", "test"):
        sizes = counted(getattr(splits, name))
        assert len(sizes) == 19
        assert set(sizes.values()) == {6 if name == "train" else 2}
    paths = [r.path for name in ("train", "validation", "test") for r in getattr(splits, name)]
    assert len(paths) == len(set(paths)) == 190


def test_shares_count_from_the_whole():
    splits = divide(table(*classes(100)), DataConfig(validation_share=0.1, test_share=0.3))
    assert [len(counted(s)) for s in (splits.train, splits.validation, splits.test)] == [60, 10, 30]


def test_a_seed_decides_the_split_and_nothing_else_does():
    first = divide(table(*classes(40)), DataConfig())
    assert divide(table(*classes(40)), DataConfig()).digest == first.digest
    other = divide(table(*classes(40)), DataConfig(split_seed=1))
    assert other.digest != first.digest
    assert parts(other)["test"] != parts(first)["test"]


def test_the_digest_does_not_depend_on_where_the_data_lies(tiny_folder, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(tiny_folder)
    config = DataConfig()
    assert divide(open_table(tiny_folder), config).digest == divide(open_table(moved), config).digest


def test_splits_of_the_data_are_kept_and_validation_comes_from_training_classes():
    splits = divide(table(*classes(10, split="train"), *classes(5, split="test", start=10)), DataConfig())
    found = parts(splits)
    assert splits.protocol == "open-set"
    assert found["test"] == {f"c{i:03d}" for i in range(10, 15)}
    assert len(found["validation"]) == 2
    assert found["train"] | found["validation"] == {f"c{i:03d}" for i in range(10)}


def test_a_validation_split_of_the_data_is_kept():
    given = table(
        *classes(4, split="train"),
        *classes(2, split="validation", start=4),
        *classes(2, split="test", start=6),
    )
    found = parts(divide(given, DataConfig()))
    assert (len(found["train"]), found["validation"]) == (4, {"c004", "c005"})


def test_query_and_gallery_take_the_place_of_test():
    given = table(
        *classes(8, split="train"),
        ("test", "query", "x", 3),
        ("test", "gallery", "x", 5),
        ("test", "gallery", "y", 5),
    )
    splits = divide(given, DataConfig())
    assert splits.protocol == "open-set"
    assert (len(splits.test), len(splits.query), len(splits.gallery)) == (0, 3, 10)


def test_queries_without_a_gallery_are_searched_in_the_training_images_of_their_classes():
    given = table(("train", None, "a", 20), ("train", None, "b", 20), ("test", "query", "a", 4))
    splits = divide(given, DataConfig())
    assert splits.protocol == "closed-set"
    assert splits.gallery == splits.train
    assert any("searched in the training images" in note for note in splits.notes)


def test_queries_of_new_classes_without_a_gallery_are_searched_among_themselves():
    given = table(*classes(8, split="train"), ("test", "query", "new", 4), ("test", "query", "newer", 4))
    splits = divide(given, DataConfig())
    assert (len(splits.test), splits.query, splits.gallery) == (8, (), ())


def test_asking_for_open_set_with_shared_classes_is_refused():
    given = table(*classes(5, split="train"), *classes(3, split="test"))
    assert divide(given, DataConfig()).protocol == "closed-set"
    with pytest.raises(DataError, match=r"share 3 classes \(c000, c001, c002\)"):
        divide(given, DataConfig(protocol="open-set"))


def test_asking_for_closed_set_with_new_test_classes_is_refused():
    given = table(*classes(5, split="train"), *classes(3, split="test", start=5))
    with pytest.raises(DataError, match="closed-set was asked for"):
        divide(given, DataConfig(protocol="closed-set"))


def test_validation_and_test_may_not_share_classes_in_open_set():
    given = table(
        *classes(5, split="train"),
        *classes(3, split="validation", start=5),
        *classes(3, split="test", start=7),
    )
    with pytest.raises(DataError, match=r"validation and test share 1 classes \(c007\)"):
        divide(given, DataConfig())


def test_exact_duplicates_stay_on_one_side(tmp_path, draw):
    for label in "abc":
        (tmp_path / label).mkdir()
        for i in range(12):
            draw(ord(label) * 100 + i // 2, (24, 24)).save(
                tmp_path / label / f"{i}.png"
            )  # pairs of equal files
    for seed in range(5):
        splits = divide(open_table(tmp_path), DataConfig(split_seed=seed))
        sides = {}
        for name in ("train", "validation", "test"):
            for record in getattr(splits, name):
                sides.setdefault(record.path.read_bytes(), set()).add(name)
        assert all(len(side) == 1 for side in sides.values())
        assert len(counted(splits.test)) == 3


def test_a_picture_under_two_classes_is_never_held_out(tmp_path, draw):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            draw(0 if i == 0 else ord(label) * 100 + i, (24, 24)).save(tmp_path / label / f"{i}.png")
    for seed in range(6):
        splits = divide(open_table(tmp_path), DataConfig(split_seed=seed))
        held = {r.path.name for r in splits.validation + splits.test}
        assert "0.png" not in held


def test_classes_that_cannot_spare_images_stay_in_training():
    splits = divide(table((None, None, "big", 20), (None, None, "small", 3)), DataConfig())
    assert counted(splits.train)["small"] == 3
    assert set(counted(splits.test)) == {"big"}
    assert any("1 classes are too small" in note and "small" in note for note in splits.notes)


def test_images_without_a_label_take_no_part(tmp_path):
    given = table(*classes(20))
    loose = (Record(ROOT / "loose.jpg", None),)
    splits = divide(ImageTable("t", ROOT, "x", given.records + loose), DataConfig())
    assert any("1 images without a label" in note for note in splits.notes)
    assert len(splits.train + splits.validation + splits.test) == 120


def test_no_classes_is_refused_with_the_way_out():
    given = ImageTable("t", ROOT, "unlabelled", (Record(ROOT / "1.jpg", None),))
    with pytest.raises(DataError, match="no classes.*dml encoder create"):
        divide(given, DataConfig())


def test_one_class_is_refused():
    with pytest.raises(DataError, match=r'one training class only \("c000"\)'):
        divide(table(*classes(1)), DataConfig())


def test_classes_of_one_image_each_are_refused():
    with pytest.raises(DataError, match="None of the 30 training classes"):
        divide(table(*classes(30, images=1)), DataConfig())


def test_a_class_with_one_image_among_others_is_trained_on_and_never_held_out():
    for seed in range(10):
        splits = divide(table(*classes(24), (None, None, "lone", 1)), DataConfig(split_seed=seed))
        assert "lone" in parts(splits)["train"]


def test_too_few_classes_to_hold_any_out_is_refused():
    with pytest.raises(DataError, match="cannot be spared"):
        divide(table(*classes(4)), DataConfig(protocol="open-set"))


def test_too_few_images_to_hold_any_out_is_refused():
    with pytest.raises(DataError, match="no class has enough images"):
        divide(table(*classes(5, images=3)), DataConfig())


def test_data_without_training_images_is_refused():
    with pytest.raises(DataError, match="no training images"):
        divide(table(*classes(5, split="test")), DataConfig())


def test_describe_names_protocol_counts_and_shared_classes():
    text = divide(table(*classes(20)), DataConfig()).describe()
    assert text.startswith("protocol open-set")
    assert "train: 72 images of 12 classes" in text
    assert "train & test 0" in text


def test_splits_survive_json_and_a_move():
    splits = divide(table(*classes(20)), DataConfig())
    assert Splits.from_json(splits.to_json()) == splits
    moved = Splits.from_json(splits.to_json(), root=Path("/elsewhere"))
    assert moved.train[0].path.is_relative_to("/elsewhere")
    assert moved.digest == splits.digest


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "not json"])
def test_a_damaged_file_of_splits_is_refused(damage):
    with pytest.raises(DataError, match="damaged"):
        Splits.from_json(damage)


def test_splits_changed_by_hand_are_refused():
    tree = json.loads(divide(table(*classes(20)), DataConfig()).to_json())
    tree["test"].append(tree["train"].pop())
    with pytest.raises(DataError, match="do not fit their digest"):
        Splits.from_json(json.dumps(tree))


def test_splits_of_a_newer_version_are_refused():
    tree = json.loads(divide(table(*classes(20)), DataConfig()).to_json())
    with pytest.raises(DataError, match="newer version"):
        Splits.from_json(json.dumps({**tree, "format": 2}))


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.parquet"])
def test_a_written_manifest_gives_the_same_splits(tiny_folder, tmp_path, name):
    splits = divide(open_table(tiny_folder), DataConfig())
    again = divide(open_table(write_manifest(splits, tmp_path / "deep" / name)), DataConfig())
    for part in ("train", "validation", "test"):
        assert {(r.path, r.label) for r in getattr(again, part)} == {
            (r.path.resolve(), r.label) for r in getattr(splits, part)
        }
    assert again.protocol == splits.protocol


def test_a_manifest_keeps_boxes_payload_and_roles(tmp_path, draw):
    draw(0).save(tmp_path / "a.jpg")
    rows = [
        Record(tmp_path / "a.jpg", label, split, (1, 2, 30, 40 + i), role, {"price": i})
        for i, (label, split, role) in enumerate(
            [("a", "train", None), ("a", "train", None), ("b", "validation", None), ("c", "test", "query"),
             ("c", "test", "gallery")]
        )
    ]  # fmt: skip
    splits = Splits("open-set", tuple(rows[:2]), (rows[2],), (), (rows[3],), (rows[4],), digest="")
    table = open_table(write_manifest(splits, tmp_path / "m.csv"))
    assert sorted(table.records, key=lambda r: r.payload["price"]) == rows


def test_a_manifest_that_cannot_be_written_leaves_nothing(tiny_folder, tmp_path):
    splits = divide(open_table(tiny_folder), DataConfig())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not be written"):
        write_manifest(splits, tmp_path / "file" / "m.csv")
    odd = Record(tmp_path / os.fsdecode(b"gr\xfc.jpg"), "a", "train")
    with pytest.raises(DataError, match="not UTF-8"):
        write_manifest(replace(splits, train=(odd,)), tmp_path / "m.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_manifest_of_another_kind_is_refused(tiny_folder, tmp_path):
    splits = divide(open_table(tiny_folder), DataConfig())
    with pytest.raises(DataError, match=r"ends in \.csv"):
        write_manifest(splits, tmp_path / "m.xlsx")
