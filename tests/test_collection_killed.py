"""A process that writes to a collection is killed at random moments; what it was promised is there.

It adds, replaces and deletes, builds and merges its index and makes backups, while merges run in the
background.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest

from dml.collection import create_collection, open_collection
from dml.collection.backup import check_backup

DIM = 8
NAMES = 30
WRITER = """
import json, random, sys
from pathlib import Path
import numpy as np
from dml.collection import NewItem, merging, open_collection
from dml.collection.backup import back_up

folder, seed, dim, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
merging.DUE_ROWS, merging.DUE_ROOT = 4, 0  # one merge after the other

def say(*what):
    print(json.dumps(what), flush=True)

def vector(number):
    row = np.random.default_rng(number).standard_normal(dim)
    return (row / np.linalg.norm(row)).astype(np.float32)

shop = open_collection(folder)
say("ready")
while True:
    kind = rng.choices(["add", "delete", "payload", "build", "merge", "backup"], [12, 6, 4, 1, 2, 1])[0]
    chosen = [f"i{n}" for n in rng.sample(range(names), rng.randint(1, 4))]
    number = rng.randrange(10**6)
    picture = rng.random() < 0.3
    say("begin", kind, chosen, number, picture)
    if kind == "add":
        image = f"picture {number}".encode() if picture else None
        shop.add([NewItem(c, vector(number + k), {"n": number}, image=image) for k, c in enumerate(chosen)])
    elif kind == "delete":
        shop.delete(chosen)
    elif kind == "payload":
        if shop.find(chosen[:1]):
            shop.update_payload(chosen[0], {"seen": number})
    elif kind == "build":
        shop.build_index()
    elif kind == "merge":
        shop.merge()
    else:
        back_up(Path(folder), Path(folder + ".backup"))
    say("done")
"""


def vector(number):
    row = np.random.default_rng(number).standard_normal(DIM)
    return (row / np.linalg.norm(row)).astype(np.float32)


def applied(model, operation):
    """The model after an operation: {id: (number of its vector, payload, picture)}."""
    _, kind, chosen, number, picture = operation
    model = dict(model)
    if kind == "add":
        for k, name in enumerate(chosen):
            model[name] = (number + k, {"n": number}, f"picture {number}".encode() if picture else None)
    elif kind == "delete":
        for name in chosen:
            model.pop(name, None)
    elif kind == "payload" and chosen[0] in model:
        vector_number, payload, image = model[chosen[0]]
        model[chosen[0]] = (vector_number, {**payload, "seen": number}, image)
    return model


def contents(shop):
    """The same of what the collection holds, with vectors as bytes."""
    found, _ = shop.scroll(limit=10 * NAMES, with_vector=True)
    return {
        item.id: (item.vector.tobytes(), dict(item.payload), shop.picture(item.id) if item.picture else None)
        for item in found
    }


def in_bytes(model):
    return {name: (vector(n).tobytes(), payload, image) for name, (n, payload, image) in model.items()}


def run_until_killed(folder, seed, seconds):
    """What the writer said before SIGKILL reached it."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed), str(DIM), str(NAMES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        first = writer.stdout.readline()
        assert first, writer.stderr.read()
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read()
        assert not writer.stderr.read()
    whole = [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("part", range(5))
def test_nothing_acknowledged_is_lost_and_nothing_comes_back_after_kill_9(part, tmp_path, scale):
    folder = tmp_path / "shop"
    kind = ("flat", "hnsw")[part % 2 if find_spec("faiss") else 0]
    create_collection(folder, dim=DIM, fingerprint="f", index=kind).close()
    model, acknowledged = {}, 0
    states = [in_bytes(model)]  # that the backup may be of: since the last one that was acknowledged
    kills = 2 if scale == 1 else 4 * scale
    for seed in range(1000 * part, 1000 * part + kills):
        print(f"seed {seed}")
        said = run_until_killed(folder, seed, random.Random(seed).uniform(0.02, 0.4))
        possible, doing = model, ""
        for line in said:
            if line[0] == "begin":
                possible, doing = applied(model, line), line[1]
                states.append(in_bytes(possible))
            else:
                model, acknowledged = possible, acknowledged + 1
                states = [in_bytes(model)] if doing == "backup" else states
        with open_collection(folder) as shop:
            assert shop.verify() == []
            there = contents(shop)
            assert there in (in_bytes(model), in_bytes(possible)), f"seed {seed}"
            if there != in_bytes(model):
                model = possible  # the last write was durable, and the news of it was lost
            check_search(shop, model)
        check_last_backup(tmp_path / "shop.backup", states)
    print(f"{acknowledged} acknowledged operations over {kills} kills")
    assert acknowledged > kills // 2


def check_last_backup(backup, states):
    """Killed or not: it is whole, and of a moment that there was."""
    if not backup.exists():
        return
    assert check_backup(backup) == []
    with open_collection(backup, read_only=True) as copy:
        assert copy.verify() == []
        assert contents(copy) in states


def check_search(shop, model):
    """Searching finds exactly what is there, nearest first."""
    assert len(shop) == len(model)
    query = vector(10**7)
    [result] = shop.search(query[None], limit=NAMES)
    scores = {
        name: float(np.dot(vector(n).astype(float), query.astype(float))) for name, (n, _, _) in model.items()
    }
    assert [hit.score for hit in result.hits] == pytest.approx(
        sorted(scores.values(), reverse=True), abs=1e-6
    )
    assert {hit.id for hit in result.hits} == set(model)
