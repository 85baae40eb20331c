"""How fast, against whom: side by side in one run, on this machine.

    python -m eval.speed losses --batch 256 1024 4096 --threads 2 --out losses.json
    python -m eval.speed bank --rows 65536 262144 --batch 1024
    python -m eval.speed bank --rows 0 --batch 65536
    python -m eval.speed statistics
    python -m eval.speed metrics --rows 10000 60000 --per-class 20 600
    python -m eval.speed memory --rows 120000 --limit-gib 2
    python -m eval.speed ingest --data photos/ --threads 4
    python -m eval.speed search --rows 100000 --dim 128 --threads 1
    python -m eval.speed embeddings --data photos/ --encoder RUN --rows 1000000 --vectors photos.npy
    python -m eval.speed search --rows 1000000 --vectors photos.npy --threads 2
    python -m eval.speed filters --rows 100000 --dim 128 --kinds hnsw ivf
    python -m eval.speed service --data photos/ --encoder runs/shoes --memory

Every contender gets the same inputs and threads and must compute the same; repeats alternate between the
contenders, so that a busy neighbour slows all of them; what counts are medians and ratios inside one run.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dml.errors import DmlError, UsageError
from eval.speed import race

TABLES = ("losses", "bank", "statistics", "metrics", "memory", "ingest", "filters", "search", "embeddings")
TABLES = (*TABLES, "service")
FILES = ("--vectors", "--data", "--encoder", "--autofaiss")
LEFT_OUT = ("--out", "--keep")
REPEATS = {"losses": 7, "bank": 3, "statistics": 5, "metrics": 5, "memory": 1, "ingest": 3} | {
    "filters": 200,
    "search": 7,
    "embeddings": 1,
    "service": 3,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON; return the exit code."""
    args = parser().parse_args(arguments)
    if args.threads:
        race.limit_threads(args.threads)
    args.repeats = args.repeats or REPEATS[args.what]
    try:
        result = RUN[args.what](args)
    except DmlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(PRINT[args.what](result))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"table": args.what, "command": command_of(sys.argv[1:] if arguments is None else arguments)}
        args.out.write_text(json.dumps({**about, **result}, indent=1))
    return 0


def command_of(arguments: Sequence[str]) -> str:
    """The command line as others would write it: without where its results went, and files by their names."""
    shown: list[str] = []
    option = ""
    for word in (part for given in arguments for part in split_option(given)):
        if word.startswith("--"):
            option = word
        if option not in LEFT_OUT:
            shown.append(Path(word).name if option in FILES and word != option else word)
    return shlex.join(["python", "-m", "eval.speed", *shown])


def split_option(word: str) -> list[str]:
    """ "--name=value" as two words."""
    return word.split("=", 1) if word.startswith("--") else [word]


def parser() -> argparse.ArgumentParser:
    usage = argparse.ArgumentParser(
        prog="python -m eval.speed", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    usage.add_argument("what", choices=TABLES)
    usage.add_argument("--batch", type=int, nargs="+", help="losses, bank: anchors (several for losses)")
    usage.add_argument("--rows", type=int, nargs="+", help="vectors; bank: remembered, 0: the batch itself")
    usage.add_argument("--dim", type=int, default=512)
    usage.add_argument(
        "--per-class", type=int, nargs="+", default=[20], help="metrics: vectors of a class on average"
    )
    usage.add_argument("--classes", type=int, default=100, help="statistics: number of classes")
    usage.add_argument("--repeats", type=int, default=0, help="turns of every contender; 0: the table's own")
    usage.add_argument("--threads", type=int, default=0, help="of every contender; 0: their own choice")
    usage.add_argument("--only", nargs="+", default=[], help="losses, bank, search: parts of names")
    usage.add_argument("--loop", action="store_true", help="losses, metrics: also plain loops, for context")
    usage.add_argument("--compile", action="store_true", help="losses: also torch.compile of the plain form")
    usage.add_argument("--trunk", help="statistics: whose training step; ingest: of an untrained encoder")
    usage.add_argument("--pictures", type=int, default=16, help="statistics: pictures in the step")
    usage.add_argument("--size", type=int, default=224, help="statistics, ingest: their side in pixels")
    usage.add_argument("--limit-gib", type=float, help="memory: of the process; else what a call may take")
    usage.add_argument(
        "--data", help="ingest, embeddings, service: folder or manifest of photos; else some are drawn"
    )
    usage.add_argument("--encoder", type=Path, help="ingest, embeddings, service: a trained encoder or run")
    usage.add_argument("--images", type=int, default=0, help="ingest, service: files; 0: the table's own")
    usage.add_argument("--kinds", nargs="+", default=["hnsw", "ivf"], help="filters: kinds of index")
    usage.add_argument(
        "--vectors",
        type=Path,
        help="filters, search: (N, D) unit vectors in a .npy file; embeddings: the file to write",
    )
    usage.add_argument(
        "--targets", type=float, nargs="+", default=[0.95, 0.99], help="search: recall@10 to be reached"
    )
    usage.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128], help="service: at a time")
    usage.add_argument("--seconds", type=float, default=6, help="service: of a turn")
    usage.add_argument("--profiles", nargs="+", help="service: DECODER/RUNTIME-PRECISION of ours")
    usage.add_argument("--memory", action="store_true", help="service: also with 100,000 vectors of 128")
    usage.add_argument("--autofaiss", type=Path, help="search: a Python interpreter that has autofaiss")
    usage.add_argument("--keep", type=Path, help="search: folder for built indexes, used again by later runs")
    usage.add_argument("--patience", type=float, default=120, help="seconds a first call may take")
    usage.add_argument("--out", type=Path, help="JSON file")
    return usage


