"""The four benchmarks of the field in their official layouts, with its class-disjoint splits.

| name   | images  | training classes    | test classes         | protocol of the papers |
|--------|---------|---------------------|----------------------|------------------------|
| cub    | 11,788  | 1 to 100 (5,864)    | 101 to 200 (5,924)   | query = gallery        |
| cars   | 16,185  | 1 to 98 (8,054)     | 99 to 196 (8,131)    | query = gallery        |
| sop    | 120,053 | 11,318 (59,551)     | 11,316 (60,502)      | query = gallery        |
| inshop | 52,712  | 3,997 (25,882)      | 3,985                | 14,218 queries, 12,612 gallery |

The train/test lists that come with CUB and Cars divide the images of *the same* classes; they are the splits
of fine-grained classification, not of metric learning, and are not used here. Validation classes are held out
of the training classes by `dml.data.split.divide`, as for any other data.

Sources: Wah et al. 2011 (CUB-200-2011); Krause et al. 2013 (Cars-196); Oh Song et al., CVPR 2016 (Stanford
Online Products, and the splits of all but In-Shop); Liu et al., CVPR 2016 (DeepFashion In-Shop Clothes
Retrieval).
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.data.layouts import split_and_role
from dml.data.manifest import check_some_exist
from dml.data.table import ImageTable, Record, counted
from dml.errors import DataError, MissingExtra


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is, where it comes from, and what must lie where."""

    title: str
    source: str
    licence: str
    layout: tuple[str, ...]
    counts: Mapping[str, tuple[int, int]]
    """Split -> (images, classes) when it is complete."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "cub": Benchmark(
        "Caltech-UCSD Birds-200-2011",
        "the data archive of the California Institute of Technology (CaltechDATA), CUB_200_2011.tgz, 1.1 GB",
        "research use; the photos belong to their authors",
        ("images.txt", "image_class_labels.txt", "classes.txt", "images/001.Black_footed_Albatross/…jpg"),
        {"train": (5864, 100), "test": (5924, 100)},
    ),
    "cars": Benchmark(
        "Stanford Cars-196",
        "Stanford University's cars data set page or a mirror of it: car_ims.tgz with cars_annos.mat, or "
        "cars_train, cars_test and the devkit, 1.9 GB",
        "research use",
        ("cars_annos.mat and car_ims/…jpg",
         "or devkit/cars_{train,test}_annos….mat and cars_{train,test}/…jpg",
         "or anno_{train,test}.csv, names.csv and car_data/{train,test}/CLASS/…jpg"),
        {"train": (8054, 98), "test": (8131, 98)},
    ),
    "sop": Benchmark(
        "Stanford Online Products",
        "the Stanford Computational Vision and Geometry Lab, Stanford_Online_Products.zip, 2.9 GB",
        "research use; the photos belong to their authors",
        ("Ebay_train.txt", "Ebay_test.txt", "bicycle_final/…JPG and eleven further folders"),
        {"train": (59551, 11318), "test": (60502, 11316)},
    ),
    "inshop": Benchmark(
        "DeepFashion In-Shop Clothes Retrieval",
        "the Multimedia Laboratory of the Chinese University of Hong Kong (DeepFashion, In-shop Clothes "
        "Retrieval Benchmark; a password is sent on request), img.zip and Eval/list_eval_partition.txt",
        "research use, by agreement",
        ("list_eval_partition.txt or Eval/list_eval_partition.txt", "img/WOMEN/…jpg, img/MEN/…jpg"),
        {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    ),
}  # fmt: skip
"""Name -> what `dml data download` tells."""


def cub(root: Path) -> ImageTable:
    """CUB-200-2011: the folder that holds images.txt. Full pictures, no boxes, as in the papers."""
    base = _folder_of(root, "cub", "images.txt")
    labels = dict(_words(base / "image_class_labels.txt", 2))
    names = dict(_words(base / "classes.txt", 2))
    rows = []
    for image, path in _words(base / "images.txt", 2):
        if labels.get(image) not in names:
            raise DataError(
                f"{base / 'images.txt'}: image {image} has no class in image_class_labels.txt/classes.txt"
            )
        rows.append((base / "images" / path, int(labels[image]), names[labels[image]]))
    return _table("cub", base, _halves(rows))


def cars(root: Path) -> ImageTable:
    """Cars-196 in any of its three layouts. Full pictures, no boxes, as in the papers.

    Raises:
        DataError: none of the layouts.
        MissingExtra: .mat files, and scipy is not installed.
    """
    layouts: Sequence[tuple[str, Callable[[Path], list[tuple[Path, int, str]]]]] = (
        ("cars_annos.mat", _cars_in_one),
        ("devkit/cars_train_annos.mat", _cars_devkit),
        ("anno_train.csv", _cars_csv),
    )
    for marker, read in layouts:
        for base in (root, *sorted(_subfolders(root))):
            if (base / marker).is_file():
                return _table("cars", base, _halves(_understood(read, base, marker)))
    raise _incomplete("cars", root, " or ".join(marker for marker, _ in layouts))


def sop(root: Path) -> ImageTable:
    """Stanford Online Products: the folder that holds Ebay_train.txt; the kind is kept as payload."""
    base = _folder_of(root, "sop", "Ebay_train.txt")
    records = []
    for split in ("train", "test"):
        for _, label, _, path in _words(base / f"Ebay_{split}.txt", 4, skip=1):
            kind = path.split("/")[0].removesuffix("_final")
            records.append(Record(base / path, label, split, payload={"kind": kind}))
    return _table("sop", base, records)


def inshop(root: Path) -> ImageTable:
    """In-Shop Clothes Retrieval: the folder that holds img/ and the list of the three parts."""
    base = _folder_of(root, "inshop", "list_eval_partition.txt", "Eval/list_eval_partition.txt")
    listing = base / "list_eval_partition.txt"
    listing = listing if listing.is_file() else base / "Eval" / "list_eval_partition.txt"
    records = []
    for path, label, part in _words(listing, 3, skip=2):
        if part not in ("train", "query", "gallery"):
            raise DataError(f'{listing}: unknown part "{part}" of {path}; expected train, query or gallery')
        split, role = split_and_role(part)
        records.append(Record(base / path, label, split, role=role))
    return _table("inshop", base, records)


def _understood(
    read: Callable[[Path], list[tuple[Path, int, str]]], base: Path, marker: str
) -> list[tuple[Path, int, str]]:
    """Turn whatever a damaged list raises into one message."""
    try:
        return read(base)
    except (OSError, ValueError, LookupError, NotImplementedError, TypeError) as error:
        raise DataError(
            f"{base / marker} or a list beside it is damaged ({error}); unpack the archive again"
        ) from error


def _halves(rows: Sequence[tuple[Path, int, str]]) -> list[Record]:
    """The first half of the class numbers trains, the second half tests: the convention of the field."""
    numbers = sorted({number for _, number, _ in rows})
    trained = set(numbers[: len(numbers) // 2])
    return [Record(path, name, "train" if number in trained else "test") for path, number, name in rows]


def _table(name: str, base: Path, records: Sequence[Record]) -> ImageTable:
    """Check what the loader found: some files there, no class on both sides, and note
    where the official counts are not met."""
    if not records:
        raise DataError(
            f"the lists of {BENCHMARKS[name].title} in {base} are empty; unpack the archive again"
        )
    check_some_exist(base, records)
    parts = {"train": set(counted(r for r in records if r.split == "train"))}
    parts["test"] = set(counted(r for r in records if r.split == "test"))
    shared = parts["train"] & parts["test"]
    if shared:
        raise DataError(
            f"train and test of {BENCHMARKS[name].title} in {base} share {len(shared):,} classes "
            f"({', '.join(sorted(shared)[:5])}), which its protocol excludes; the lists are not the official "
            f"ones"
        )
    table = ImageTable(name, base, f"{BENCHMARKS[name].title}, official layout", tuple(records))
    notes = [f"train and test share {len(shared)} classes of {len(table.classes):,}"]
    for split, (images, classes) in BENCHMARKS[name].counts.items():
        rows = table.splits.get(split, ())
        found = (len(rows), len(counted(rows)))
        if found != (images, classes):
            notes.append(
                f"{split} has {found[0]:,} images of {found[1]:,} classes where the complete set has "
                f"{images:,} of {classes:,}: figures cannot be compared with published ones"
            )
    return ImageTable(table.name, table.root, table.layout, table.records, tuple(notes))


def _subfolders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []


def _folder_of(root: Path, name: str, *markers: str) -> Path:
    """The folder given, or the one below it, in which one of the marker files lies."""
    for base in (root, *sorted(_subfolders(root))):
        if any((base / marker).is_file() for marker in markers):
            return base
    raise _incomplete(name, root, " or ".join(markers))


def _incomplete(name: str, root: Path, wanted: str) -> DataError:
    what = BENCHMARKS[name]
    if not root.is_dir():
        return DataError(
            f"There is no folder {root}. `dml data download {name}` tells where {what.title} comes from."
        )
    return DataError(
        f"{root} does not hold {what.title}: there is no {wanted} in it. Give the folder of the unpacked "
        f"archive (`dml data download {name}` shows its layout)."
    )


def _words(path: Path, count: int, *, skip: int = 0) -> list[list[str]]:
    """The lines of an official list, split at white space into `count` words; the last may hold
    spaces."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[skip:]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; unpack the archive again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file; unpack the archive again") from error
    rows = [line.split(maxsplit=count - 1) for line in lines]
    for number, row in enumerate(rows, skip + 1):
        if row and len(row) != count:
            raise DataError(
                f"{path}, line {number}: expected {count} words, got {len(row)}: {' '.join(row)[:80]}"
            )
    return [[word.strip() for word in row] for row in rows if row]


