"""What every index kind must do. A new entry in KINDS is tested without a new line."""

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dml.errors import ConfigError, DamagedFile, DimensionMismatch, MissingExtra, StorageError, VectorError
from dml.index import KINDS, VectorIndex, choose_kind, load_index, make_index
from dml.index.file import FORMAT, check_index_file, read_header
from dml.index.flat import FlatIndex
from dml.storage import opened_aside

DIM = 24


VARIANTS = {
    "faiss_flat float16": ("faiss_flat", {"precision": "float16"}),
    "faiss_flat bfloat16": ("faiss_flat", {"precision": "bfloat16"}),
    "faiss_flat int8": ("faiss_flat", {"precision": "int8"}),
    "hnsw float16": ("hnsw", {"precision": "float16"}),
    "hnsw bfloat16": ("hnsw", {"precision": "bfloat16"}),
    "hnsw int12": ("hnsw", {"precision": "int12"}),
    "hnsw int8": ("hnsw", {"precision": "int8"}),
    "ivf int8": ("ivf", {"codes": "int8"}),
    "ivf pq": ("ivf", {"codes": "pq", "precision": "float16"}),
    "ivf pq8": ("ivf", {"codes": "pq8", "precision": "bfloat16"}),
    "ivf rabitq": ("ivf", {"codes": "rabitq", "bits": 2, "precision": "int8"}),
    "rabitq 4 bits": ("rabitq", {"bits": 4, "precision": "float32"}),
}
"""Kinds with options that change what they are made of."""


def make(kind, dim=DIM, *, device="cpu", **options):
    kind, of_variant = VARIANTS.get(kind, (kind, {}))
    if kind == "matrix":
        pytest.importorskip("torch", reason="torch is not installed")
    elif kind != "flat":
        pytest.importorskip("faiss", reason="faiss is not installed")
    return make_index(kind, dim, device=device, **{**of_variant, **options})


every_kind = pytest.mark.parametrize("kind", [*KINDS, *VARIANTS])
approximate = pytest.mark.parametrize(
    "kind", [kind for kind in [*KINDS, *VARIANTS] if "flat" not in kind and kind != "matrix"]
)


def unit(seed, count, dim=DIM, clusters=40):
    """Unit rows around some directions, as embeddings of classes are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    rows = centres[rng.integers(0, clusters, count)] + 0.7 * rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute_force(queries, ids, vectors, k):
    """The definition, in float64 and one row at a time: (ids, scores) best first, ties by id."""
    answers = []
    for query in queries.astype(np.float64):
        scores = (vectors.astype(np.float64) * query).sum(axis=1).astype(np.float32)
        order = sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))[:k]
        answers.append(([int(ids[r]) for r in order], [float(scores[r]) for r in order]))
    return answers


def truth(index, queries, ids, k):
    """The definition, over the vectors of these ids as the index keeps them."""
    return brute_force(queries, ids, index.vectors_of(ids), k)


def same_as(hits, answers):
    """Whether ids and scores are equal, missing places filled with -1 and -inf."""
    k = hits.ids.shape[1]
    for ids, scores, (wanted, wanted_scores) in zip(hits.ids, hits.scores, answers, strict=True):
        gap = k - len(wanted)
        if ids.tolist() != wanted + [-1] * gap or scores.tolist() != wanted_scores + [-np.inf] * gap:
            return False
    return True


@pytest.fixture(scope="module")
def data():
    """3000 vectors under shuffled ids with gaps, and 40 queries near and among them."""
    vectors = unit(0, 3000)
    ids = np.random.default_rng(1).permutation(9000)[:3000].astype(np.int64)
    queries = np.concatenate([unit(2, 30), vectors[:10]])
    return ids, vectors, queries


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """kind -> a saved index of all the data, built when it is first wanted."""
    folder, built = tmp_path_factory.mktemp("indexes"), {}

    def file(kind):
        if kind not in built:
            index = build(kind, data)
            built[kind] = folder / f"{kind.replace(' ', '-')}.index"
            index.save(built[kind])
        return built[kind]

    return file


def build(kind, data):
    ids, vectors, _ = data
    index = make(kind)
    index.add(ids[:2000], vectors[:2000])
    index.add(ids[2000:], vectors[2000:])
    return index


@pytest.fixture
def filled(files):
    """filled(kind) -> an index of all the data, the test's own."""
    return lambda kind: load_index(files(kind), device="cpu")


