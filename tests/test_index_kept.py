"""Vectors in fewer bits: how near they stay, what they take, and that old files are read."""

import numpy as np
import pytest

from dml.errors import ConfigError
from dml.index import load_index, make_index
from dml.index.file import read_header
from dml.index.flat import highest
from dml.index.kept import FineVectors, KeptVectors, from_bfloat16, to_bfloat16

DIM = 31  # odd: halves of bytes and blocks of four do not fit


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("precision", "error", "size"),
    [
        ("float32", 0, 4 * DIM),
        ("float16", 3e-4, 2 * DIM),
        ("bfloat16", 2e-3, 2 * DIM),
        ("int8", 5e-3, DIM + 4),
    ],
)
def test_kept_vectors_are_near_the_whole_ones_and_take_what_they_say(precision, error, size):
    rows = unit(0, 500)
    kept = KeptVectors(DIM, precision)
    for start in range(0, 500, 37):
        kept.append(rows[start : start + 37])
    assert len(kept) == 500
    assert kept.nbytes == 500 * size
    assert kept[:].dtype == np.float32
    assert np.abs(kept[:] - rows).max() <= error
    assert (kept[np.array([7, 3, 7])] == kept[:][[7, 3, 7]]).all()
    alone = KeptVectors(DIM, precision)
    alone.append(rows[123:124])
    assert (alone[:] == kept[123:124]).all()  # the same function of each vector, whatever is beside it


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    torch = pytest.importorskip("torch")
    rows = np.concatenate([unit(1, 300).ravel(), np.array([1 + 2**-8, 1 + 3 * 2**-8, 0, -1], np.float32)])
    expected = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    assert (from_bfloat16(to_bfloat16(rows)) == expected).all()


def test_what_a_coarse_row_misses_is_kept_in_four_bits():
    rows = unit(2, 400)
    coarse = np.round(rows * 30) / np.float32(30)
    coarse[5] = np.clip(coarse[5], -0.1, 0.1)  # far out of the range that was learned
    fine = FineVectors(DIM)
    fine.append(rows - coarse)
    slots = np.arange(400)
    found = fine.added_to(coarse.copy(), slots)
    missed, left = np.abs(rows - coarse).max(axis=1), np.abs(rows - found).max(axis=1)
    assert (left <= missed / 14).all()
    assert fine.nbytes == 400 * (16 + 4)
    assert (fine.added_to(coarse[9:11].copy(), slice(9, 11)) == found[9:11]).all()


@pytest.mark.parametrize("kind", ["faiss_flat", "hnsw"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8", "int12"])
def test_the_engine_s_codes_are_read_as_the_engine_reads_them(kind, precision):
    pytest.importorskip("faiss")
    if (kind, precision) == ("faiss_flat", "int12"):
        with pytest.raises(ConfigError, match='got precision "int12"'):
            make_index(kind, DIM, precision=precision)
        return
    rows = unit(3, 1500)
    index = make_index(kind, DIM, device="cpu", precision=precision)
    index.add(np.arange(1500), rows)
    kept = index.vectors_of(np.arange(1500))
    tolerance = {"float16": 3e-4, "bfloat16": 3e-3, "int8": 4e-3, "int12": 4e-4}[precision]
    assert np.abs(kept - rows).max() <= tolerance
    if precision != "int12":
        engine = index._flat_storage()
        # Once anything in this process has loaded faiss.contrib.torch_utils, faiss gives arrays of torch.
        assert np.abs(np.asarray(engine.reconstruct_n(0, 1500)) - kept).max() < 2e-7
    whole = make_index(kind, DIM, device="cpu")
    whole.add(np.arange(1500), rows)
    assert index.nbytes < whole.nbytes


def test_fewer_vectors_than_codes_need_are_compared_one_by_one():
    pytest.importorskip("faiss")
    rows = unit(4, 1300)
    index = make_index("pq", DIM, device="cpu", precision="float32")
    index.add(np.arange(900), rows[:900])
    few = index.search(rows[:20], 10, effort=1)
    assert (few.scores == index.search(rows[:20], 10, exact=True).scores).all()
    index.add(np.arange(900, 1300), rows[900:])
    assert (index.search(rows[:20], 1).ids[:, 0] == np.arange(20)).all()
    assert index.search(rows[1290:], 1).ids[:, 0].tolist() == list(range(1290, 1300))


def test_files_without_fewer_bits_are_written_so_that_older_versions_read_them(tmp_path):
    pytest.importorskip("faiss")
    for kind, options, format in [("hnsw", {}, 1), ("ivf", {}, 1), ("hnsw", {"precision": "int12"}, 2)]:
        index = make_index(kind, DIM, device="cpu", **options)
        index.add(np.arange(50), unit(5, 50))
        index.save(tmp_path / "one.index")
        raw = (tmp_path / "one.index").read_bytes()
        assert f'"format": {format},'.encode() in raw
        assert ("precision" in read_header(tmp_path / "one.index").settings) == (format == 2)
        assert len(load_index(tmp_path / "one.index", device="cpu")) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": "opq"}, 'has the codes .*got "opq"'),
        ({"codes": "pq", "pieces": DIM + 1}, "0 <= pieces"),
        ({"codes": "rabitq", "bits": 9}, "bits from 1 to 8"),
        ({"precision": "float16"}, 'keeps vectors as float32; got precision "float16"'),
        ({"codes": "pq", "precision": "int12"}, 'got precision "int12"'),
    ],
)
def test_codes_that_do_not_exist_are_refused(options, message):
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match=message):
        make_index("ivf", DIM, device="cpu", **options)


@pytest.mark.parametrize("shape", [(1, 50), (3, 1000), (2, 4101), (5, 20_000)])
@pytest.mark.parametrize("count", [1, 16, 60])
def test_the_highest_columns_are_the_highest(shape, count):
    rng = np.random.default_rng(6)
    for scores in (rng.standard_normal(shape).astype(np.float32), np.zeros(shape, np.float32)):
        chosen = highest(scores, count)
        assert chosen.shape == (shape[0], min(count, shape[1]))
        for row, columns in zip(scores, chosen, strict=True):
            assert len(set(columns.tolist())) == len(columns)
            assert sorted(row[columns]) == sorted(row)[-count:]
