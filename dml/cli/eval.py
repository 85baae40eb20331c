"""`dml eval`: figures of an encoder on pictures that it was not trained on, a report, and a gate for CI."""

from pathlib import Path
from typing import Annotated

import typer


def eval(
    run: Annotated[Path, typer.Argument(metavar="RUN|ENCODER", help="A run, or an encoder folder.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder, manifest or data set; else the run's.")
    ] = "",
    k: Annotated[str, typer.Option("--k", help="K of Recall@K, with commas.")] = "1,2,4,8",
    split: Annotated[str, typer.Option(help="test, validation or all.")] = "test",
    collection: Annotated[
        Path | None, typer.Option(help="Also search this collection, exactly and through its index.")
    ] = None,
    url: Annotated[
        str, typer.Option(help="Also ask the service at this address; it serves --collection.")
    ] = "",
    report: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="Fail (exit 4) below a figure: recall@1=0.9, map@r=0.5; may be repeated."),
    ] = None,
    runtime: Annotated[str, typer.Option(help="auto, onnx or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Pictures embedded at once.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 2,
    with_nmi: Annotated[bool, typer.Option("--nmi/--no-nmi", help="Also cluster the queries.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure an encoder: Recall@K, MAP@R, R-Precision, with intervals.

    \b
    dml eval runs/cub --report report.html
    dml eval runs/cub photos/ --k 1,10,100
    dml eval runs/cub --collection shop --url http://127.0.0.1:8000 --gate recall@1=0.9
    """
    from dataclasses import replace

    from eval.gate import check_gates, read_gates, read_ks

    ks, gates = read_ks(k), read_gates(gate or [])  # before anything that takes time
    if url and collection is None:
        from dml.errors import UsageError

        raise UsageError("--url asks a service about a collection: give it with --collection too")
    from dml.encoder import Encoder, find_encoder
    from eval.evaluate import choose, evaluate, measured_run
    from eval.show import print_json, print_tables, progress_on_stderr

    find_encoder(run)  # a folder that is none is said to be so, before anything about its data
    run, notes = (run, ()) if data else measured_run(run)
    selection = choose(run, data, split=split)
    selection = replace(selection, notes=(*notes, *selection.notes))
    encoder = Encoder.load(find_encoder(run), runtime=runtime, device=device)
    with progress_on_stderr() as progress:
        evaluation = evaluate(
            encoder, selection, ks=ks, with_nmi=with_nmi, batch_size=batch, workers=workers, progress=progress
        )
    stages = None
    if collection is not None:
        from dml.collection import open_collection
        from eval.served import compare_stages

        opened = open_collection(collection, read_only=True, fingerprint=encoder.fingerprint)
        try:
            stages = compare_stages(
                evaluation.query, evaluation.query_vectors, opened, url=url or None, ks=ks
            )
        finally:
            opened.close()
    if report is not None:
        from eval.report import write_report

        write_report(evaluation, report, run=run if (run / "recipe.toml").is_file() else None, stages=stages)
    (print_json if as_json else print_tables)(evaluation, stages, report)
    check_gates(gates, evaluation)