@every_kind
def test_is_a_vector_index_and_describes_itself(kind):
    index = make(kind)
    assert isinstance(index, VectorIndex)
    assert index.kind == VARIANTS.get(kind, (kind,))[0]
    assert index.describe()["device"] == "cpu"
    json.dumps(index.describe())


@every_kind
@pytest.mark.parametrize("k", [1, 10, 100])
def test_an_exact_search_equals_the_definition(kind, k, data, filled):
    ids, _vectors, queries = data
    index = filled(kind)
    hits = index.search(queries, k, exact=True)
    assert hits.ids.dtype == np.int64
    assert hits.scores.dtype == np.float32
    assert same_as(hits, truth(index, queries, ids, k))


@every_kind
def test_scores_of_any_search_are_the_true_ones_best_first(kind, data, filled):
    ids, _vectors, queries = data
    index = filled(kind)
    hits = index.search(queries, 10)
    kept, place = index.vectors_of(ids), {int(id): row for row, id in enumerate(ids)}
    for query, found, scores in zip(queries, hits.ids, hits.scores, strict=True):
        rows = kept[[place[int(id)] for id in found]]
        assert scores.tolist() == (rows.astype(np.float64) * query).sum(axis=1).astype(np.float32).tolist()
        assert (np.diff(scores) <= 0).all()
    if index.exact:
        assert same_as(hits, truth(index, queries, ids, 10))


@approximate
def test_recall_rises_with_effort_to_one(kind, data, filled):
    ids, _vectors, queries = data
    index = filled(kind)
    true = [set(wanted) for wanted, _ in truth(index, queries, ids, 10)]

    def recall(effort):
        hits = index.search(queries, 10, effort=effort)
        return np.mean(
            [len(set(map(int, row)) & wanted) / 10 for row, wanted in zip(hits.ids, true, strict=True)]
        )

    low, default, high = recall(1), recall(None), recall(3000)
    assert low <= default <= high
    assert low < high
    assert default >= 0.9
    assert high >= 0.999


@every_kind
def test_asking_for_more_than_there_is_returns_everything(kind, data):
    ids, vectors, queries = data
    index = make(kind)
    index.add(ids[:70], vectors[:70])
    hits = index.search(queries[:5], 100)
    assert same_as(hits, truth(index, queries[:5], ids[:70], 100))
    assert (hits.ids[:, 70:] == -1).all()
    assert np.isneginf(hits.scores[:, 70:]).all()


