"""The engine without HTTP, and the two machines that keep the service upright."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import ColourEncoder, colour_collection, encoded, jpeg, paint

from dml.collection import create_collection, open_collection
from dml.collection.base import NewItem
from dml.encoder.agreement import store
from dml.encoder.profiles import ProfileAgreement
from dml.errors import (
    ConfigError,
    DimensionMismatch,
    InvalidImage,
    ModelMismatch,
    NotAvailable,
    ReadOnly,
    UnknownCollection,
    UnknownItem,
    UnsupportedImage,
    UsageError,
    VectorError,
)
from dml.imaging import decode
from service import batching
from service.batching import Batcher, Budget, DeadlineExceeded, QueueFull, WorkerPool
from service.engine import Engine, Query, Search, unit
from service.folders import Folder
from service.hosts import check_host
from service.pictures import media_type
from service.problems import Problem
from service.settings import Settings


@pytest.fixture
def engine(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])
    yield engine
    engine.close()


def test_the_engine_works_without_a_server(engine):
    answer = engine.search("colours", Search(Query(image=jpeg("gold", 6)), limit=5))
    assert {hit.item.label for hit in answer.hits} == {"gold"}
    written = engine.put("colours", "new", image=jpeg("gold", 6), payload={"label": "gold"})
    assert written.created
    again = engine.search("colours", Search(Query(image=jpeg("gold", 6)), limit=1))
    assert again.hits[0].id == "new"
    assert again.generation == written.generation > answer.generation
    engine.delete("colours", "new")
    with pytest.raises(UnknownItem, match="new"):
        engine.delete("colours", "new")


def test_what_a_caller_can_do_wrong_is_an_error_of_ours(engine):
    with pytest.raises(UnknownCollection, match="There is: colours"):
        engine.search("shoes", Search(Query(id="a")))
    with pytest.raises(UsageError, match="either a picture or a vector"):
        engine.put("colours", "a")
    with pytest.raises(VectorError, match="nothing to look for"):
        engine.search("colours", Search(Query()))
    with pytest.raises(InvalidImage, match="0 bytes"):
        engine.embed([b""])
    with pytest.raises(UnsupportedImage, match="image 1"):
        engine.embed([jpeg("red"), b"text"])
    with pytest.raises(NotAvailable, match="no single model"):
        engine.embed([jpeg("red")], model="feed")
    engine.settings = Settings(read_only=True)
    with pytest.raises(ReadOnly):
        engine.put("colours", "a", image=jpeg("red"))


def test_a_collection_that_was_deleted_leaves_memory(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, folder=Folder(tmp_path))
    collection = weakref.ref(engine.collection("colours"))
    engine.search(
        "colours", Search(Query(vector=np.ones(48, np.float32)))
    )  # such a one is shared with others
    engine.remove("colours")
    gc.collect()
    assert collection() is None
    engine.close()


def test_opposite_examples_leave_no_direction(tmp_path):
    collection = create_collection(tmp_path / "two", dim=2, fingerprint="f", index="flat")
    rows = {"east": [1.0, 0.0], "west": [-1.0, 0.0], "north": [0.0, 1.0]}
    collection.add(NewItem(id, np.array(row, np.float32)) for id, row in rows.items())
    engine = Engine({"two": collection})
    with pytest.raises(VectorError, match="no direction"):
        engine.search("two", Search(Query(positive=("east", "west"))))
    answer = engine.search("two", Search(Query(id="north", negative=("west",)), limit=3))
    assert [hit.id for hit in answer.hits] == ["east"]
    assert answer.hits[0].score == pytest.approx(1 / np.sqrt(5))  # q = 2 (0, 1) - (-1, 0) = (1, 2)
    engine.close()


def test_an_engine_opens_collection_folders_with_their_encoder(tmp_path, tiny_encoder, tiny_folder):
    from dml.encoder import Encoder

    path = tmp_path / "shapes"
    make_collection(path, tiny_encoder, tiny_folder)
    engine = Engine.open([path], runtime="onnx")
    try:
        picture = (tiny_folder / "class_2" / "3.jpg").read_bytes()
        answer = engine.search("shapes", Search(Query(image=picture), limit=3))
        assert answer.hits[0].id == "class_2/3.jpg"
        assert answer.hits[0].score == pytest.approx(1, abs=1e-4)
        direct = Encoder.load(tiny_encoder, runtime="onnx").embed([picture])
        _, served = engine.embed([picture])
        np.testing.assert_allclose(served, direct, atol=1e-6)
        assert engine.models()[0].input_size == 32
    finally:
        engine.close()


def make_collection(path: Path, encoder: Path, pictures: Path) -> None:
    """A collection as `dml index build` leaves it: with a copy of its encoder."""
    import shutil

    from dml.encoder import Encoder

    loaded = Encoder.load(encoder, runtime="onnx")
    collection = create_collection(path, dim=loaded.dim, fingerprint=loaded.fingerprint, index="flat")
    files = sorted(pictures.rglob("*.jpg"))
    vectors = loaded.embed(files)
    collection.add(
        NewItem(
            file.relative_to(pictures).as_posix(),
            vector,
            {"label": file.parent.name},
            image=file.read_bytes(),
        )
        for file, vector in zip(files, vectors, strict=True)
    )
    collection.close()
    shutil.copytree(encoder, path / "encoder")


def test_a_profile_is_served_once_it_was_measured_and_noted_where_it_writes(
    tmp_path, tiny_encoder, tiny_folder
):
    pictures = [file.read_bytes() for file in sorted(tiny_folder.rglob("*.jpg"))]
    path = tmp_path / "shapes"
    make_collection(path, tiny_encoder, tiny_folder)
    with open_collection(path) as collection:
        collection.set_encoder_info({"profiles": ["pillow/onnx-f32"]})
    with pytest.raises(ModelMismatch, match="has not been measured"):
        Engine.open([path], runtime="fused/onnx-f32")
    figures = ProfileAgreement(("pillow/onnx-f32", "fused/onnx-f32"), 2000, 0.995, 0.99, 0.9999, 0.999)
    store(path / "encoder", [figures])
    engine = Engine.open([path], runtime="fused/onnx-f32")
    assert engine.search("shapes", Search(Query(image=pictures[5]))).hits[0].score > 0.9999
    assert engine.info("shapes").manifest["encoder"]["profiles"] == ["pillow/onnx-f32"]
    engine.put("shapes", "new", image=pictures[5])
    assert engine.info("shapes").manifest["encoder"]["profiles"] == ["pillow/onnx-f32", "fused/onnx-f32"]
    engine.close()


def test_a_collection_with_another_encoder_inside_is_refused(tmp_path, tiny_encoder):
    import shutil

    colour_collection(tmp_path / "colours", pictures=1).close()
    shutil.copytree(tiny_encoder, tmp_path / "colours" / "encoder")
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        Engine.open([tmp_path / "colours"], runtime="onnx")


def test_two_collections_of_one_name_are_refused_and_nothing_stays_open(tmp_path):
    for parent in ("a", "b"):
        colour_collection(tmp_path / parent / "same", pictures=1).close()
    with pytest.raises(UsageError, match='called "same"'):
        Engine.open([tmp_path / "a" / "same", tmp_path / "b" / "same"])
    Engine.open([tmp_path / "a" / "same"]).close()  # the writer's lock is free again


def test_concurrent_searches_and_writes_answer_as_one_by_one(engine, scale):
    pictures = [jpeg(colour, number) for colour in ("red", "blue", "green") for number in range(8)]
    alone = [engine.search("colours", Search(Query(image=p), limit=5)) for p in pictures]
    sizes: list[int] = []
    engine.observers.batch = sizes.append

    def ask(number: int) -> bool:
        position = number % len(pictures)
        answer = engine.search("colours", Search(Query(image=pictures[position]), limit=5))
        return [h.id for h in answer.hits] == [h.id for h in alone[position].hits]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200 * scale)))
    assert sum(sizes) == 200 * scale
    assert max(sizes) <= engine.settings.max_batch


def test_pictures_are_decoded_only_as_far_as_the_memory_goes(tmp_path):
    """Sixteen threads with pictures of 60,000 pixels, of which three may be in memory at a time."""
    held, most, lock = [0], [0], threading.Lock()

    class Watching(ColourEncoder):
        def preprocess(self, picture: Image.Image) -> np.ndarray:
            pixels = picture.width * picture.height
            with lock:
                held[0] += pixels
                most[0] = max(most[0], held[0])
            time.sleep(0.005)
            with lock:
                held[0] -= pixels
            return super().preprocess(picture)

    settings = Settings(max_pixels_in_flight=200_000)
    collection = colour_collection(tmp_path / "colours", pictures=1)
    engine = Engine({"colours": collection}, [Watching()], settings=settings)
    small, large = encoded(paint("gold", 3, (300, 200))), encoded(paint("gold", 3, (900, 700)))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda data: engine.embed([data])[1][0], [small] * 40 + [large] * 2))
    assert max(held[0], engine.decoding.taken) == 0
    assert 60_000 < most[0] <= 630_000
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (42, 48)), atol=0.05)
    most[0] = 0
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda data: engine.embed([data]), [small] * 40))
    assert 60_000 < most[0] <= 180_000
    with pytest.raises(InvalidImage):
        engine.embed([small[:500]])
    assert engine.decoding.taken == 0
    engine.close()


def test_thumbnails_wait_for_memory_too(tmp_path):
    async def scenario() -> None:
        pool = WorkerPool(1, 1, deadline_seconds=0.1)
        with engine.decoding.take(engine.settings.max_pixels_in_flight), pytest.raises(DeadlineExceeded):
            await pool.run(lambda: engine.thumbnail("colours", "red/0"))
        pool.close()
        assert engine.thumbnail("colours", "red/0")[:2] == b"\xff\xd8"

    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)})
    asyncio.run(scenario())
    engine.close()


# unit


def test_a_vector_is_scaled_to_length_one_whatever_its_size():
    for factor in (1.0, 1e-200, 1e200):
        np.testing.assert_allclose(unit([3 * factor, 4 * factor], dim=2, where="v"), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("vector", [[np.nan, 1], [np.inf, 1], [0, 0], [[1, 2]]])
def test_vectors_without_a_direction_are_refused(vector):
    with pytest.raises(VectorError):
        unit(vector, dim=2, where="the vector")


def test_a_wrong_dimension_is_told_with_both_numbers():
    with pytest.raises(DimensionMismatch, match="3 numbers.*vectors of 2"):
        unit([1, 2, 3], dim=2, where="the vector")


# Settings and signatures


@pytest.mark.parametrize(
    "wrong", [{"max_body_bytes": 0}, {"workers": -1}, {"queue": -1}, {"deadline_seconds": 0}]
)
def test_limits_that_let_nothing_through_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize(
    "name", ["a:80", "cafe:80", "[::1]:80", "http://a", "a/b", "a b", "*", "*.a", "", "."]
)
def test_a_host_to_allow_is_a_bare_name(name):
    with pytest.raises(ConfigError, match="bare name"):
        Settings(allow_hosts=(name,))


def test_hosts_are_compared_without_port_and_case():
    allowed = Settings(allow_hosts=("Photos.Example.", "[2001:DB8::1]", "10.0.0.1")).allow_hosts
    for host in (
        "photos.example",
        "PHOTOS.example.:443",
        "[2001:db8::1]:8",
        "10.0.0.1:",
        "127.0.0.1",
        "[::1]",
    ):
        check_host([host], allowed)
    for hosts in (["photos.example.evil"], ["a@photos.example"], ["photos.example:80:80"], [], ["", ""]):
        with pytest.raises(Problem, match="421"):
            check_host(hosts, allowed)
        check_host(hosts, ())
    with pytest.raises(Problem, match="421"):
        check_host(["localhost", "localhost"], allowed)


def test_kinds_of_pictures_are_told_by_their_first_bytes():
    assert media_type(jpeg("red")) == "image/jpeg"
    assert media_type(b"RIFF\0\0\0\0WEBPVP8 ") == "image/webp"
    assert media_type(b"RIFX\0\0\0\0WEBPVP8 ") is None
    assert media_type(b"<svg onload='x'>") is None
    assert media_type(b"") is None


# The batcher


class Gate:
    """A function for a batcher that doubles its rows, when it is let; notes what it was called with."""

    def __init__(self) -> None:
        self.called, self.go, self.calls = threading.Semaphore(0), threading.Event(), list[list[float]]()

    def __call__(self, rows: list[float]) -> list[float]:
        self.calls.append(rows)
        self.called.release()
        assert self.go.wait(10)
        return [2 * row for row in rows]


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 10 seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def test_rows_come_back_in_order_and_waiting_ones_share_a_call():
    gate, sizes = Gate(), list[int]()
    batcher = Batcher(gate, max_batch=4, observe=sizes.append)
    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(batcher, [1.0])
        assert gate.called.acquire(timeout=10)
        others = [pool.submit(batcher, [10.0 * n, 10.0 * n + 1]) for n in range(1, 5)]
        until(lambda: batcher.waiting == 8)
        gate.go.set()
        assert first.result(10) == [2.0]
        for n, other in enumerate(others, start=1):
            assert other.result(10) == [20.0 * n, 20.0 * n + 2]
    assert sizes == [1, 4, 4]
    assert (batcher.busy, batcher.waiting) == (0, 0)
    batcher.close()


def test_each_lane_makes_a_call_of_its_own_and_takes_a_fair_share_of_what_waits():
    gate = Gate()
    batcher = Batcher(gate, lanes=3)
    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(batcher, [float(n)]) for n in range(3)]
        for _ in running:
            assert gate.called.acquire(timeout=10)
        assert batcher.busy == 3
        waiting = [pool.submit(batcher, [float(n)]) for n in range(3, 12)]
        until(lambda: batcher.waiting == 9)
        gate.go.set()
        assert [done.result(10) for done in [*running, *waiting]] == [[2.0 * n] for n in range(12)]
    assert max(len(rows) for rows in gate.calls) == 3, "nine rows wait for three lanes"
    assert sorted(row for rows in gate.calls for row in rows) == list(range(12))


def test_a_lone_row_does_not_wait_for_company():
    threads = []
    batcher = Batcher(lambda rows: threads.append(threading.get_ident()) or rows, max_batch=64, max_wait=60)
    started = time.monotonic()
    for _ in range(20):
        batcher([0.0])
    assert time.monotonic() - started < 60, "nobody was announced"
    assert set(threads) == {threading.get_ident()}, "not even a change of threads"


def test_a_call_waits_for_rows_that_are_announced_and_for_no_others():
    calls: list[list[float]] = []
    batcher = Batcher(lambda rows: calls.append(rows) or rows, max_batch=8, max_wait=60)
    with ThreadPoolExecutor(1) as pool:
        with batcher.coming():
            first = pool.submit(batcher, [1.0])
            until(lambda: batcher.busy == 1)
            assert not calls
        assert first.result(10) == [1.0], "what was announced did not come"
        with batcher.coming():
            first = pool.submit(batcher, [1.0])
            until(lambda: batcher.busy == 1)
            batcher([2.0, 3.0])
    assert calls == [[1.0], [1.0, 2.0, 3.0]]


def test_a_failing_call_fails_its_callers_and_no_others():
    def picky(rows: list[float]) -> list[float]:
        if min(rows) < 0:
            raise ValueError("negative")
        return rows[: 1 if 7.0 in rows else None]

    batcher = Batcher(picky)
    with pytest.raises(ValueError, match="negative"):
        batcher([-1.0])
    with pytest.raises(ValueError, match="1 results for 2 rows"):
        batcher([7.0, 8.0])
    assert batcher([1.0]) == [1.0]
    assert batcher([]) == []
    batcher.close()
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher([1.0])


def test_rows_whose_time_is_over_are_dropped_before_the_call():
    async def scenario() -> None:
        gate = Gate()
        batcher = Batcher(gate)
        short, long = WorkerPool(2, 2, deadline_seconds=0.05), WorkerPool(2, 2, deadline_seconds=20)
        first = asyncio.create_task(long.run(lambda: batcher([1.0])))
        await asyncio.to_thread(gate.called.acquire, timeout=10)
        with pytest.raises(DeadlineExceeded):
            await short.run(lambda: batcher([2.0]))
        patient = asyncio.create_task(long.run(lambda: batcher([3.0])))
        await asyncio.to_thread(until, lambda: short.taken == 0 and batcher.waiting == 1)
        gate.go.set()
        assert (await first, await patient) == ([2.0], [6.0])
        assert gate.calls == [[1.0], [3.0]]
        for pool in (short, long):
            pool.close()

    asyncio.run(scenario())


def test_many_threads_get_their_own_results_in_whatever_order_they_come(scale):
    """Lanes, shares, announcements, deadlines and errors at once."""
    running, most, lock = [0], [0], threading.Lock()

    def work(rows: list[int]) -> list[int]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.0005)
        with lock:
            running[0] -= 1
        return [-row for row in rows]

    def ask(number: int) -> bool:
        rng = random.Random(number)
        rows = [rng.randrange(1000) for _ in range(rng.choice([1, 1, 1, 2, 20]))]
        hurried = rng.random() < 0.1
        token = batching._answer_by.set(time.monotonic() + 0.003 * rng.random()) if hurried else None
        try:
            with batcher.coming():
                time.sleep(0.0005 * rng.random())
            return batcher(rows) == [-row for row in rows]
        except DeadlineExceeded:
            return hurried
        finally:
            if token is not None:
                batching._answer_by.reset(token)

    for lanes, max_wait in ((1, 0.0), (1, 0.0005), (3, 0.0)):
        most[0], sizes = 0, list[int]()
        batcher = Batcher(work, max_batch=8, lanes=lanes, max_wait=max_wait, observe=sizes.append)
        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(ask, range(300 * scale)))
        batcher.close()
        assert (batcher.busy, batcher.waiting, batcher.announced) == (0, 0, 0)
        assert most[0] <= lanes
        assert max(sizes) <= 8


# Shared searches


def test_searches_of_one_moment_share_a_call_and_are_answered_as_one_by_one(tmp_path):
    """While one search is held up, nine others come: with two kinds of options, and one that is wrong."""
    collection = colour_collection(tmp_path / "colours")
    gate, calls = threading.Event(), list[int]()
    search = collection.search

    def slow(vectors: np.ndarray, **options: Any) -> Any:
        calls.append(len(vectors))
        assert gate.wait(10)
        return search(vectors, **options)

    collection.search = slow  # only held up, not replaced
    engine = Engine({"colours": collection}, [ColourEncoder()])
    vectors = [unit(row, dim=48, where="a row") for row in np.random.default_rng(0).normal(size=(10, 48))]
    wanted = [Search(Query(vector=v), limit=3 if n % 2 else 5) for n, v in enumerate(vectors)]
    with ThreadPoolExecutor(11) as pool:
        first = pool.submit(engine.search, "colours", wanted[0])
        until(lambda: bool(calls))
        wrong = pool.submit(engine.search, "colours", Search(Query(vector=vectors[0]), limit=0))
        others = [pool.submit(engine.search, "colours", one) for one in wanted[1:]]
        until(lambda: engine._sharing(collection)._batcher.waiting == 10)
        gate.set()
        with pytest.raises(UsageError, match="limit"):
            wrong.result(10)
        found = [done.result(10) for done in (first, *others)]
    assert sorted(calls) == [1, 1, 4, 5]
    for one, answer in zip(wanted, found, strict=True):
        [alone] = search(np.asarray(one.query.vector)[None], limit=one.limit)
        assert [hit.id for hit in answer.hits] == [hit.id for hit in alone.hits]
        assert [hit.score for hit in answer.hits] == pytest.approx(
            [hit.score for hit in alone.hits], abs=1e-6
        )
    engine.close()


def test_a_picture_whose_time_is_over_is_not_decoded(tmp_path):
    decoded: list[int] = []

    class Noting(ColourEncoder):
        @staticmethod
        def decode(source: bytes, *, max_pixels: int) -> Image.Image:
            decoded.append(len(source))
            return decode(source, max_pixels=max_pixels)

    async def scenario() -> None:
        pool = WorkerPool(1, 4, deadline_seconds=0.05)

        def late() -> None:
            time.sleep(0.1)
            engine.embed([jpeg("red")])

        with pytest.raises(DeadlineExceeded):
            await pool.run(late)
        pool.close()
        assert decoded == []
        engine.embed([jpeg("red")])
        assert len(decoded) == 1

    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)}, [Noting()])
    asyncio.run(scenario())
    engine.close()


# The budget


def test_a_large_piece_of_a_budget_gets_its_turn_among_many_small_ones():
    budget, order = Budget(10), []

    def take(amount: int) -> None:
        with budget.take(amount):
            order.append(amount)

    threads = []
    with budget.take(6):
        for amount in (10, 1, 2):
            threads.append(threading.Thread(target=take, args=(amount,)))
            threads[-1].start()
            end = time.monotonic() + 10
            while len(budget._line) < len(threads) and time.monotonic() < end:
                time.sleep(0.001)
        assert order == [], "the small ones stand behind the large one"
    for thread in threads:
        thread.join(10)
    assert order[0] == 10
    assert sorted(order) == [1, 2, 10]
    with budget.take(1000):
        assert budget.taken == 10, "more than there is counts as all of it"
    assert budget.taken == 0


def test_waiting_for_a_budget_counts_against_the_deadline_and_frees_the_thread():
    async def scenario() -> None:
        budget, pool = Budget(1), WorkerPool(1, 1, deadline_seconds=0.1)

        def take() -> str:
            with budget.take(1):
                return "taken"

        with budget.take(1):
            with pytest.raises(DeadlineExceeded):
                await pool.run(take)
            end = time.monotonic() + 5
            while pool.taken and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert pool.taken == 0, "the thread must not wait on for nobody"
        pool.close()
        assert take() == "taken"

    asyncio.run(scenario())


# The pool


def test_a_full_pool_refuses_at_once_and_takes_again_later():
    async def scenario() -> None:
        go = threading.Event()
        pool = WorkerPool(1, 1)
        tasks = [asyncio.create_task(pool.run(lambda: go.wait(10))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert pool.taken == 2
        with pytest.raises(QueueFull):
            await pool.run(lambda: None)
        go.set()
        assert await asyncio.gather(*tasks) == [True, True]
        assert await pool.run(lambda: 5) == 5
        assert pool.taken == 0
        pool.close()

    asyncio.run(scenario())


def test_a_late_answer_is_given_up_and_its_place_is_free_when_it_ends():
    async def scenario() -> None:
        go = threading.Event()
        pool = WorkerPool(1, 1, deadline_seconds=0.5)  # its thread must have begun by then
        with pytest.raises(DeadlineExceeded, match=r"0\.5 seconds"):
            await pool.run(lambda: go.wait(10))
        ran = []
        with pytest.raises(DeadlineExceeded):  # it waits behind the first, and is dropped unstarted
            await pool.run(lambda: ran.append(1))
        go.set()
        pool.close()
        assert pool.taken == 0
        assert ran == []

    asyncio.run(scenario())


def test_an_error_of_the_task_is_the_callers_error():
    def fail() -> None:
        raise TimeoutError("the task's own")

    async def scenario() -> None:
        pool = WorkerPool(1, 0)
        with pytest.raises(TimeoutError, match="own"):
            await pool.run(fail)
        assert pool.taken == 0
        pool.close()

    asyncio.run(scenario())
