"""The service under load: uploads of photos, closed loop, against two endpoints as people write them.

All servers are processes of their own, with the same encoder, the same vectors and the same pictures to
answer; they are up side by side, and one at a time is asked. Turns alternate between them. The competent
endpoint is given the threads with which it is fastest here, which is tried out first. Ours answers with each
profile that agrees with the vectors of the collection, as `dml serve --runtime PROFILE` would; one that does
not agree is refused by the service and left out of the table.

Answers are compared with those of the naive endpoint, which computes in float32: the share of pictures whose
nearest item is the same (or as near), and of the ten nearest.
"""

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.encoder import Encoder
from dml.encoder.profiles import REFERENCE, Profile, why_not_comparable
from dml.errors import DataError, DmlError, EncoderError, MissingExtra, UsageError
from eval.speed import race
from eval.speed.ingest import photos

PROFILES = ("pillow/onnx-f32", "fused/openvino-bf16", "fused/openvino-int8")
CLIENTS = (1, 8, 32, 128)
COMPETENT, NAIVE = "competent endpoint", "naive endpoint"
NAME = "pictures"
QUERIES = 300
"""Pictures that are uploaded; the collection holds the others."""
TIE = 1e-6
TRIAL = 32
"""Clients with which the competent endpoint's threads are chosen."""
MOVED = 0.25
"""Length of the noise, before scaling, that makes further vectors out of those of the pictures."""
MEMORY_ROWS, MEMORY_DIM = 100_000, 128
START_SECONDS = 120

Say = Callable[[str], object]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """What all servers are given."""

    folder: Path  # collection, and the same for the endpoints
    uploads: list[Path]
    encoder: Path
    pictures: int  # in the collection
    rows: int
    trained: bool
    trunk: str


@dataclass
class Server:
    """A running server: how to ask it, and how long it took until it answered for the first time."""

    name: str
    process: subprocess.Popen[str]
    address: str
    path: str
    first_answer: float  # seconds since the process was started
    torch: bool  # whether torch is in its memory


@dataclass(frozen=True)
class Turn:
    """What one turn of clients saw."""

    rate: float  # answers per second
    p50: float  # seconds
    p99: float
    answers: int
    errors: Mapping[str, int]
    cpu: float | None  # processor seconds of the server per answer


class CannotStart(DmlError):
    """A server ended before it answered."""


def speed_of_service(
    *,
    data: str | None,
    encoder: Path | None,
    profiles: Sequence[str],
    clients: Sequence[int],
    images: int,
    rows: int,
    repeats: int,
    seconds: float,
    trunk: str,
    size: int,
    memory: bool,
    say: Say,
) -> dict[str, Any]:
    """Race our service by profile and both endpoints.

    Args:
        data: folder or manifest of photos; None: photos are drawn.
        encoder: a trained encoder or run; None: an untrained `trunk` for pictures of `size` px, whose vectors
            all lie close together, so that agreement says little.
        profiles: of ours.
        clients: how many ask at a time, one number after the other.
        images: most pictures that are read from `data`.
        rows: vectors in the collection: those of the pictures, and neighbours of them made by noise.
        repeats: turns of every server with every number of clients.
        seconds: of a turn.
        memory: also how much memory ours takes with 100,000 vectors of 128 numbers.

    Raises:
        DataError, EncoderError, MissingExtra: as `Encoder.load`, and for too few pictures.
        CannotStart: a server does not answer.
    """
    here = race.machine()
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        setting = prepare(
            Path(scratch),
            photos(data, images, Path(scratch) / "drawn", say=say),
            source=encoder,
            trunk=trunk,
            size=size,
            rows=rows,
            profiles=profiles,
            say=say,
        )
        servers, refused = start_ours(stack, setting, profiles, say=say)
        tried, chosen = best_competent(setting, seconds=seconds, say=say)
        for kind, name in (("competent", COMPETENT), ("naive", NAIVE)):
            options = chosen if kind == "competent" else []
            servers[name] = stack.enter_context(endpoint(setting, kind, options, name))
        agreements = agreement(servers, setting, say=say)
        turns = take_turns(servers, setting, clients=clients, repeats=repeats, seconds=seconds, say=say)
        about = [about_server(server, agreements) for server in servers.values()]
        found = {
            "machine": here,
            "repeats": repeats,
            "seconds": seconds,
            "data": "drawn" if data is None else Path(data).name,
            "trunk": setting.trunk,
            "trained": setting.trained,
            "size": Encoder.load(setting.encoder, device="cpu").preprocess.size,
            "pictures": setting.pictures,
            "rows": setting.rows,
            "uploads": len(setting.uploads),
            "competent tried": tried,
            "servers": about,
            "refused": refused,
            "clients": [{"clients": n, "rows": rows_of(turns, n)} for n in clients],
        }
    found["goals"] = goals(found)
    if memory:
        found["memory"] = memory_of_service(say=say)
    return found


