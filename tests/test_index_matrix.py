"""Exact search on bfloat16 matrix units: as good as exact, also where scores are close."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dml.errors import ConfigError
from dml.index import make_index
from dml.index.flat import FlatIndex
from dml.index.products import highest_columns


@pytest.fixture(params=["openvino", "torch"])
def engine(request):
    pytest.importorskip(request.param)
    return request.param


def unit(seed, count, dim, spread):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((30, dim))
    rows = centres[rng.integers(0, 30, count)] + spread * rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dim", [32, 200])
@pytest.mark.parametrize("spread", [0.05, 0.6])  # neighbours nearer to each other than bfloat16 can tell; far
def test_finds_the_true_neighbours(engine, dim, spread, scale):
    rows, queries = unit(0, 6000, dim, spread), unit(1, 1000 * scale, dim, spread)
    flat, matrix = FlatIndex(dim), make_index("matrix", dim, engine=engine)
    for index in (flat, matrix):
        index.add(np.arange(6000), rows)
    true, found = flat.search(queries, 10), matrix.search(queries, 10)
    assert (found.scores >= true.scores[:, -1:]).mean() >= 0.9999
    same = (found.ids == true.ids).all(axis=1)
    assert (found.scores[same] == true.scores[same]).all()


def test_is_right_across_its_blocks_with_rows_removed(engine, monkeypatch):
    monkeypatch.setattr("dml.index.products.BLOCK_ROWS", 777)
    rows, queries = unit(2, 5000, 24, 0.6), unit(3, 50, 24, 0.6)
    flat, matrix = FlatIndex(24), make_index("matrix", 24, engine=engine)
    for index in (flat, matrix):
        index.add(np.arange(5000), rows)
        index.remove(np.arange(0, 5000, 3))
    true, found = flat.search(queries, 10), matrix.search(queries, 10)
    assert (found.ids == true.ids).all()
    assert (found.scores == true.scores).all()


@pytest.mark.parametrize("shape", [(1, 40), (3, 1000), (2, 4101), (4, 20_000)])
@pytest.mark.parametrize("count", [1, 40])
def test_the_highest_columns_are_the_highest(shape, count):
    torch = pytest.importorskip("torch")
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    best, columns = highest_columns(torch, scores, count)
    assert (scores.gather(1, columns) == best).all()
    for row, chosen in zip(scores, columns, strict=True):
        assert len(set(chosen.tolist())) == len(chosen) == min(count, shape[1])
        assert (row[chosen].sort().values == row.sort().values[-count:]).all()


def test_an_engine_that_there_is_not_is_named():
    with pytest.raises(ConfigError, match="auto, torch or openvino"):
        make_index("matrix", 8, engine="mkl")


def test_searches_from_several_threads_do_not_disturb_each_other(engine):
    rows = unit(4, 4000, 48, 0.6)
    matrix, flat = make_index("matrix", 48, engine=engine), FlatIndex(48)
    for index in (matrix, flat):
        index.add(np.arange(4000), rows)
    parts = [unit(5 + n, 40, 48, 0.6) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: matrix.search(part, 5).ids, parts * 3))
    true = [flat.search(part, 5).ids for part in parts] * 3
    assert all((a == b).all() for a, b in zip(found, true, strict=True))
