"""`dml encoder …`: make, export and check encoders; `dml embed`: turn pictures into vectors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dml.cli.shown import group

if TYPE_CHECKING:
    from rich.progress import Progress

    from dml.encoder import Encoder, EncoderReport, ProfileAgreement

Choice = TypeVar("Choice", bound=str)

app = group("Make, export and check encoders.")

Source = Annotated[Path, typer.Argument(metavar="ENCODER", help="Encoder folder, run or collection.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command()
def create(
    out: Annotated[Path, typer.Option(help="The encoder's folder.")],
    trunk: Annotated[str, typer.Option(help='A timm model by its name, or "tiny".')] = "resnet50",
    weights: Annotated[
        str,
        typer.Option(metavar="FILE|pretrained|none", help="safetensors file, timm's own, or random ones."),
    ] = "pretrained",
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Side in pixels. Default: what the weights were made for.")
    ] = None,
    fit: Annotated[str, typer.Option(help="How a picture becomes square: crop, pad or squash.")] = "crop",
    dim: Annotated[
        int | None, typer.Option(min=2, help="Project to this many dimensions. Default: the trunk's own.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="avg, max, avg+max or gem.")] = "avg",
    seed: Annotated[int, typer.Option(help="Of random weights and of the projection.")] = 0,
    format: Annotated[
        str, typer.Option(help="onnx: weights and ONNX. safetensors: weights only, needs torch.")
    ] = "onnx",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the encoder that --out holds, if it holds one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an encoder without training, so that any folder of pictures becomes searchable.

    \b
    dml encoder create --trunk resnet50 --weights pretrained --out encoders/resnet50
    """
    from typing import get_args, get_type_hints

    from dml.config import ModelConfig
    from dml.encoder import create_encoder
    from dml.encoder.manifest import MANIFEST
    from dml.encoder.preprocess import Fit
    from dml.errors import UsageError

    if (out / MANIFEST).exists() and not overwrite:
        raise UsageError(
            f"{out} holds an encoder already. Name another folder, or replace it with --overwrite."
        )
    config = ModelConfig(
        trunk=trunk,
        pretrained=weights == "pretrained",
        weights="" if weights in ("pretrained", "none") else weights,
        pooling=one_of("--pooling", pooling, get_args(get_type_hints(ModelConfig)["pooling"])),
    )
    encoder = create_encoder(
        config,
        out,
        image_size=image_size,
        fit=one_of("--fit", fit, get_args(Fit)),
        dim=dim,
        seed=seed,
        onnx=one_of("--format", format, ("onnx", "safetensors")) == "onnx",
    )
    if weights == "none":
        typer.echo("Its weights are random: fine for trying things out, not for finding anything.", err=True)
    show_encoder(encoder, as_json=as_json)


@app.command()
def export(
    encoder: Source,
    format: Annotated[
        str, typer.Option(help="onnx: weights and ONNX. safetensors: weights only, needs torch.")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(help="A new folder. Default: in place.")] = None,
    as_json: Json = False,
) -> None:
    """Write an encoder again from its weights, and check that ONNX Runtime and torch agree.

    \b
    dml encoder export runs/shoes --out shoes.encoder
    """
    from dml.encoder import export_encoder

    onnx = one_of("--format", format, ("onnx", "safetensors")) == "onnx"
    show_encoder(export_encoder(encoder, out, onnx=onnx), as_json=as_json)


