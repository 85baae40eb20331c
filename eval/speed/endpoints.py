"""What `dml serve` is raced against: two search endpoints as people write them, each a process of its own.

    python -m eval.speed.endpoints {competent,naive} FOLDER --threads N

FOLDER holds what both sides know: model.onnx, vectors.npy (N, D), ids.json and preprocess.json. Both decode
with Pillow, cut and resize in one call (the quickest way that it has), run ONNX Runtime in float32 and search
`faiss.IndexFlatIP`; uvicorn brings uvloop and httptools. The naive one does all of it inside `async def`. The
competent one leaves the event loop to the server and works in FastAPI's thread pool. It shares no code with
dml. It prints its address when it listens.
"""

import argparse
import asyncio
import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HITS = 10


class Work:
    """From the bytes of a picture to its neighbours.

    Args:
        folder: see the head of this file.
        threads: of ONNX Runtime for one picture, and of faiss; 0: their own choice.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        import faiss
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if threads:
            faiss.omp_set_num_threads(threads)
        model = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        vectors = np.load(folder / "vectors.npy")
        self.index: Any = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)
        self.ids = json.loads((folder / "ids.json").read_text())
        about = json.loads((folder / "preprocess.json").read_text())
        self.size, self.fit, self.margin = about["size"], about["fit"], about["margin"]
        self.filter = about["interpolation"].upper()
        self.mean = np.array(about["mean"], np.float32)[:, None, None]
        self.std = np.array(about["std"], np.float32)[:, None, None]

    def pixels(self, data: bytes) -> NDArray[np.float32]:
        """(3, S, S) of the central square, or of everything squashed."""
        from PIL import Image, ImageOps

        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        width, height = picture.width / self.margin, picture.height / self.margin
        if self.fit == "crop":
            width = height = min(width, height)
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        small = picture.resize(
            (self.size, self.size),
            Image.Resampling[self.filter],
            box=(left, top, left + width, top + height),
            reducing_gap=3.0,
        )
        array = np.asarray(small, np.float32).transpose(2, 0, 1) / 255
        return ((array - self.mean) / self.std).astype(np.float32, copy=False)

    def search(self, data: bytes) -> dict[str, Any]:
        """The answer."""
        vectors = self.session.run(None, {self.input: self.pixels(data)[None]})[0]
        scores, rows = self.index.search(np.ascontiguousarray(vectors, np.float32), HITS)
        pairs = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        return {"hits": [{"id": self.ids[row], "score": score} for row, score in pairs if row >= 0]}


def application(work: Work, kind: str) -> Any:
    """The endpoint, as its kind is written."""
    from fastapi import FastAPI, UploadFile

    app = FastAPI()

    if kind == "naive":

        @app.post("/search")
        async def naive(file: UploadFile) -> dict[str, Any]:
            return work.search(await file.read())

    else:

        @app.post("/search")
        def competent(file: UploadFile) -> dict[str, Any]:
            return work.search(file.file.read())

    return app


def serve(app: Any, *, pool: int, announce: Callable[[str], None]) -> None:
    """Serve on a free port until SIGTERM. `pool`: threads of FastAPI's pool; 0: its own number."""
    import uvicorn
    from anyio import to_thread

    async def run(server: Any, listening: socket.socket) -> None:
        if pool:
            to_thread.current_default_thread_limiter().total_tokens = pool
        await server.serve(sockets=[listening])

    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        announce(f"at http://127.0.0.1:{listening.getsockname()[1]}/")
        factory = server.config.get_loop_factory() if hasattr(server.config, "get_loop_factory") else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(run(server, listening))


def main() -> None:
    usage = argparse.ArgumentParser(prog="python -m eval.speed.endpoints")
    usage.add_argument("kind", choices=("competent", "naive"))
    usage.add_argument("folder", type=Path)
    usage.add_argument("--threads", type=int, default=0, help="for one picture; 0: the libraries' own choice")
    usage.add_argument("--pool", type=int, default=0, help="pictures at a time; 0: FastAPI's own choice")
    args = usage.parse_args()
    app = application(Work(args.folder, threads=args.threads), args.kind)
    serve(app, pool=args.pool, announce=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
