"""Folders and manifests: what is recognised, what is said, what is refused."""

import csv
import os
import subprocess
import sys
from datetime import date

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dml.data.table import Record, open_table
from dml.errors import ConfigError, DataError


@pytest.fixture
def place(tmp_path, draw):
    """place("cat/1.jpg", …) -> the folder with these pictures in it."""

    def put(*names):
        for seed, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(seed, (32, 32)).save(path)
        return tmp_path

    return put


def labels(table):
    return {r.path.relative_to(table.root).as_posix(): r.label for r in table.records}


def test_a_folder_per_class(tiny_folder):
    table = open_table(tiny_folder)
    assert table.layout == "CLASS folders"
    assert len(table) == 48
    assert table.classes == tuple(f"class_{i}" for i in range(6))
    assert {r.split for r in table.records} == {None}
    assert "48 images of 6 classes" in table.describe()


def test_the_same_folder_gives_the_same_order(place):
    root = place("b/2.png", "a/10.png", "b/1.png", "a/9.png")
    names = [r.path.relative_to(root).as_posix() for r in open_table(root).records]
    assert names == ["a/10.png", "a/9.png", "b/1.png", "b/2.png"]
    assert open_table(str(root)).records == open_table(root).records


def test_a_folder_per_split_and_class(place):
    root = place("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "test/emu/3.jpg")
    table = open_table(root)
    assert table.layout == "SPLIT/CLASS folders"
    assert [(r.split, r.label) for r in table.records] == [
        ("test", "emu"), ("train", "cat"), ("train", "dog"), ("validation", "cat"),
    ]  # fmt: skip
    assert "validation: 1 image of 1 class" in table.describe()


@pytest.mark.parametrize(
    ("folder", "split"), [("val", "validation"), ("Validation", "validation"), ("TEST", "test")]
)
def test_split_folders_are_known_by_their_usual_names(place, folder, split):
    assert {r.split for r in open_table(place(f"{folder}/a/1.png")).records} == {split}


def test_query_and_gallery_are_the_two_halves_of_a_test_split(place):
    table = open_table(place("query/cat/1.jpg", "gallery/cat/2.jpg"))
    assert [(r.split, r.role) for r in table.records] == [("test", "gallery"), ("test", "query")]
    assert set(table.splits) == {"query", "gallery"}


def test_pictures_without_folders_have_no_labels(place):
    table = open_table(place("1.jpg", "2.PNG", "3.webp"))
    assert (table.layout, table.classes) == ("unlabelled", ())
    assert "3 images, no labels" in table.describe()


def test_split_folders_without_classes_have_no_labels(place):
    table = open_table(place("train/1.jpg", "test/2.jpg"))
    assert (table.layout, table.classes) == ("SPLIT folders, unlabelled", ())
    assert [r.split for r in table.records] == ["test", "train"]


def test_the_first_folder_is_the_class_however_deep_a_picture_lies(place):
    table = open_table(place("cat/1.jpg", "cat/black/old/2.jpg", "dog/3.jpg"))
    assert labels(table) == {"cat/1.jpg": "cat", "cat/black/old/2.jpg": "cat", "dog/3.jpg": "dog"}


def test_loose_pictures_beside_classes_are_kept_without_a_label(place):
    table = open_table(place("cat/1.jpg", "dog/1.jpg", "loose.jpg"))
    assert labels(table)["loose.jpg"] is None
    assert any("1 image, no labels: outside any class folder" in note for note in table.notes)


def test_a_class_may_be_called_train(place):
    table = open_table(place("train/1.jpg", "plane/1.jpg", "ship/1.jpg"))
    assert table.layout == "CLASS folders"
    assert table.classes == ("plane", "ship", "train")


def test_an_archive_folder_around_everything_is_stepped_through(place):
    table = open_table(place("photos/v2/train/cat/1.jpg", "photos/v2/test/dog/1.jpg"))
    assert table.layout == "SPLIT/CLASS folders"
    assert [(r.split, r.label) for r in table.records] == [("test", "dog"), ("train", "cat")]
    assert "photos/v2" in table.notes[-1]


def test_split_folders_beside_other_ones_are_refused(place):
    with pytest.raises(DataError, match=r"split folders \(test, train\) beside other ones \(extra\)"):
        open_table(place("train/a/1.jpg", "test/b/1.jpg", "extra/c/1.jpg"))


def test_other_files_hidden_ones_and_empty_folders_are_left_out(place, tmp_path):
    root = place("cat/1.jpg", "cat/.hidden.jpg", ".git/x.jpg", "__MACOSX/y.jpg", "dog/2.jpg")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    (root / "empty").mkdir()
    table = open_table(root)
    assert len(table) == 2
    assert "2 files that are no pictures by their name" in table.notes[0]
    assert ".txt 1" in table.notes[0]


def test_links_are_followed_and_circles_end(place):
    root = place("cat/1.jpg", "dog/2.jpg")
    os.symlink(root / "cat", root / "emu")
    os.symlink(root, root / "dog" / "again")
    table = open_table(root)
    assert table.classes == ("cat", "dog")  # the same folder under a second name counts once


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no folder or manifest .*nowhere") as caught:
        open_table(tmp_path / "nowhere")
    assert caught.value.exit_code == 3


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match="has no pictures: it is empty"):
        open_table(tmp_path)
    (tmp_path / "rows.csv").write_text("path\n")
    (tmp_path / "video.mp4").write_text("x")
    with pytest.raises(DataError, match=r"2 files.*rows\.csv: if that is a manifest"):
        open_table(tmp_path)