def _cars_in_one(base: Path) -> list[tuple[Path, int, str]]:
    tree = _mat(base / "cars_annos.mat")
    return _rows(tree["class_names"], tree["annotations"], "relative_im_path", base)


def _cars_devkit(base: Path) -> list[tuple[Path, int, str]]:
    names = _mat(base / "devkit" / "cars_meta.mat")["class_names"]
    rows = []
    for folder, listing in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        # The labels of the second part come as a file of their own, which people put in either place.
        found = next((p for p in (base / "devkit" / listing, base / listing) if p.is_file()), None)
        if found is None:
            raise DataError(
                f"{base} has no {listing}, which holds labels of Cars-196; it comes apart from the devkit. "
                f"`dml data download cars` tells from where."
            )
        rows += _rows(names, _mat(found)["annotations"], "fname", base / folder)
    return rows


def _rows(names: NDArray, annotations: NDArray, path_field: str, folder: Path) -> list[tuple[Path, int, str]]:
    listed = [str(name) for name in np.atleast_1d(names)]
    table = np.atleast_1d(annotations)
    numbers = [int(number) for number in table["class"]]
    paths = [folder / str(path) for path in table[path_field]]
    return [(path, number, listed[number - 1]) for path, number in zip(paths, numbers, strict=True)]


def _cars_csv(base: Path) -> list[tuple[Path, int, str]]:
    """Rows fname, x1, y1, x2, y2, class; one class per line in names.csv, where folders have - for /."""
    names = (base / "names.csv").read_text(encoding="utf-8").splitlines()
    rows = []
    for part in ("train", "test"):
        with (base / f"anno_{part}.csv").open(encoding="utf-8", newline="") as stream:
            for cells in filter(None, csv.reader(stream)):
                number = int(cells[5])
                name = names[number - 1].strip('"').replace("/", "-")
                rows.append((base / "car_data" / part / name / cells[0], number, name))
    return rows


def _mat(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtra("scipy (it reads .mat files)", "train") from error
    return loadmat(str(path), squeeze_me=True)
