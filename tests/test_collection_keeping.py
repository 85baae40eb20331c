"""Damage is found wherever it is, what can be derived is made again, and a backup is a whole collection."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from dml.collection import NewItem, create_collection, open_collection
from dml.collection.repair import repair
from dml.errors import DmlError

DIM = 16
HARMLESS = {"writer.lock", "catalog.sqlite-shm"}
"""What says nothing: who writes just now, and memory that SQLite makes anew."""


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def jpeg(image):
    out = BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_encoder, draw):
    """A collection with everything in it: encoder, pictures, thumbnails, two snapshots, a log of changes."""
    made = tmp_path_factory.mktemp("shelf") / "made"
    about = json.loads((tiny_encoder / "manifest.json").read_text())
    with create_collection(
        made, dim=DIM, fingerprint=about["fingerprint"], index="flat", merge="manual"
    ) as shop:
        shutil.copytree(tiny_encoder, made / "encoder")
        vectors = unit(0, 300)
        shop.add([NewItem(f"i{n}", v, {"label": f"l{n % 3}", "n": n}) for n, v in enumerate(vectors[:200])])
        shop.add([NewItem(f"p{n}", vectors[n], {"n": n}, image=jpeg(draw(n))) for n in range(200, 206)])
        shop.build_index()
        shop.delete([f"i{n}" for n in range(10)])
        shop.merge()
        shop.add([NewItem(f"i{n}", vectors[n + 250]) for n in range(10)])
        shop.delete(["i20"])
        for n in range(200, 206):
            shop.thumbnail(f"p{n}", 64)
        shop.update_payload("i30", {"seen": "yes"})
        folder = made.with_name("shop")
        shutil.copytree(made, folder)  # as a kill leaves it: with the log of changes
    assert (folder / "catalog.sqlite-wal").stat().st_size > 100_000
    return folder


@pytest.fixture
def shop(shelf, tmp_path):
    return shutil.copytree(shelf, tmp_path / "shop")


def contents(folder):
    """Everything that a collection answers."""
    with open_collection(folder, read_only=True) as shop:
        items, _ = shop.scroll(limit=1000, with_vector=True)
        found = shop.search(unit(9, 3), limit=20, with_vector=True)
        return (
            [(i.id, i.payload, i.sequence, i.picture, i.vector.tobytes()) for i in items],
            [[(hit.id, hit.score) for hit in result.hits] for result in found],
            [shop.picture(i.id) for i in items if i.picture],
            [shop.thumbnail(i.id, 64) for i in items if i.picture],
            (shop.generation, len(shop), shop.name, dict(shop.manifest.roots), shop.manifest.created),
        )


def problems_of(folder):
    try:
        with open_collection(folder, read_only=True) as shop:
            return shop.verify()
    except DmlError as error:
        return [str(error)]


def flip(path, rng):
    """Change one byte of a file to another value; where it is."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(data))
    return place


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in HARMLESS)


def test_a_whole_collection_has_no_problems(shop):
    assert problems_of(shop) == []


def test_a_flipped_byte_in_any_file_is_found(shelf, shop, scale):
    before = contents(shelf)
    unseen = []
    for seed in range(12 * scale):
        rng = random.Random(seed)
        for source in files_of(shelf):
            path = shop / source.relative_to(shelf)
            place = flip(path, rng)
            found = problems_of(shop)
            if not found:
                # What SQLite does not use may hold anything: free space in its pages.
                assert path.name in ("catalog.sqlite", "catalog.sqlite-wal"), (seed, path, place)
                assert contents(shop) == before, (seed, path, place)
                unseen.append((path.name, place))
            shutil.copy(source, path)
            shop.joinpath("catalog.sqlite-shm").unlink(missing_ok=True)
    print(len(unseen), "of", 12 * scale * len(files_of(shelf)), "changed bytes are in use by nobody")


# Repair


def test_a_flipped_byte_is_mended_or_what_is_lost_is_named(shelf, shop, scale):
    whole = contents(shelf)
    everything = {id: rest for id, *rest in whole[0]}
    for seed in range(3 * scale):
        rng = random.Random(seed)
        for source in files_of(shelf):
            name = str(source.relative_to(shelf))
            place = flip(shop / name, rng)
            where = (seed, name, place)
            found = problems_of(shop)
            if found and not any("update dml" in problem for problem in found):
                check_repair(shop, name, everything, where=where)
            shutil.rmtree(shop)
            shutil.copytree(shelf, shop)


def check_repair(shop, name, everything, *, where):
    """Repairing leaves no damage but that of what is nowhere else, and loses nothing that it does not name."""
    repairs = repair(shop, replace_catalog=True)
    assert repairs.waiting is None, where
    with open_collection(shop) as mended:
        items, _ = mended.scroll(limit=1000, with_vector=True)
        there = {i.id: [i.payload, i.sequence, i.picture, i.vector.tobytes()] for i in items}
        assert len(mended) == len(there)
        assert {hit.id for hit in mended.search(unit(9, 1), limit=1000)[0].hits} == set(there), where
    if "catalog" not in name:
        assert there == everything, where
        assert not repairs.lost, where
    lost = everything.keys() - there.keys()
    for id in lost:
        assert any(f'"{id}"' in sentence for sentence in repairs.lost) or name.endswith("-wal"), (where, id)
    if not name.endswith("-wal"):  # what is lost with the log of changes are changes
        assert all(there[id] == everything[id] for id in there), where
        assert len(lost) < 60, where
    nowhere_else = name.startswith(("images", "encoder"))
    assert bool(repairs.left) == nowhere_else, (where, repairs.left)
    assert all("picture" in problem or "encoder" in problem for problem in repairs.left), (
        where,
        repairs.left,
    )