def test_a_file_that_is_no_manifest_is_refused(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match="neither a folder nor a manifest"):
        open_table(tmp_path / "data.json")


def test_a_known_data_set_without_a_folder_tells_how_to_give_one():
    with pytest.raises(DataError, match="cub:FOLDER"):
        open_table("cub")


def test_an_unknown_data_set_gets_a_hint(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "cub"'):
        open_table(f"cubs:{tmp_path}")


def test_ones_own_loader_works_by_import_path(tiny_folder):
    table = open_table(f"dml.data.layouts:read_folder:{tiny_folder}")
    assert len(table) == 48


def write_csv(root, rows, name="data.csv", delimiter=","):
    path = root / name
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    return path


def test_a_manifest_gives_labels_splits_boxes_roles_and_payload(place):
    root = place("a.png", "b.png", "c.png")
    table = open_table(
        write_csv(
            root,
            [
                ["path", "label", "split", "box", "query", "gallery", "price", "colour", "sku"],
                ["a.png", "cat", "train", "", "", "", "3", "red", "007"],
                ["b.png", "7", "test", "1 2 20 30", "true", "", "4.5", "", "008"],
                ["c.png", "", "test", "[1, 2, 20, 30]", "0", "1", "", "blue", "009"],
            ],
        )
    )
    assert table.layout == "csv manifest"
    assert table.records == (
        Record(root / "a.png", "cat", "train", payload={"price": 3.0, "colour": "red", "sku": "007"}),
        Record(root / "b.png", "7", "test", (1, 2, 20, 30), "query", {"price": 4.5, "sku": "008"}),
        Record(root / "c.png", None, "test", (1, 2, 20, 30), "gallery", {"colour": "blue", "sku": "009"}),
    )
    assert "payload: price, colour, sku" in table.notes[0]


def test_an_image_that_is_query_and_gallery_has_no_role(place):
    rows = [["path", "label", "is_query", "is_gallery"], ["a.png", "x", "True", "True"]]
    (record,) = open_table(write_csv(place("a.png"), rows)).records
    assert (record.split, record.role) == ("test", None)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "d.csv"), ("\t", "d.tsv"), (",", "d.CSV")])
def test_the_separator_is_found(place, delimiter, name):
    rows = [["path", "label"], ["a.png", "x, y"]]
    (record,) = open_table(write_csv(place("a.png"), rows, name, delimiter)).records
    assert record.label == "x, y"


def test_a_byte_order_mark_and_empty_lines_do_no_harm(place):
    path = place("a.png") / "d.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\na.png,x\r\n\r\n")
    assert [r.label for r in open_table(path).records] == ["x"]


def test_a_column_of_flags_or_whole_numbers_is_typed_and_codes_stay_text(place):
    root = place("a.png", "b.png")
    rows = [
        ["path", "sold", "count", "zip"],
        ["a.png", "true", "3", "01234"],
        ["b.png", "False", "-1", "99999"],
    ]
    first, second = open_table(write_csv(root, rows)).records
    assert dict(first.payload) == {"sold": True, "count": 3, "zip": "01234"}
    assert dict(second.payload) == {"sold": False, "count": -1, "zip": "99999"}