# What everybody is given


def prepare(
    scratch: Path,
    files: Sequence[Path],
    *,
    source: Path | None,
    trunk: str,
    size: int,
    rows: int,
    profiles: Sequence[str],
    say: Say,
) -> Setting:
    """A copy of the encoder, a collection of most of the pictures, and the same for the endpoints."""
    from eval.speed.ingest import untrained

    if len(files) < 8:
        raise DataError(f"{len(files)} pictures are too few; at least 8 are needed.")
    place = scratch / "encoder"
    if source is None:
        untrained(place, trunk, size)
    else:
        shutil.copytree(Encoder.load(source, device="cpu").path, place)
    measure_agreement(place, files, profiles, scratch, say=say)
    encoder = Encoder.load(place, device="cpu", profile=REFERENCE)
    if encoder.preprocess.fit == "pad":
        raise UsageError('The endpoints have no "pad"; race an encoder that crops or squashes.')
    asked = np.linspace(0, len(files) - 1, min(QUERIES, len(files) // 2)).astype(int)
    uploads = [files[i] for i in asked]
    kept = [file for i, file in enumerate(files) if i not in set(asked.tolist())]
    say(f"embedding {len(kept):,} pictures")
    vectors = encoder.embed_files(kept).vectors
    everything = filled(vectors, max(rows, len(vectors)))
    folder = scratch / "setting"
    folder.mkdir()
    write_setting(folder, everything, encoder)
    return Setting(
        folder,
        uploads,
        place,
        len(vectors),
        len(everything),
        bool(encoder.manifest["provenance"].get("trained", True)),
        encoder.manifest["model"]["trunk"],
    )


def filled(vectors: Vectors, rows: int) -> Vectors:
    """(rows, D): the vectors, and others near them."""
    rng = np.random.default_rng(0)
    more = vectors[rng.integers(0, len(vectors), rows - len(vectors))]
    noise = rng.standard_normal(more.shape, dtype=np.float32)
    moved = more + MOVED * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return np.concatenate([vectors, moved])


def write_setting(folder: Path, vectors: Vectors, encoder: Encoder) -> None:
    """The collection, and the files that `eval.speed.endpoints` reads."""
    from dml.collection import NewItem, create_collection
    from dml.collection.encoding import describe_encoder

    ids = [f"item-{number}" for number in range(len(vectors))]
    place = folder / NAME
    with create_collection(
        place, dim=encoder.dim, fingerprint=encoder.fingerprint, encoder_info=describe_encoder(encoder)
    ) as collection:
        collection.add([NewItem(id, row) for id, row in zip(ids, vectors, strict=True)])
        collection.build_index(measure=False)
    shutil.copytree(encoder.path, place / "encoder")
    np.save(folder / "vectors.npy", vectors)
    (folder / "ids.json").write_text(json.dumps(ids))
    (folder / "preprocess.json").write_text(json.dumps(encoder.preprocess.as_json()))
    for file in encoder.path.glob("model.onnx*"):
        shutil.copy(file, folder)


def measure_agreement(
    place: Path, files: Sequence[Path], profiles: Sequence[str], scratch: Path, *, say: Say
) -> None:
    """Measure what the service will ask for: whether a profile agrees with the one of the collection."""
    from dml.encoder.agreement import measure_profiles
    from dml.encoder.quantise import quantise_encoder

    table = scratch / "measured.csv"
    table.write_text("path\n" + "".join(f"{file}\n" for file in files))
    tree = Encoder.load(place, device="cpu").manifest
    for name in profiles:
        profile = Profile.parse(name)
        try:
            if profile.precision == "int8" and "model.int8.onnx" not in tree["files"]:
                say("calibrating 8-bit integers")
                quantise_encoder(place, table)
            if why_not_comparable(tree, REFERENCE, profile) == "their agreement has not been measured":
                say(f"measuring how {name} agrees")
                measure_profiles(place, [REFERENCE, profile], table)
        except (EncoderError, MissingExtra) as error:
            say(f"{name}: {error}")


# Servers


def start_ours(
    stack: ExitStack, setting: Setting, profiles: Sequence[str], *, say: Say
) -> tuple[dict[str, Server], list[dict[str, str]]]:
    """Our service with each profile, and why it refused the others."""
    servers: dict[str, Server] = {}
    refused = []
    for profile in profiles:
        name = f"dml {profile}"
        try:
            with ours(setting, profile, name):
                pass  # its modules are compiled by now, as those of the endpoints will be by `best_competent`
            servers[name] = stack.enter_context(ours(setting, profile, name))
        except CannotStart as error:
            refused.append({"name": name, "problem": str(error)})
            say(f"{name} is left out: {error}")
    if not servers:
        raise CannotStart("None of the profiles can be served: " + refused[0]["problem"])
    return servers, refused


@contextmanager
def ours(setting: Setting, profile: str, name: str) -> Iterator[Server]:
    """`dml serve`, read-only, so that several may read one collection."""
    command = [sys.executable, "-c", "from dml.cli.main import main; main()", "serve"]
    command += [str(setting.folder / NAME), "--runtime", profile, "--read-only", "--port", "0"]
    with (
        TemporaryDirectory() as state,
        running(
            [*command, "--state", state],
            name=name,
            path=f"/v1/collections/{NAME}/search/image",
            upload=setting.uploads[0],
        ) as server,
    ):
        yield server


@contextmanager
def endpoint(setting: Setting, kind: str, options: Sequence[str], name: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "eval.speed.endpoints", kind, str(setting.folder), *options]
    with running(command, name=name, path="/search", upload=setting.uploads[0]) as server:
        yield server


@cache
def environment() -> Mapping[str, str]:
    """Of every server: a place for compiled modules as well, so that a later start need not make them."""
    folder = mkdtemp(prefix="dml-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": folder}


@contextmanager
def running(command: Sequence[str], *, name: str, path: str, upload: Path) -> Iterator[Server]:
    """A server that has answered once, until the block ends. Raises CannotStart, with what it wrote last."""
    with TemporaryDirectory() as scratch, (Path(scratch) / "errors").open("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        )
        try:
            line = process.stdout.readline() if process.stdout else ""
            address = re.search(r"at (http://\S+?)/", line)
            if address is None:
                process.wait(START_SECONDS)
                errors.seek(0)
                said = [text for text in errors.read().splitlines() if text.strip()]
                why = [text.removeprefix("error: ") for text in said if text.startswith("error: ")]
                raise CannotStart(" ".join(why or said[-3:]) or f"{name} ended with {process.returncode}")
            found = upload_all(address[1], path, [upload], clients=1)
            if found["errors"]:
                raise CannotStart(f"{name} answers with {found['errors']}")
            # The clients' own start is not the server's: their first answer tells what is to be counted.
            first = time.perf_counter() - started - found["overhead"]
            yield Server(name, process, address[1], path, first, has_torch(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


def best_competent(setting: Setting, *, seconds: float, say: Say) -> tuple[dict[str, float], list[str]]:
    """Answers/s of the competent endpoint by its threads, and the options of the best."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ways = {
        "as installed": [],
        f"1 thread, {cores} at a time": ["--threads", "1", "--pool", str(cores)],
        f"1 thread, {cores + 2} at a time": ["--threads", "1", "--pool", str(cores + 2)],
    }
    tried = {}
    for way, options in ways.items():
        with endpoint(setting, "competent", options, COMPETENT) as server:
            tried[way] = ask(server, setting.uploads, clients=TRIAL, seconds=seconds).rate
        say(f"{COMPETENT}, {way}: {tried[way]:.1f} answers/s")
    return tried, ways[max(tried, key=lambda way: tried[way])]


# Clients


def upload_all(
    address: str,
    path: str,
    files: Sequence[Path],
    *,
    clients: int,
    seconds: float = 0,
    keep: bool = False,
) -> dict[str, Any]:
    """Have a process of clients upload; what they found, see `eval.speed.uploads.Found`."""
    asked = {
        "address": address,
        "path": path,
        "files": [str(file) for file in files],
        "clients": clients,
        "seconds": seconds,
        "keep": keep,
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "eval.speed.uploads"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotStart(f"the clients failed: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    spent = time.perf_counter() - started
    return {**found, "overhead": spent - (max(found["ended"]) if found["ended"] else 0.0)}


def ask(server: Server, files: Sequence[Path], *, clients: int, seconds: float) -> Turn:
    """One turn of clients."""
    before = cpu_seconds(server.process.pid)
    found = upload_all(server.address, server.path, files, clients=clients, seconds=seconds)
    after = cpu_seconds(server.process.pid)
    times = found["seconds"] or [float("nan")]
    in_time = sum(ended <= seconds for ended in found["ended"])
    return Turn(
        rate=in_time / seconds,
        p50=float(np.percentile(times, 50)),
        p99=float(np.percentile(times, 99)),
        answers=len(found["seconds"]),
        errors=found["errors"],
        cpu=None if before is None or after is None else (after - before) / max(1, len(found["seconds"])),
    )


def take_turns(
    servers: Mapping[str, Server],
    setting: Setting,
    *,
    clients: Sequence[int],
    repeats: int,
    seconds: float,
    say: Say,
) -> dict[tuple[str, int], list[Turn]]:
    """Each repeat begins with another server."""
    names = list(servers)
    turns: dict[tuple[str, int], list[Turn]] = {(name, n): [] for name in names for n in clients}
    for server in servers.values():  # every size of a batch and every thread has been there once
        ask(server, setting.uploads, clients=TRIAL, seconds=min(seconds, 2.0))
    for repeat in range(repeats):
        for number in clients:
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                turn = ask(servers[name], setting.uploads, clients=number, seconds=seconds)
                turns[name, number].append(turn)
                say(f"{number} clients, {name}: {turn.rate:.1f} answers/s, p99 {1e3 * turn.p99:.0f} ms")
    return turns


def agreement(
    servers: Mapping[str, Server], setting: Setting, *, say: Say
) -> dict[str, tuple[float, float] | None]:
    """name -> (top-1 equal, overlap@10) with the naive endpoint."""
    found = {}
    for name, server in servers.items():
        say(f"comparing the answers of {name}")
        answers = upload_all(server.address, server.path, setting.uploads, clients=8, keep=True)
        found[name] = {int(number): hits for number, hits in answers["hits"].items()}
    return {name: compared(found[NAIVE], hits) for name, hits in found.items()}


def compared(
    truth: Mapping[int, Sequence[Sequence[Any]]], found: Mapping[int, Sequence[Sequence[Any]]]
) -> tuple[float, float] | None:
    """(top-1 equal, overlap@10) over all pictures that both answered; as near counts as the same."""
    numbers = sorted(truth.keys() & found.keys())
    if not numbers:
        return None
    first, shared = 0, 0.0
    for number in numbers:
        scores: dict[str, float] = {id: score for id, score in truth[number]}  # noqa: C416
        best = max(scores.values())
        first += scores.get(found[number][0][0], -2.0) >= best - TIE
        shared += len(scores.keys() & {id for id, _ in found[number]}) / len(scores)
    return first / len(numbers), shared / len(numbers)


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process so far; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_torch(pid: int) -> bool:
    """Whether torch's library is mapped by a process; False where the system does not tell."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Resident memory of a process, or its peak ("VmHWM"). 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


# Memory


def memory_of_service(
    *, rows: int = MEMORY_ROWS, dim: int = MEMORY_DIM, size: int = 224, seconds: float = 5, say: Say
) -> dict[str, Any]:
    """Resident memory of ours with so many vectors of a ResNet-18, at the start and after uploads."""
    from dml.config import ModelConfig
    from dml.data.demo import draw_demo
    from dml.encoder import create_encoder

    say(f"memory with {rows:,} vectors of {dim} numbers")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        encoder = create_encoder(ModelConfig(trunk="resnet18"), folder / "encoder", image_size=size, dim=dim)
        draw_demo(folder / "drawn", classes=18, images_per_class=2, size=400)
        uploads = sorted((folder / "drawn").rglob("*.jpg")) or sorted((folder / "drawn").rglob("*.png"))
        vectors = filled(encoder.embed_files(uploads).vectors, rows)
        (folder / "setting").mkdir()
        write_setting(folder / "setting", vectors, encoder)
        setting = Setting(folder / "setting", uploads, encoder.path, len(uploads), rows, False, "resnet18")
        with ours(setting, str(REFERENCE), "dml") as server:
            start = resident_bytes(server.process.pid)
            upload_all(server.address, server.path, uploads, clients=TRIAL, seconds=seconds)
            pid = server.process.pid
            return {
                "rows": rows,
                "dim": dim,
                "start": start,
                "after uploads": resident_bytes(pid),
                "peak": resident_bytes(pid, "VmHWM"),
                "torch": server.torch,
            }


# What came out


def about_server(server: Server, agreements: Mapping[str, tuple[float, float] | None]) -> dict[str, Any]:
    agreed = agreements[server.name]
    return {
        "name": server.name,
        "first answer": server.first_answer,
        "torch": server.torch,
        "resident": resident_bytes(server.process.pid),
        "top-1 equal": agreed and agreed[0],
        "overlap@10": agreed and agreed[1],
    }


def rows_of(turns: Mapping[tuple[str, int], Sequence[Turn]], clients: int) -> list[dict[str, Any]]:
    """Medians by server, with this many clients."""
    rows = []
    for (name, number), found in turns.items():
        if number == clients:
            rates = [turn.rate for turn in found]
            median = float(np.median(rates))
            costs = [turn.cpu for turn in found if turn.cpu is not None]
            rows.append(
                {
                    "name": name,
                    "answers/s": median,
                    "spread": (max(rates) - min(rates)) / median if median else None,
                    "p50": float(np.median([turn.p50 for turn in found])),
                    "p99": float(np.median([turn.p99 for turn in found])),
                    "cpu": float(np.median(costs)) if costs else None,
                    "answers": sum(turn.answers for turn in found),
                    "errors": sum(sum(turn.errors.values()) for turn in found),
                }
            )
    base = {row["name"]: row for row in rows}
    for row in rows:
        row["x naive"] = times(row["answers/s"], base[NAIVE]["answers/s"])
        row["x competent"] = times(row["answers/s"], base[COMPETENT]["answers/s"])
        row["p99 x naive"] = row["p99"] / base[NAIVE]["p99"]
    return rows


def times(one: float, other: float) -> float | None:
    """None where the other answered nothing in time."""
    return one / other if other else None


def goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is promised, and what was measured for the quickest profile that gives the same answers."""
    same = [
        server
        for server in found["servers"]
        if server["name"].startswith("dml ")
        and (server["top-1 equal"] or 0) >= 0.99
        and (server["overlap@10"] or 0) >= 0.98
    ]
    at = {group["clients"]: {row["name"]: row for row in group["rows"]} for group in found["clients"]}
    if not same or TRIAL not in at:
        return []
    best = max(same, key=lambda server: at[TRIAL][server["name"]]["answers/s"])
    row = at[TRIAL][best["name"]]
    errors = sum(group[best["name"]]["errors"] for group in at.values())
    listed = [
        ("answers/s of the naive endpoint, 32 clients", row["x naive"], 6.0, ">="),
        ("answers/s of the competent endpoint, 32 clients", row["x competent"], 2.5, ">="),
        ("p99 of the naive endpoint, 32 clients", row["p99 x naive"], 0.25, "<="),
        ("errors", errors, 0, "<="),
        ("seconds to the first answer", best["first answer"], 3.0, "<="),
    ]
    if 1 in at:
        listed.insert(
            3, ("answers/s of the naive endpoint, 1 client", at[1][best["name"]]["x naive"], 1.0, ">=")
        )
    return [
        {
            "server": best["name"],
            "goal": name,
            "measured": value,
            "wanted": f"{sign} {wanted:g}",
            "reached": value is not None and (value >= wanted if sign == ">=" else value <= wanted),
        }
        for name, value, wanted, sign in listed
    ]


def shown(value: float | None) -> str:
    return "nothing to compare with" if value is None else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    return race.milliseconds(1e3 * seconds)


def print_service(result: Mapping[str, Any]) -> str:
    """The tables as text."""
    weights = "trained" if result["trained"] else "random weights"
    lines = [
        race.heading(result["machine"], result["repeats"]) + f" of {result['seconds']:g} s",
        f"\n{result['uploads']:,} photos ({result['data']}) uploaded again and again, {result['trunk']} at "
        f"{result['size']} px, {weights}, {result['rows']:,} vectors ({result['pictures']:,} of pictures)",
    ]
    columns = {
        "answers/s": race.ratio,
        "x naive": race.ratio,
        "x competent": race.ratio,
        "spread": race.share,
    }
    columns |= {"p50": milliseconds, "p99": milliseconds, "p99 x naive": race.ratio, "cpu": milliseconds}
    for group in result["clients"]:
        lines.append(f"\n{group['clients']} clients")
        lines += race.lines_of(group["rows"], {**columns, "errors": str})
    servers = {"top-1 equal": lambda v: f"{v:.1%}", "overlap@10": lambda v: f"{v:.4f}"}
    servers |= {"first answer": lambda v: f"{v:.2f} s", "torch": lambda v: "yes" if v else "no"}
    lines += [
        "",
        *race.lines_of([*result["servers"], *result["refused"]], {**servers, "resident": race.megabytes}),
    ]
    if "memory" in result:
        found = result["memory"]
        start, after, peak = (race.megabytes(found[name]) for name in ("start", "after uploads", "peak"))
        lines.append(
            f"\n{found['rows']:,} vectors of {found['dim']}: {start} MB resident at the start, {after} MB "
            f"after uploads (peak {peak} MB)"
        )
    lines += [
        "",
        *(
            f"{'reached' if one['reached'] else 'MISSED '}  {one['goal']}: {shown(one['measured'])}, wanted "
            f"{one['wanted']}"
            for one in result["goals"]
        ),
    ]
    tried = ", ".join(f"{way}: {rate:.1f}" for way, rate in result["competent tried"].items())
    return "\n".join(
        [
            *lines,
            f"The competent endpoint had the best of: {tried} answers/s.\n"
            "p50, p99: milliseconds. cpu: milliseconds of processor time of the server for an answer.\n"
            "top-1 equal, overlap@10: with the answers of the naive endpoint. resident: MB.",
        ]
    )