@every_kind
def test_an_empty_index_finds_nothing(kind, data, tmp_path):
    index = make(kind)
    index.add(np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    index.save(tmp_path / "empty.index")
    for one in (index, load_index(tmp_path / "empty.index", device="cpu")):
        hits = one.search(data[2][:3], 4)
        assert len(one) == 0
        assert (hits.ids == -1).all()
        assert np.isneginf(hits.scores).all()


@every_kind
def test_no_queries_give_no_rows(kind, filled):
    assert filled(kind).search(np.empty((0, DIM), np.float32), 5).ids.shape == (0, 5)


@every_kind
def test_removed_ids_never_return(kind, data, filled):
    ids, _vectors, queries = data
    index = filled(kind)
    gone = ids[:600]
    assert index.remove(np.concatenate([gone, gone[:3], [10**9]])) == 600
    assert index.remove(gone) == 0
    assert len(index) == 2400
    for hits in (
        index.search(queries, 50),
        index.search(queries, 50, exact=True),
        index.search(queries, 5000),
    ):
        assert not np.isin(hits.ids, gone).any()
    assert same_as(index.search(queries, 50, exact=True), truth(index, queries, ids[600:], 50))


@every_kind
def test_everything_can_be_removed_and_come_back_with_other_vectors(kind, data):
    ids, vectors, queries = data
    index = make(kind)
    index.add(ids[:200], vectors[:200])
    assert index.remove(ids[:200]) == 200
    assert (index.search(queries, 3).ids == -1).all()
    index.add(ids[:200], vectors[200:400])
    assert len(index) == 200
    assert same_as(index.search(queries, 7, exact=True), truth(index, queries, ids[:200], 7))


@every_kind
def test_a_view_without_ids_leaves_the_original_alone(kind, data, filled):
    ids, _vectors, queries = data
    index = filled(kind)
    before = index.search(queries, 10)
    view = index.without(ids[:1500])
    further = view.without(ids[1500:2999])
    assert (len(index), len(view), len(further)) == (3000, 1500, 1)
    assert same_as(view.search(queries, 10, exact=True), truth(view, queries, ids[1500:], 10))
    assert set(further.search(queries, 2).ids.ravel().tolist()) == {int(ids[2999]), -1}
    after = index.search(queries, 10)
    assert (after.ids == before.ids).all()
    assert (after.scores == before.scores).all()


@every_kind
def test_the_same_id_twice_is_refused_and_changes_nothing(kind, data, filled):
    ids, vectors, _ = data
    index = filled(kind)
    with pytest.raises(ValueError, match="already in the index"):
        index.add(np.array([10_000, ids[5]]), vectors[:2])
    with pytest.raises(ValueError, match="given twice"):
        index.add(np.array([10_000, 10_000]), vectors[:2])
    with pytest.raises(ValueError, match="not be negative"):
        index.add(np.array([-1]), vectors[:1])
    assert len(index) == 3000


@every_kind
def test_equal_vectors_come_in_the_order_of_their_ids(kind, data):
    ids, vectors, queries = data
    vectors = vectors[:1200].copy()
    vectors[100:400] = vectors[0]  # 301 equal ones, far more than a search fetches at first
    ids = ids[:1200]
    index = make(kind)
    index.add(ids, vectors)
    queries = np.concatenate([vectors[:1], queries[:5]])
    for k in (5, 300, 302):
        assert same_as(index.search(queries, k, exact=True), truth(index, queries, ids, k))
    twice = index.search(queries, 5), index.search(queries[:1], 5)
    assert twice[0].ids[0].tolist() == twice[1].ids[0].tolist()
    assert np.ptp(twice[0].scores[0]) == 0


@every_kind
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_only_allowed_ids_return(kind, share, data, filled):
    ids, _vectors, queries = data
    chosen = np.random.default_rng(3).permutation(3000)[: int(share * 3000)]
    allowed = np.concatenate([ids[chosen], [10**9]])
    index = filled(kind)
    exact = index.search(queries, 10, allowed=allowed, exact=True)
    assert same_as(exact, truth(index, queries, ids[chosen], 10))
    hits = index.search(queries, 10, allowed=allowed)
    assert np.isin(hits.ids, np.append(ids[chosen], -1)).all()
    assert ((hits.ids >= 0).sum(axis=1) == min(10, len(chosen))).all()


@approximate
def test_a_large_allowed_set_goes_through_the_engine_and_keeps_its_recall(kind, monkeypatch, data, filled):
    ids, _vectors, queries = data
    monkeypatch.setattr("dml.index.faiss_index.FEW_ALLOWED", 10)
    chosen = np.random.default_rng(4).permutation(3000)[:900]
    index = filled(kind)
    gone, left = chosen[:100], chosen[100:]
    index.remove(ids[gone])
    hits = index.search(queries, 10, allowed=ids[chosen])
    assert np.isin(hits.ids, ids[left]).all()
    true = truth(index, queries, ids[left], 10)
    found = [len(set(map(int, row)) & set(wanted)) for row, (wanted, _) in zip(hits.ids, true, strict=True)]
    assert np.mean(found) / 10 >= 0.95
    assert same_as(index.search(queries, 10, allowed=ids[chosen], exact=True), true)


@every_kind
def test_an_approximate_search_never_comes_back_short(kind, data, filled):
    _, _, queries = data
    index = filled(kind)
    hits = index.search(queries, 500, effort=1)
    assert (hits.ids >= 0).all()


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(kind, bad, data, filled):
    _, _, queries = data
    index = filled(kind)
    wrong = queries[:3].copy()
    wrong[1, 4] = bad
    with pytest.raises(VectorError, match="row 1 holds NaN or infinity"):
        index.search(wrong, 3)
    with pytest.raises(VectorError, match="row 1 holds NaN or infinity"):
        index.add(np.array([10_000, 10_001, 10_002]), wrong)
    assert len(index) == 3000


@every_kind
def test_wrong_length_and_wrong_norm_are_refused(kind, data, filled):
    _, _, queries = data
    index = filled(kind)
    with pytest.raises(DimensionMismatch, match="25 numbers, but this collection holds vectors of 24"):
        index.search(unit(0, 2, dim=25), 3)
    with pytest.raises(VectorError, match="length 2"):
        index.search(2 * queries[:1], 3)
    with pytest.raises(VectorError, match="shape"):
        index.search(queries[0], 3)
    with pytest.raises(ValueError, match="expected 3 ids"):
        index.add(np.array([1]), queries[:3])


@every_kind
@pytest.mark.parametrize(("k", "effort"), [(0, None), (-1, None), (5, 0)])
def test_searches_for_nothing_are_refused(kind, k, effort, data, filled):
    with pytest.raises(ValueError, match="at least 1"):
        filled(kind).search(data[2][:1], k, effort=effort)


@every_kind
def test_what_is_saved_answers_the_same_when_loaded(kind, tmp_path, data):
    ids, vectors, queries = data
    index = build(kind, data)
    index.remove(ids[:100])
    path = tmp_path / "one.index"
    index.save(path, note={"sequence": 7})
    loaded = load_index(path, device="cpu")
    assert (loaded.dim, len(loaded), loaded.describe()) == (DIM, 2900, index.describe())
    if kind not in ("flat", "matrix"):  # which leave dead rows out
        assert loaded.nbytes == index.nbytes
    assert read_header(path).note == {"sequence": 7}
    for k, effort in ((10, None), (10, 5), (4000, None)):
        before, after = index.search(queries, k, effort=effort), loaded.search(queries, k, effort=effort)
        assert (before.ids == after.ids).all()
        assert (before.scores == after.scores).all()
    loaded.add(ids[:100], vectors[:100])
    assert same_as(loaded.search(queries, 10, exact=True), truth(loaded, queries, ids, 10))
    assert list(tmp_path.iterdir()) == [path]


@every_kind
def test_every_flipped_byte_and_every_cut_is_noticed(kind, tmp_path, data, scale):
    ids, vectors, _ = data
    index = make(kind)
    index.add(ids[:150], vectors[:150])
    path = tmp_path / "one.index"
    index.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for place in [0, 9, 30, len(whole) - 1, *rng.integers(0, len(whole), 20 * scale).tolist()]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with pytest.raises(DamagedFile):
            load_index(path)
    for length in [0, 10, 63, 64, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            load_index(path)
    path.write_bytes(whole)
    assert check_index_file(path).count == 150


@every_kind
def test_threads_searching_with_different_effort_do_not_disturb_each_other(kind, data, filled, scale):
    _, _, queries = data
    index = filled(kind).without(data[0][:50])
    efforts = [1, 8, 64, None]
    expected = {effort: index.search(queries, 10, effort=effort) for effort in efforts}
    wrong: list[object] = []

    def work(effort):
        for _ in range(15 * scale):
            hits = index.search(queries, 10, effort=effort)
            if (
                not (hits.ids == expected[effort].ids).all()
                or not (hits.scores == expected[effort].scores).all()
            ):
                wrong.append(effort)

    threads = [threading.Thread(target=work, args=(effort,)) for effort in efforts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_kind
def test_one_query_scores_as_it_does_in_a_batch(kind, data, filled):
    _, _, queries = data
    index = filled(kind)
    together = index.search(queries, 10, exact=True)
    for row in range(len(queries)):
        alone = index.search(queries[row : row + 1], 10, exact=True)
        assert (alone.ids[0] == together.ids[row]).all()
        assert (alone.scores[0] == together.scores[row]).all()


def test_flat_is_right_across_its_blocks(monkeypatch, data):
    ids, vectors, queries = data
    monkeypatch.setattr("dml.index.flat.SCORE_LIMIT", 40 * 97)
    monkeypatch.setattr("dml.index.flat.QUERY_BLOCK", 7)
    index = FlatIndex(DIM)
    index.add(ids, vectors)
    assert same_as(index.search(queries, 15), brute_force(queries, ids, vectors, 15))


@pytest.mark.parametrize("dead", [1, 600, 1_000, 1_100, 1_990])
def test_flat_answers_with_dead_rows_as_without_them_to_the_last_digit(dead, monkeypatch, data):
    """Few dead rows are compared and hidden, many are stepped over; blocks of some hundred rows."""
    monkeypatch.setattr("dml.index.flat.SCORE_LIMIT", 20 * 150)
    monkeypatch.setattr("dml.index.flat.COPY_LIMIT", DIM * 150)
    vectors = unit(4, 2_000)
    vectors[900:1_300] = vectors[17]  # equal scores at the end of a list, some of them of dead rows
    order = np.random.default_rng(1).permutation(2_000)
    gone, left = order[:dead], np.sort(order[dead:])
    index, fresh = FlatIndex(DIM), FlatIndex(DIM)
    index.add(np.arange(2_000), vectors)
    fresh.add(left, vectors[left])
    seen = index.without(gone)
    queries = np.concatenate([vectors[17:18], unit(5, 19)])
    for k in (1, 10, 60, 3_000):
        for found, wanted in (
            (seen.search(queries, k), fresh.search(queries, k)),
            (seen.search(queries[:1], k), fresh.search(queries[:1], k)),
            (index.search(queries, k, allowed=left), fresh.search(queries, k)),
            (
                seen.search(queries, k, allowed=np.arange(1_500)),
                fresh.search(queries, k, allowed=left[left < 1_500]),
            ),
        ):
            np.testing.assert_array_equal(found.ids, wanted.ids)
            np.testing.assert_array_equal(found.scores, wanted.scores)


def test_flat_keeps_few_rows_in_little_room_however_often_they_change():
    vectors = unit(6, 2_000)
    view = FlatIndex(DIM)
    views = []
    for n, vector in enumerate(vectors):  # ten items, of which one after the other changes
        view = view.without(np.array([n - 10])).extended(np.array([n]), vector[None])
        views.append(view)
    assert len(view) == 10
    assert len(view.vectors) < 100
    assert view.nbytes < 100 * (4 * DIM + 9)
    for n in (50, 74, 75, 76, 1_000, 1_999):
        living = np.arange(max(0, n - 9), n + 1)
        found = views[n].search(vectors[n : n + 1], 20)
        assert {*found.ids[0].tolist()} == {*living.tolist(), -1}
        assert found.ids[0, 0] == n
        np.testing.assert_array_equal(views[n].vectors_of(living), vectors[living])


def test_flat_grows_by_views_that_share_one_buffer(data):
    ids, vectors, queries = data
    views = [FlatIndex(DIM)]
    for start in range(0, 900, 90):
        grown = views[-1].extended(ids[start : start + 90], vectors[start : start + 90])
        views.append(grown.without(ids[start : start + 10]))
    for number, view in enumerate(views):
        keep = np.array([row for row in range(90 * number) if row % 90 >= 10], np.int64)
        assert len(view) == len(keep)
        assert same_as(view.search(queries, 5), brute_force(queries, ids[keep], vectors[keep], 5))


def test_ivf_learns_its_cells_from_the_sample_it_is_prepared_with(data):
    ids, vectors, _ = data
    index = make("ivf")
    index.prepare(vectors, 3000)
    index.add(ids[:100], vectors[:100])
    assert index.describe()["cells"] == 76  # 3000 // 39
    assert index.describe()["effort"] == 16


def test_ivf_copes_with_fewer_vectors_than_cells_asked_for(data):
    ids, vectors, queries = data
    index = make("ivf", cells=500, effort=2)
    index.add(ids[:20], vectors[:20])
    assert index.describe()["cells"] == 20
    assert (index.search(queries, 20).ids >= 0).all()


def test_names_and_options_that_do_not_exist_are_refused_with_a_hint():
    with pytest.raises(ConfigError, match='Did you mean "hnsw"'):
        make_index("hnws", 8)
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match='no option "linkz"'):
        make_index("hnsw", 8, linkz=3)
    with pytest.raises(ConfigError, match="links >= 2"):
        make_index("hnsw", 8, links=1)
    with pytest.raises(ConfigError, match="at least 1 number"):
        make_index("flat", 0)


def test_devices_are_decided_and_never_fallen_back_from(monkeypatch, caplog):
    faiss = pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match='Unknown device "tpu"'):
        make_index("faiss_flat", 8, device="tpu")
    with pytest.raises(ConfigError, match="no GPU form"):
        make_index("hnsw", 8, device="cuda:0")
    with pytest.raises(ConfigError, match="runs on the CPU"):
        make_index("flat", 8, device="cuda:0")
    with caplog.at_level("INFO", logger="dml.index"):
        assert make_index("hnsw", 8).describe()["device"] == "cpu"
    assert "device auto means cpu" in caplog.text
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(MissingExtra, match=r"dml\[gpu\]"):
            make_index("ivf", 8, device="cuda:0")


def test_without_faiss_the_extra_is_named_and_auto_means_flat(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"dml\[cpu\]"):
        make_index("hnsw", 8)
    assert make_index("flat", 8).kind == "flat"
    monkeypatch.setattr("dml.index.faiss_index.find_spec", lambda name: None)
    assert choose_kind(10**6) == "flat"


def test_auto_means_exact_for_few_and_a_graph_for_many():
    pytest.importorskip("faiss")
    assert choose_kind(1000) == "faiss_flat"
    assert choose_kind(10**6) == "hnsw"


def test_a_newer_format_is_refused_as_such(tmp_path, monkeypatch):
    index = FlatIndex(DIM)
    monkeypatch.setattr("dml.index.file.FIRST_FORMAT", FORMAT + 1)
    index.save(tmp_path / "new.index")
    monkeypatch.undo()
    with pytest.raises(DamagedFile, match=f"format {FORMAT + 1}.*update dml"):
        load_index(tmp_path / "new.index")


def test_what_is_no_index_file_is_refused(tmp_path):
    (tmp_path / "text.index").write_text("not an index at all, but long enough to hold a whole prefix of one")
    with pytest.raises(DamagedFile, match="not an index file"):
        load_index(tmp_path / "text.index")
    with pytest.raises(DamagedFile, match="cannot be read"):
        load_index(tmp_path / "absent.index")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_until_the_disk_is_full():
        with opened_aside(path) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_until_the_disk_is_full()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_disk_that_refuses_while_saving_leaves_the_old_file(kind, tmp_path, data):
    make(kind)
    script = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from dml.errors import StorageError
from dml.index import make_index
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
rows = np.eye(64, dtype=np.float32)[np.arange(2000) % 64]
index = make_index({kind!r}, 64, device="cpu")
index.add(np.arange(2000), rows)
try:
    index.save(Path({str(tmp_path / "one.index")!r}))
except StorageError as error:
    print("refused:", error)
"""
    (tmp_path / "one.index").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert "refused:" in done.stdout, done.stderr
    assert (tmp_path / "one.index").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["one.index"]


def test_importing_the_package_loads_no_engine():
    script = (
        "import sys, dml.index, dml.collection\n"
        "print([m for m in ('faiss', 'torch', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch"])
def test_torch_and_faiss_live_together_in_either_order(order):
    pytest.importorskip("faiss")
    pytest.importorskip("torch")
    script = f"""
{order}
import numpy as np
from dml.index import make_index
rows = np.eye(32, dtype=np.float32)
for kind in ("faiss_flat", "hnsw", "ivf"):
    index = make_index(kind, 32, device="cpu")
    index.add(np.arange(32), rows)
    assert index.search(rows, 1).ids[:, 0].tolist() == list(range(32))
(torch.randn(64, 64) @ torch.randn(64, 64)).sum().item()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "fine", done.stderr


def gpu_reason():
    """Why tests of faiss on a GPU cannot run here; "" when they can."""
    try:
        import faiss
    except ImportError:
        return "faiss is not installed"
    if not hasattr(faiss, "StandardGpuResources"):
        return "this faiss is built for the CPU only"
    return "" if faiss.get_num_gpus() else "faiss sees no GPU"


@pytest.fixture
def gpu():
    reason = gpu_reason()
    if reason:
        pytest.skip(reason)
    return "cuda:0"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["faiss_flat", "faiss_flat float16", "ivf", "ivf pq8"])