def test_every_bad_row_is_listed_with_its_line(place):
    path = write_csv(
        place("a.png"),
        [
            ["path", "label", "split", "box", "query"],
            ["a.png", "x", "train", "", ""],
            ["", "x", "train", "", ""],
            ["a.png", "x", "tranin", "", ""],
            ["a.png", "x", "test", "1 2 3", ""],
            ["a.png", "x", "test", "9 9 3 3", ""],
            ["a.png", "x", "train", "", "true"],
            ["a.png", "x", "test", "", "maybe"],
            ["a.png", "x", "", "", ""],
        ],
    )
    with pytest.raises(DataError) as caught:
        open_table(path)
    text = str(caught.value)
    assert "7 rows" in text
    for part in (
        "line 3: the path is empty",
        'line 4: unknown split "tranin"',
        'did you mean "train"',
        "line 5: box must be",
        "line 6: box 9 9 3 3 is empty",
        'line 7: the split "train" and a query or gallery flag',
        'line 8: query must be true or false, got "maybe"',
        "no split, while other rows have one",
    ):
        assert part in text


def test_a_long_list_of_bad_rows_is_cut_and_counted(place):
    path = write_csv(place("a.png"), [["path", "split"]] + [["a.png", "x"]] * 500)
    with pytest.raises(DataError, match=r"500 rows[\s\S]*… and 490 more"):
        open_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\n", 'no column "path".*Rename "file" to "path"'),
        ("path,label,label\na.png,x,y\n", "two columns of the same name: label"),
        ("path,label\n", "a header but no rows"),
        ("", 'no column "path"'),
        ("path,label\na.png,x,y\n", "line 2"),
        ('path,label\n"a.png,x\n', "not a well-formed table"),
        ("path,label\nmissing1.png,x\nmissing2.png,y\n", "None of the first 2 files"),
    ],
)
def test_a_broken_manifest_is_explained(place, text, message):
    path = place("a.png") / "d.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_table(path)


def test_a_manifest_in_another_encoding_is_refused(place):
    path = place("a.png") / "d.csv"
    path.write_bytes("path,label\na.png,größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_table(path)


def test_a_single_missing_file_is_left_to_be_skipped_later(place):
    path = write_csv(place("a.png"), [["path", "label"], ["a.png", "x"], ["gone.png", "x"]])
    assert len(open_table(path)) == 2


def test_a_parquet_manifest_keeps_types(place):
    root = place("a.png", "b.png")
    columns = {
        "path": ["a.png", "b.png"],
        "label": pa.array([3.0, None]),  # pandas makes whole numbers with gaps floats
        "box": pa.array([[1, 2, 10, 12], None]),
        "price": [1.5, float("nan")],
        "tags": [["x", "y"], []],
        "day": [date(2024, 5, 1), None],
    }
    parquet.write_table(pa.table(columns), root / "d.parquet")
    table = open_table(root / "d.parquet")
    first, second = table.records
    assert (first.label, first.box) == ("3", (1, 2, 10, 12))
    assert dict(first.payload) == {"price": 1.5, "tags": ["x", "y"], "day": "2024-05-01"}
    assert (second.label, dict(second.payload)) == (None, {"tags": []})


def test_a_file_that_is_no_parquet_is_explained(tmp_path):
    (tmp_path / "d.parquet").write_text("hello")
    with pytest.raises(DataError, match="not a parquet file"):
        open_table(tmp_path / "d.parquet")


def test_no_picture_is_opened_for_a_table(place):
    root = place("cat/1.jpg", "dog/2.jpg")
    (root / "cat" / "broken.jpg").write_text("no picture")
    assert len(open_table(root)) == 3


def test_reading_tables_and_pictures_needs_no_torch():
    modules = "imaging data data.table data.layouts data.manifest data.split data.check data.check_page"
    modules += " data.reading data.benchmarks data.demo"
    lines = [f"import dml.{name}" for name in modules.split()]
    lines += ["import sys", "print({'torch', 'torchvision', 'scipy', 'pyarrow'} & set(sys.modules))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