def say(line: str) -> None:
    """What is being measured, on the error stream: the table may go to a file."""
    print(f"… {line}", file=sys.stderr, flush=True)


def losses(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.losses import speed_of_losses

    return speed_of_losses(
        batches=args.batch or [256, 1024, 4096],
        dim=args.dim,
        repeats=args.repeats,
        loop=args.loop,
        compile_too=args.compile,
        only=args.only,
        patience=args.patience,
        memory_limit=args.limit_gib or 8,
        say=say,
    )


def bank(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.bank import speed_of_bank

    return speed_of_bank(
        batch=(args.batch or [1024])[0],
        rows=[65_536] if args.rows is None else args.rows,
        dim=args.dim,
        repeats=args.repeats,
        patience=args.patience,
        memory_limit=args.limit_gib or 8,
        only=args.only,
        say=say,
    )


def class_statistics(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.class_statistics import speed_of_statistics

    return speed_of_statistics(
        rows=(args.rows or [1024])[0],
        classes=args.classes,
        dim=args.dim,
        repeats=args.repeats,
        trunk=args.trunk or "resnet50",
        pictures=args.pictures,
        size=args.size,
        patience=args.patience,
        memory_limit=args.limit_gib or 8,
        say=say,
    )


def metrics(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.metrics import speed_of_metrics

    return speed_of_metrics(
        rows=args.rows or [10_000],
        dim=args.dim,
        per_class=args.per_class,
        repeats=args.repeats,
        reference=args.loop,
        say=say,
    )


def memory(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.metrics import memory_of_metrics

    rows, limit = (args.rows or [120_000])[0], args.limit_gib or 2.0
    return memory_of_metrics(rows, dim=args.dim, per_class=args.per_class[0], limit=limit)


RACED: Mapping[str, Callable[[Any], str]] = {
    "ms": race.milliseconds,
    "spread": race.share,
    "x limit": race.ratio,
    "x dml": race.ratio,
    "extra MB": race.megabytes,
    "value ±": race.difference,
    "gradient ±": race.difference,
}


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as tables print it: milliseconds, and short names."""
    return {
        **row,
        "ms": row["seconds"] * 1e3 if "seconds" in row else None,
        "extra MB": row.get("extra bytes"),
        "value ±": row.get("value differs"),
        "gradient ±": row.get("gradient differs", row.get("differs")),
    }


def ingest(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.ingest import speed_of_ingest

    return speed_of_ingest(
        data=args.data,
        encoder=args.encoder,
        pictures=args.images or 1000,
        repeats=args.repeats,
        threads=args.threads or None,
        trunk=args.trunk or "resnet18",
        size=args.size,
        say=say,
    )


def print_ingest(result: Mapping[str, Any]) -> str:
    from eval.speed import ingest

    return ingest.print_ingest(result)


def search(args: argparse.Namespace) -> dict[str, Any]:
    from dml.startup import prepare_process

    prepare_process()  # before faiss is loaded
    from eval.speed.search import speed_of_search

    return speed_of_search(
        rows=(args.rows or [100_000])[0],
        dim=args.dim,
        vectors=args.vectors,
        targets=args.targets,
        repeats=args.repeats,
        threads=args.threads or 1,
        only=args.only,
        say=say,
        autofaiss=args.autofaiss,
        keep_in=args.keep,
    )


def print_search(result: Mapping[str, Any]) -> str:
    from eval.speed import search

    return search.print_search(result)


def embeddings(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.embeddings import make_embeddings

    if args.data is None or args.encoder is None or args.vectors is None:
        raise UsageError("embeddings needs --data PICTURES, --encoder ENCODER and --vectors FILE.npy")
    return make_embeddings(
        data=args.data,
        encoder=args.encoder,
        rows=(args.rows or [100_000])[0],
        out=args.vectors,
        threads=args.threads or None,
        say=say,
    )


def print_embeddings(result: Mapping[str, Any]) -> str:
    from eval.speed import embeddings

    return embeddings.print_embeddings(result)


def filters(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.filters import speed_of_filters

    return speed_of_filters(
        rows=(args.rows or [100_000])[0],
        dim=args.dim,
        kinds=args.kinds,
        queries=args.repeats,
        vectors=args.vectors,
        say=say,
    )


def print_filters(result: Mapping[str, Any]) -> str:
    from eval.speed import filters

    return filters.print_filters(result)


def service(args: argparse.Namespace) -> dict[str, Any]:
    from eval.speed.service import PROFILES, speed_of_service

    return speed_of_service(
        data=args.data,
        encoder=args.encoder,
        profiles=args.profiles or PROFILES,
        clients=args.clients,
        images=args.images or 2000,
        rows=(args.rows or [20_000])[0],
        repeats=args.repeats,
        seconds=args.seconds,
        trunk=args.trunk or "resnet18",
        size=args.size,
        memory=args.memory,
        say=say,
    )


def print_service(result: Mapping[str, Any]) -> str:
    from eval.speed import service

    return service.print_service(result)


def print_losses(result: Mapping[str, Any]) -> str:
    lines = [race.heading(result["machine"], result["repeats"])]
    for group in result["groups"]:
        lines.append(
            f"\n{group['definition']}: {group['batch']:,} anchors x {group['candidates']:,} candidates, "
            f"{group['dim']} numbers each"
        )
        lines += race.lines_of([shown(row) for row in group["rows"]], RACED)
        lines += [
            f"{row['name']}: compiled in {row['compile seconds']:.0f} s"
            for row in group["rows"]
            if "compile seconds" in row
        ]
    return "\n".join([*lines, "", MEMORY_NOTE])


def print_bank(result: Mapping[str, Any]) -> str:
    lines = [race.heading(result["machine"], result["repeats"])]
    columns = {name: write for name, write in RACED.items() if name != "value ±"}
    for size in result["sizes"]:
        lines.append(f"\n{size['batch']:,} anchors x {size['rows'] or size['batch']:,} candidates")
        lines += race.lines_of(
            [shown(row) for row in size["rows of table"]], columns | {"memory x dml": race.ratio}
        )
    return "\n".join([*lines, "", MEMORY_NOTE])


def print_statistics(result: Mapping[str, Any]) -> str:
    step = result["step"]
    columns = {name: write for name, write in RACED.items() if name not in ("x limit", "value ±")}
    seconds = step["seconds"]
    return "\n".join(
        [
            race.heading(result["machine"], result["repeats"]),
            f"\nclass statistics: {result['rows']:,} rows, {result['classes']:,} classes, {result['dim']} "
            f"numbers each",
            *race.lines_of([shown(row) for row in result["table"]], columns),
            f"\n{step['trunk']}, {step['pictures']} pictures of {step['size']} px: "
            f"{seconds['step'] * 1e3:,.0f} ms a step, its loss {seconds['loss'] * 1e3:.2f} ms alone and "
            f"{seconds['loss with IAA'] * 1e3:.2f} ms with IAA: {step['share']:.2%} of the step",
            f"the pass that renews the statistics every {step['refresh_every']} epochs: "
            f"{seconds['pass'] * 1e3:,.0f} ms a batch, {step['pass share']:.0%} of the training time",
            MEMORY_NOTE,
        ]
    )


def print_metrics(result: Mapping[str, Any]) -> str:
    lines = [race.heading(result["machine"], result["repeats"])]
    for size in result["sizes"]:
        lines.append(f"\nmetrics, {size['rows']:,} x {size['dim']}, {size['classes']:,} classes")
        columns = {"ms": race.milliseconds, "spread": race.share, "x limit": race.ratio, "x dml": race.ratio}
        lines += race.lines_of([shown(row) for row in size["contenders"]], columns)
        lines.append(f"largest difference of a figure: {size['agreement']:.1e}")
    return "\n".join(lines)


MEMORY_NOTE = (
    "extra MB: largest resident size of a process of its own (VmHWM) during the first call, less what was in "
    "use before it.\n± : largest difference from dml, relative to the largest entry."
)
RUN: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "losses": losses,
    "bank": bank,
    "statistics": class_statistics,
    "metrics": metrics,
    "memory": memory,
    "ingest": ingest,
    "filters": filters,
    "search": search,
    "embeddings": embeddings,
    "service": service,
}
PRINT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "losses": print_losses,
    "bank": print_bank,
    "statistics": print_statistics,
    "metrics": print_metrics,
    "memory": lambda result: json.dumps(result, indent=1),
    "ingest": print_ingest,
    "filters": print_filters,
    "search": print_search,
    "embeddings": print_embeddings,
    "service": print_service,
}

if __name__ == "__main__":
    sys.exit(main())