class TestOnGpu:
    def test_answers_as_on_the_cpu(self, kind, gpu, data):
        ids, vectors, queries = data
        index = make(kind, device=gpu)
        index.add(ids, vectors)
        assert index.describe()["device"] == gpu
        assert same_as(index.search(queries, 10, exact=True), truth(index, queries, ids, 10))

    def test_more_neighbours_than_the_kernels_select(self, kind, gpu, data):
        ids, vectors, queries = data
        index = make(kind, device=gpu)
        index.add(ids, vectors)
        assert same_as(index.search(queries[:3], 2900), truth(index, queries[:3], ids, 2900))

    def test_removed_and_not_allowed_ids_stay_away(self, kind, gpu, data):
        ids, vectors, queries = data
        index = make(kind, device=gpu)
        index.add(ids, vectors)
        index.remove(ids[:500])
        assert same_as(index.search(queries, 10, exact=True), truth(index, queries, ids[500:], 10))
        hits = index.search(queries, 10, allowed=ids[:600])
        assert np.isin(hits.ids, ids[500:600]).all()

    def test_a_file_saved_on_the_gpu_loads_on_the_cpu(self, kind, gpu, data, tmp_path: Path):
        ids, vectors, queries = data
        index = make(kind, device=gpu)
        index.add(ids, vectors)
        index.save(tmp_path / "one.index")
        loaded = load_index(tmp_path / "one.index", device="cpu")
        on_gpu, on_cpu = index.search(queries, 10, exact=True), loaded.search(queries, 10, exact=True)
        assert (on_gpu.ids == on_cpu.ids).all()
        assert (on_gpu.scores == on_cpu.scores).all()

    def test_threads_share_one_gpu_index(self, kind, gpu, data):
        ids, vectors, queries = data
        index = make(kind, device=gpu)
        index.add(ids, vectors)
        expected = index.search(queries, 10)
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(index.search(queries, 10))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 4
        assert all((answer.ids == expected.ids).all() for answer in answers)


def test_search_parameters_survive_the_torch_patch_of_faiss() -> None:
    """pytorch-metric-learning imports it, and it replaces the search of every faiss index in the process."""
    pytest.importorskip("faiss")
    pytest.importorskip("torch")
    code = (
        "import faiss.contrib.torch_utils, numpy as np\n"
        "from dml.index import make_index\n"
        "rows = np.eye(8, dtype=np.float32)\n"
        "for kind in ('faiss_flat', 'hnsw'):\n"
        "    index = make_index(kind, 8)\n"
        "    index.add(np.arange(8), rows)\n"
        "    found = index.search(rows, 1, allowed=np.arange(4), effort=16)\n"
        "    assert (found.ids[:4, 0] == np.arange(4)).all(), kind\n"
        "print('fine')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "fine", out.stderr
