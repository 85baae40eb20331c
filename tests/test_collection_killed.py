"""A process that writes to a collection is killed at random moments; what it was promised is there."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dml.collection import create_collection, open_collection

DIM = 8
NAMES = 30
WRITER = """
import json, random, sys
import numpy as np
from dml.collection import NewItem, open_collection

folder, seed, dim, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)

def say(*what):
    print(json.dumps(what), flush=True)

def vector(number):
    row = np.random.default_rng(number).standard_normal(dim)
    return (row / np.linalg.norm(row)).astype(np.float32)

shop = open_collection(folder)
say("ready")
while True:
    kind = rng.choices(["add", "delete", "payload", "build"], [6, 3, 2, 1])[0]
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
    else:
        shop.build_index()
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
    import json

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
def test_nothing_acknowledged_is_lost_and_nothing_comes_back_after_kill_9(tmp_path, scale):
    folder = tmp_path / "shop"
    create_collection(folder, dim=DIM, fingerprint="f", index="flat").close()
    model, acknowledged = {}, 0
    for seed in range(8 * scale):
        print(f"seed {seed}")
        said = run_until_killed(folder, seed, random.Random(seed).uniform(0.02, 0.4))
        possible = model
        for line in said:
            if line[0] == "begin":
                possible = applied(model, line)
            else:
                model, acknowledged = possible, acknowledged + 1
        with open_collection(folder) as shop:
            assert shop.verify() == []
            there = contents(shop)
            assert there in (in_bytes(model), in_bytes(possible)), f"seed {seed}"
            if there != in_bytes(model):
                model = possible  # the last write was durable, and the news of it was lost
            check_search(shop, model)
    assert acknowledged > 20 * scale


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
