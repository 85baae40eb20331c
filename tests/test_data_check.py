"""`dml data`: what is found in bad data, in official layouts, and what the commands answer."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dml.cli.data import app
from dml.config import DataConfig
from dml.data.benchmarks import BENCHMARKS
from dml.data.check import check_table
from dml.data.check_page import write_page
from dml.data.split import divide
from dml.data.table import counted, open_table
from dml.errors import ConfigError, DataError, UsageError


@pytest.fixture
def place(tmp_path, draw):
    """place({"cat/1.jpg": seed, …}) -> the folder; equal seeds give equal files."""

    def put(pictures):
        for name, seed in pictures.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(seed, (32, 32)).save(path)
        return tmp_path

    return put


def test_good_data_is_found_good(tiny_folder):
    report = check_table(open_table(tiny_folder))
    assert report.ok
    assert report.images == 48
    assert report.describe().endswith("nothing wrong found")


def test_every_bad_file_is_listed(place):
    root = place({f"cat/{i}.jpg": i for i in range(4)} | {f"dog/{i}.jpg": 10 + i for i in range(4)})
    (root / "cat" / "text.jpg").write_text("hello")
    (root / "dog" / "empty.png").touch()
    half = (root / "dog" / "0.jpg").read_bytes()
    (root / "dog" / "half.jpg").write_bytes(half[: len(half) * 3 // 4])
    report = check_table(open_table(root))
    assert {b.path: b.reason.split(" is ")[1].split(" ")[0] for b in report.bad} == {
        "cat/text.jpg": "not", "dog/empty.png": "empty", "dog/half.jpg": "damaged",
    }  # fmt: skip
    assert not report.ok
    assert "images that cannot be read (3):" in report.describe()


def test_tiny_classes_count_readable_training_images(place):
    root = place({"big/1.jpg": 1, "big/2.jpg": 2, "one/1.jpg": 3, "spoilt/1.jpg": 4})
    (root / "spoilt" / "2.jpg").write_text("x")
    (root / "gone").mkdir()
    (root / "gone" / "1.jpg").write_text("x")
    assert check_table(open_table(root)).tiny_classes == {"gone": 0, "one": 1, "spoilt": 1}


def test_exact_duplicates_are_grouped_and_wrong_labels_stand_out(place):
    root = place({"a/1.jpg": 1, "a/2.jpg": 1, "a/3.jpg": 3, "b/1.jpg": 4, "b/2.jpg": 3, "b/3.jpg": 5})
    report = check_table(open_table(root))
    assert [d.paths for d in report.duplicates] == [("a/1.jpg", "a/2.jpg"), ("a/3.jpg", "b/2.jpg")]
    assert [d.labels for d in report.mislabelled] == [("a", "b")]
    assert "under different classes: a, b" in report.describe()


def test_a_picture_in_two_splits_is_a_leak(place):
    root = place({"train/a/1.jpg": 1, "train/a/2.jpg": 2, "test/b/1.jpg": 1, "test/b/2.jpg": 4})
    report = check_table(open_table(root))
    assert [(leak.kind, leak.splits, leak.names) for leak in report.leaks] == [
        ("images", ("test", "train"), ("test/b/1.jpg",))
    ]


def test_some_shared_classes_are_a_leak_and_all_of_them_are_a_protocol(place):
    root = place({f"train/{c}/{i}.jpg": 10 * n + i for n, c in enumerate("abc") for i in range(2)})
    place({f"test/{c}/{i}.jpg": 100 + 10 * n + i for n, c in enumerate("bcd") for i in range(2)})
    (leak,) = check_table(open_table(root)).leaks
    assert (leak.kind, leak.names) == ("classes", ("b", "c"))
    place({f"train/d/{i}.jpg": 200 + i for i in range(2)})
    assert check_table(open_table(root)).ok


def test_boxes_of_one_file_are_no_duplicates(place):
    root = place({"a.jpg": 1, "b.jpg": 2})
    lines = [
        "path,label,box",
        "a.jpg,x,0 0 10 10",
        "a.jpg,y,10 10 20 20",
        "b.jpg,x,",
        "b.jpg,y,0 0 99 5",
        "b.jpg,y,40 0 50 9",
    ]
    (root / "m.csv").write_text("\n".join(lines))
    report = check_table(open_table(root / "m.csv"))
    assert report.duplicates == ()
    assert ["outside the picture" in b.reason for b in report.bad] == [True]


def test_the_page_shows_findings_and_needs_nothing_from_outside(place, tmp_path):
    root = place({"a/1.jpg": 1, "a/2.jpg": 1, "b/<i>.jpg": 3, "b/2.jpg": 4})
    (root / "b" / "3.jpg").write_text("x")
    table = open_table(root)
    page = write_page(check_table(table), table, tmp_path / "out" / "page.html").read_text()
    assert "a/1.jpg" in page
    assert "data:image/jpeg;base64," in page
    assert "not a picture" in page
    assert "http" not in page
    assert "<i>" not in page


# --- commands ---


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_check_answers_0_for_good_and_3_for_bad_data(tiny_folder, place):
    assert run("check", tiny_folder).exit_code == 0
    root = place({"a/1.jpg": 1, "a/2.jpg": 2, "b/1.jpg": 3, "b/2.jpg": 4})
    (root / "b" / "bad.jpg").write_text("x")
    result = run("check", root, "--json", "--html", root / "page.html")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["bad"][0]["path"] == "b/bad.jpg"
    assert (root / "page.html").exists()


def test_split_writes_a_manifest_that_can_be_trained_on(tiny_folder, tmp_path):
    out = tmp_path / "m.csv"
    result = run("split", tiny_folder, "--out", out, "--seed", 3, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["protocol"] == "closed-set"
    table = open_table(out)
    assert {name: len(rows) for name, rows in table.splits.items()} == {
        name: count for name, count in facts["images"].items() if count
    }
    assert divide(table, DataConfig()).protocol == "closed-set"


def test_split_does_not_overwrite_unless_told_to(tiny_folder, tmp_path):
    out = tmp_path / "m.csv"
    out.write_text("precious")
    result = run("split", tiny_folder, "--out", out)
    assert isinstance(result.exception, UsageError)
    assert out.read_text() == "precious"
    assert run("split", tiny_folder, "--out", out, "--overwrite").exit_code == 0


@pytest.mark.parametrize("option", [("--protocol", "open"), ("--test-share", "1.5")])
def test_split_refuses_wrong_options(tiny_folder, tmp_path, option):
    result = run("split", tiny_folder, "--out", tmp_path / "m.csv", *option)
    assert isinstance(result.exception, UsageError)
    assert option[1] in str(result.exception)


def test_download_tells_where_a_benchmark_comes_from():
    for name, about in BENCHMARKS.items():
        result = run("download", name)
        assert result.exit_code == 0
        assert about.title in result.stdout
        assert f"{name}:FOLDER" in result.stdout
    assert isinstance(run("download", "cubs").exception, ConfigError)


# --- benchmarks in their official layouts, made small ---


def picture(path, draw, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(seed, (24, 24)).save(path)


@pytest.fixture
def cub_folder(tmp_path, draw):
    root = tmp_path / "CUB_200_2011"
    names = [f"{c:03d}.Bird_{c}" for c in range(1, 9)]
    images = [(c, f"{names[c]}/{names[c]}_{i}.jpg") for c in range(8) for i in range(3)]
    for number, (_, path) in enumerate(images):
        picture(root / "images" / path, draw, number)
    (root / "classes.txt").write_text("".join(f"{c} {name}\n" for c, name in enumerate(names, 1)))
    (root / "images.txt").write_text("".join(f"{n} {path}\n" for n, (_, path) in enumerate(images, 1)))
    (root / "image_class_labels.txt").write_text(
        "".join(f"{n} {c + 1}\n" for n, (c, _) in enumerate(images, 1))
    )
    # The closed-set lists of the official archive, which must play no part.
    (root / "train_test_split.txt").write_text("".join(f"{n} {n % 2}\n" for n in range(1, 25)))
    return root


def check_halves(table, first, second):
    assert tuple(sorted(counted(table.splits["train"]))) == first
    assert tuple(sorted(counted(table.splits["test"]))) == second
    assert any("share 0 classes" in note for note in table.notes)
    assert any("cannot be compared with published ones" in note for note in table.notes)


def test_cub_trains_on_the_first_half_of_the_classes(cub_folder):
    table = open_table(f"cub:{cub_folder}")
    names = tuple(f"{c:03d}.Bird_{c}" for c in range(1, 9))
    check_halves(table, names[:4], names[4:])
    assert len(table) == 24
    assert check_table(table).ok
    assert open_table(f"cub:{cub_folder.parent}").records == table.records  # the folder above works too
    assert divide(table, DataConfig()).protocol == "open-set"
    assert "train: 12 images of 4 classes" in run("download", "cub", cub_folder).stdout


def cars(tmp_path, draw):
    """Class names and (folder-relative path, class number 1..6) of 12 pictures."""
    names = [f"Maker Model {c} 201{c}" for c in range(1, 7)]
    return names, [(f"{n:06d}.jpg", n % 6 + 1) for n in range(12)]


def structured(rows, fields):
    kinds = [(name, "O") for name in fields]
    return np.array([tuple(row) for row in rows], dtype=kinds)


def test_cars_in_one_archive(tmp_path, draw):
    savemat = pytest.importorskip("scipy.io").savemat
    names, rows = cars(tmp_path, draw)
    for seed, (name, _) in enumerate(rows):
        picture(tmp_path / "car_ims" / name, draw, seed)
    fields = ("relative_im_path", "bbox_x1", "class", "test")
    annotations = structured([(f"car_ims/{name}", 1, c, i % 2) for i, (name, c) in enumerate(rows)], fields)
    content = {"annotations": annotations, "class_names": np.array(names, dtype=object)}
    savemat(tmp_path / "cars_annos.mat", content)
    table = open_table(f"cars:{tmp_path}")
    check_halves(table, tuple(names[:3]), tuple(names[3:]))
    assert check_table(table).bad == ()


def test_cars_with_the_devkit(tmp_path, draw):
    savemat = pytest.importorskip("scipy.io").savemat
    names, rows = cars(tmp_path, draw)
    kit = tmp_path / "devkit"
    kit.mkdir()
    savemat(kit / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for part, chosen in (("train", rows[:6]), ("test", rows[6:])):
        for seed, (name, _) in enumerate(chosen):
            picture(tmp_path / f"cars_{part}" / name, draw, seed + 50 * (part == "test"))
        annotations = structured([(1, c, name) for name, c in chosen], ("bbox_x1", "class", "fname"))
        suffix = "" if part == "train" else "_withlabels"
        place = kit if part == "train" else tmp_path
        savemat(place / f"cars_{part}_annos{suffix}.mat", {"annotations": annotations})
    table = open_table(f"cars:{tmp_path}")
    check_halves(table, tuple(names[:3]), tuple(names[3:]))
    assert check_table(table).bad == ()
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"no cars_test_annos_withlabels\.mat"):
        open_table(f"cars:{tmp_path}")


def test_cars_with_csv_lists(tmp_path, draw):
    names, rows = cars(tmp_path, draw)
    names[1] = "Ram C/V Cargo Van"  # the one name with a slash
    (tmp_path / "names.csv").write_text("\n".join(names))
    folders = [name.replace("/", "-") for name in names]
    for part, chosen in (("train", rows[:6]), ("test", rows[6:])):
        with (tmp_path / f"anno_{part}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([name, 1, 2, 20, 20, c] for name, c in chosen)
        for seed, (name, c) in enumerate(chosen):
            picture(tmp_path / "car_data" / part / folders[c - 1] / name, draw, seed + 50 * (part == "test"))
    table = open_table(f"cars:{tmp_path}")
    check_halves(table, tuple(sorted(folders[:3])), tuple(folders[3:]))
    assert check_table(table).bad == ()


def test_damaged_lists_of_cars_are_explained(tmp_path):
    pytest.importorskip("scipy")
    (tmp_path / "cars_annos.mat").write_bytes(b"nonsense" * 30)
    with pytest.raises(DataError, match="damaged"):
        open_table(f"cars:{tmp_path}")
    (tmp_path / "cars_annos.mat").unlink()
    (tmp_path / "anno_train.csv").write_text("a.jpg,1,2\n")
    with pytest.raises(DataError, match="damaged"):
        open_table(f"cars:{tmp_path}")


def sop_lists(root, draw, train, test):
    root.mkdir(exist_ok=True)
    number = 0
    for part, classes in (("train", train), ("test", test)):
        lines = ["image_id class_id super_class_id path"]
        for c in classes:
            for i in range(2):
                number += 1
                path = f"bicycle_final/{c}_{i}.JPG"
                picture(root / path, draw, number)
                lines.append(f"{number} {c} 1 {path}")
        (root / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")


def test_stanford_online_products(tmp_path, draw):
    root = tmp_path / "Stanford_Online_Products"
    sop_lists(root, draw, train=(1, 2, 3), test=(4, 5))
    table = open_table(f"sop:{root}")
    check_halves(table, ("1", "2", "3"), ("4", "5"))
    assert {r.payload["kind"] for r in table.records} == {"bicycle"}
    assert check_table(table).bad == ()


def test_lists_that_share_classes_are_refused(tmp_path, draw):
    sop_lists(tmp_path, draw, train=(1, 2, 3), test=(3, 4))
    with pytest.raises(DataError, match=r"share 1 classes \(3\)"):
        open_table(f"sop:{tmp_path}")


@pytest.mark.parametrize("folder", ["", "Eval"])
def test_in_shop_has_queries_and_a_gallery(tmp_path, draw, folder):
    lines = []
    for number, (item, part) in enumerate(
        [("id_1", "train"), ("id_1", "train"), ("id_2", "train"), ("id_2", "train"), ("id_3", "query"),
         ("id_3", "gallery"), ("id_4", "query"), ("id_4", "gallery"), ("id_4", "gallery")]
    ):  # fmt: skip
        path = f"img/WOMEN/Dresses/{item}/{number:02d}_1_front.jpg"
        picture(tmp_path / path, draw, number)
        lines.append(f"{path}    {item}   {part}")
    listing = tmp_path / folder / "list_eval_partition.txt"
    listing.parent.mkdir(exist_ok=True)
    listing.write_text("\n".join([str(len(lines)), "image_name item_id evaluation_status", *lines]))
    table = open_table(f"inshop:{tmp_path}")
    assert {name: len(rows) for name, rows in table.splits.items()} == {"train": 4, "query": 2, "gallery": 3}
    assert check_table(table).bad == ()
    listing.write_text(listing.read_text().replace("gallery", "galery"))
    with pytest.raises(DataError, match='unknown part "galery"'):
        open_table(f"inshop:{tmp_path}")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_without_the_benchmark_says_what_is_missing(tmp_path, name):
    with pytest.raises(DataError, match=f"dml data download {name}"):
        open_table(f"{name}:{tmp_path}")
    with pytest.raises(DataError, match="no folder"):
        open_table(f"{name}:{tmp_path / 'nowhere'}")


def test_a_half_unpacked_archive_is_explained(cub_folder):
    (cub_folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt cannot be read"):
        open_table(f"cub:{cub_folder}")
    (cub_folder / "classes.txt").write_text("1\n")
    with pytest.raises(DataError, match="line 1: expected 2 words, got 1"):
        open_table(f"cub:{cub_folder}")