@app.command()
def check(
    encoder: Source,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure whether this profile agrees with the others given (one alone: with "
            "pillow/onnx-f32), and store it."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|MANIFEST", help="Pictures to measure on: 1,000 or more of yours."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use. Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Check an encoder's files, and run it with every runtime that is installed.

    \b
    dml encoder check runs/shoes
    dml encoder check runs/shoes --profile fused/openvino-bf16 --data photos/
    """
    from dml.encoder import check_encoder
    from dml.errors import EncoderError, UsageError

    if bool(profile) != bool(data):
        raise UsageError("To measure profiles give both: --profile NAME and --data FOLDER.")
    measured = measure(encoder, profile, data, threads) if profile and data else []
    report = check_encoder(encoder)
    show_report(report, as_json=as_json)
    if not report.ok:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise EncoderError(f"{report.folder} has {count}:\n" + "\n".join(report.problems))
    require_all(measured)


@app.command()
def quantize(
    encoder: Source,
    data: Annotated[
        str, typer.Option(metavar="FOLDER|MANIFEST", help="Pictures like those that will be embedded.")
    ],
    pictures: Annotated[int, typer.Option(min=8, help="How many of them to calibrate on.")] = 256,
) -> None:
    """Add the model in 8-bit integers, for the profiles pillow/openvino-int8 and fused/openvino-int8.

    \b
    dml encoder quantize runs/shoes --data photos/
    """
    from dml.encoder.quantise import quantise_encoder

    made = quantise_encoder(encoder, data, pictures=pictures)
    typer.echo(
        f"{made}: {made.stat().st_size / 1e6:,.1f} MB. Measure how near it is: "
        f"dml encoder check {encoder} --profile fused/openvino-int8 --data {data}"
    )


def measure(encoder: Path, names: Sequence[str], data: str, threads: int | None) -> "list[ProfileAgreement]":
    """Measure and store the agreement of every pair of these profiles, or of one with the reference."""
    from dml.encoder.agreement import measure_profiles
    from dml.encoder.profiles import REFERENCE, Profile
    from dml.errors import UsageError

    profiles = [Profile.parse(name) for name in dict.fromkeys(names)]
    if len(profiles) == 1:
        profiles = [REFERENCE, *profiles]
    if len(set(profiles)) < 2:
        raise UsageError(f"{REFERENCE} is what others are compared with; give another --profile.")
    with progress_bar() as bar:
        tasks = {str(profile): bar.add_task(str(profile), total=None) for profile in profiles}
        return measure_profiles(
            encoder,
            profiles,
            data,
            threads=threads,
            on_progress=lambda name, done, total: bar.update(tasks[name], completed=done, total=total),
        )


def require_all(measured: "Sequence[ProfileAgreement]") -> None:
    """Raises GateNotMet when a pair was measured that may not be mixed."""
    from dml.errors import GateNotMet

    failed = [f"{' and '.join(one.profiles)}: {one.problem}" for one in measured if one.problem]
    if failed:
        raise GateNotMet("Vectors of these profiles are not to be compared:\n" + "\n".join(failed))


def embed(
    encoder: Source,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or manifest of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the vectors.")],
    format: Annotated[
        str, typer.Option(help="npy: vectors.npy and items.csv. parquet: items.parquet.")
    ] = "npy",
    batch: Annotated[int, typer.Option(min=1, help="Pictures embedded at once.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that decode, and on a CPU embed. Default: one per core."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what is at --out, or start anew.")] = True,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable pictures that is still accepted.")
    ] = 0.05,
    runtime: Annotated[str, typer.Option(help="auto, onnx, openvino or torch.")] = "auto",
    profile: Annotated[
        str | None,
        typer.Option(help="Decoder, runtime and precision, as fused/openvino-bf16. Default: pillow, f32."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the encoder on a CPU. Default: all cores.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a folder of pictures into vectors with ids; the same command goes on after an interruption.

    \b
    dml embed runs/shoes photos/ --out vectors
    """
    from dml.data.table import open_table
    from dml.encoder import Encoder
    from dml.encoder.embeddings import embed_table

    stored_as = one_of("--format", format, ("npy", "parquet"))
    table = open_table(path)
    loaded = Encoder.load(encoder, runtime=runtime, device=device, threads=threads, profile=profile)
    typer.echo(f"{table.describe()}\n{loaded}", err=True)
    with progress_bar() as bar:
        task = bar.add_task("embedding", total=len(table.records))
        result = embed_table(
            loaded,
            table,
            out,
            format=stored_as,
            batch_size=batch,
            workers=workers,
            resume=resume,
            max_bad_share=max_bad_share,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    for one in result.bad:
        typer.echo(f"skipped: {one.reason}", err=True)
    summary = {
        "out": str(out),
        "vectors": len(result),
        "dim": loaded.dim,
        "bad": len(result.bad),
        "fingerprint": result.fingerprint,
        "files": sorted(p.name for p in out.iterdir()),
    }
    if as_json:
        import json

        typer.echo(json.dumps(summary))
        return
    typer.echo(f"{len(result):,} vectors of {loaded.dim} dimensions in {out} ({', '.join(summary['files'])})")
    if result.bad:
        typer.echo(f"{len(result.bad):,} pictures could not be read: {out / 'bad_images.csv'}")


def one_of(option: str, value: str, allowed: Sequence[Choice]) -> Choice:
    """`value` as one of the allowed ones. Raises UsageError."""
    from dml.errors import UsageError

    for choice in allowed:
        if choice == value:
            return choice
    raise UsageError(f'{option} is one of {", ".join(allowed)}; got "{value}"')


def progress_bar() -> "Progress":
    """On stderr, with the time that is left; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def show_encoder(encoder: "Encoder", *, as_json: bool) -> None:
    """What was made, in a few lines or as JSON."""
    agreement = encoder.manifest.get("agreement")
    if as_json:
        import json

        shown = {"path": str(encoder.path), "fingerprint": encoder.fingerprint, "dim": encoder.dim}
        typer.echo(json.dumps({**shown, "agreement": agreement, "preprocess": encoder.preprocess.as_json()}))
        return
    how = encoder.preprocess
    typer.echo(f"{encoder.path}: {how.size} x {how.size} px ({how.fit}) to {encoder.dim} dimensions")
    typer.echo(f"fingerprint {encoder.fingerprint}")
    typer.echo(in_words(agreement) if agreement else "weights only: it runs with torch")


def in_words(agreement: Mapping[str, float]) -> str:
    """How well the runtimes agree."""
    return (
        f"ONNX Runtime and torch agree on {agreement['pictures']} pictures: lowest cosine "
        f"{agreement['min_cosine']:.7f}, largest difference {agreement['max_abs_difference']:.1e}"
    )


def show_report(report: "EncoderReport", *, as_json: bool) -> None:
    """What `dml encoder check` found, in a few lines or as JSON."""
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps({**asdict(report), "folder": str(report.folder), "ok": report.ok}))
        return
    typer.echo(f"{report.folder}: {report.trunk}, {report.image_size} px to {report.dim} dimensions")
    typer.echo(f"fingerprint {report.fingerprint}")
    for kind, states in (("file", report.files), ("runtime", report.runtimes)):
        for name, state in states.items():
            typer.echo(f"{kind} {name}: {state}")
    if report.measured:
        typer.echo(in_words(report.measured))
    for pair in report.profiles:
        verdict = f"not to be mixed: {pair.problem}" if pair.problem else "may be mixed"
        typer.echo(
            f"profiles {' and '.join(pair.profiles)}: nearest equal {pair.top1_equal:.2%}, overlap@10 "
            f"{pair.overlap_at_10:.4f}, cosine {pair.cosine_p1:.5f} at the 1st percentile, "
            f"{pair.queries:,} pictures of {pair.data}; {verdict}"
        )
