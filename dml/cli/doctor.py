"""`dml doctor`: what is installed, what the machine has, what is missing and how to get it."""

from typing import Annotated, Any

import typer

PARTS = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "pytorch-metric-learning": "train",
    "onnxruntime": "",
    "faiss-cpu": "cpu",
    "faiss-gpu": "gpu",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pymilvus": "milvus",
    "openvino": "openvino",
}
"""package -> the extra that brings it."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Say what is installed here and what is missing."""
    report = examine()
    if as_json:
        import json

        typer.echo(json.dumps(report, indent=1))
        return
    for name, value in report["machine"].items():
        typer.echo(f"{name:<24} {value}")
    for name, version in report["packages"].items():
        hint = "" if version else f'missing: pip install "dml[{PARTS[name]}]"'
        typer.echo(f"{name:<24} {version or hint}")


def examine() -> dict[str, Any]:
    """Everything that `dml doctor` shows."""
    import os
    import platform
    import shutil
    from importlib import metadata

    from dml import __version__

    packages = {}
    for name in PARTS:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    gpus: str = "unknown (torch is not installed)"
    if packages["torch"]:
        import torch

        found = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        gpus = ", ".join(found) or "none"
    if packages["faiss-cpu"] or packages["faiss-gpu"]:
        import faiss

        devices = faiss.get_num_gpus() if packages["faiss-gpu"] else 0
        build = f"{faiss.get_compile_options().strip()}; {devices} GPUs"
    else:
        build = "not installed"
    free = shutil.disk_usage(".").free / 1e9
    machine = {
        "dml": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "GPU": gpus,
        "faiss": build,
        "free disk here": f"{free:.0f} GB",
    }
    return {"machine": machine, "packages": packages}
