"""Whole folders to vectors on disk: complete, in order, and never twice after a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dml.cli.encoder import app, embed
from dml.data.table import ImageTable, Record, open_table
from dml.encoder import Embeddings, Encoder, embed_table, is_embeddings, open_embeddings
from dml.errors import DataError, DmlError, ModelMismatch, StorageError, TooManyBadImages, UsageError

ROOT = Path(__file__).parent.parent
CLOSE = 2e-6


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return Encoder.load(tiny_encoder, device="cpu", threads=2)


@pytest.fixture
def table(tiny_folder: Path) -> ImageTable:
    return open_table(tiny_folder)


class Counting(Encoder):
    """A real encoder that counts what it embeds, and is interrupted after `limit` pictures."""

    def __init__(self, inner: Encoder, limit: int = 10**9) -> None:
        super().__init__(inner._manifest, inner._runtime)
        self.count, self.limit = 0, limit

    def _run(self, pixels: Any, runtime: Any = None) -> Any:
        if self.count + len(pixels) > self.limit:
            raise KeyboardInterrupt
        self.count += len(pixels)
        return super()._run(pixels, runtime)


def assert_complete(result: Embeddings, table: ImageTable, encoder: Encoder) -> None:
    paths = [record.path for record in table.records]
    assert [item.id for item in result.items] == [p.relative_to(table.root).as_posix() for p in paths]
    assert [item.label for item in result.items] == [record.label for record in table.records]
    np.testing.assert_allclose(result.vectors, encoder.embed(paths), atol=CLOSE)
    assert result.fingerprint == encoder.fingerprint
    assert not (result.folder / "parts").exists()


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_every_picture_gets_its_vector_in_the_order_of_the_table(
    encoder: Encoder, table: ImageTable, tmp_path: Path, format: Any
) -> None:
    seen: list[int] = []
    result = embed_table(encoder, table, tmp_path / "v", format=format, part_rows=20, on_progress=seen.append)
    assert_complete(result, table, encoder)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(table.records))
    assert result.root == table.root.resolve()
    assert result.items[0].payload == {"label": "class_0"}
    assert not result.bad


def test_the_formats_hold_the_same(encoder: Encoder, table: ImageTable, tmp_path: Path) -> None:
    npy = embed_table(encoder, table, tmp_path / "a")
    parquet = embed_table(encoder, table, tmp_path / "b", format="parquet", part_rows=7, batch_size=64)
    assert npy.items == parquet.items
    np.testing.assert_allclose(npy.vectors, parquet.vectors, atol=CLOSE)


def test_an_interrupted_job_goes_on_where_it_was(encoder: Encoder, table: ImageTable, tmp_path: Path) -> None:
    first, second = Counting(encoder, limit=30), Counting(encoder)
    with pytest.raises(KeyboardInterrupt):
        embed_table(first, table, tmp_path / "v", part_rows=8, batch_size=4)
    with pytest.raises(DataError, match="not complete"):
        open_embeddings(tmp_path / "v")
    progress: list[int] = []
    result = embed_table(
        second, table, tmp_path / "v", part_rows=8, batch_size=4, on_progress=progress.append
    )
    assert progress[0] == 24, "three parts were safe"
    assert second.count == len(table.records) - 24
    assert_complete(result, table, encoder)


def test_a_finished_job_is_not_done_again(encoder: Encoder, table: ImageTable, tmp_path: Path) -> None:
    embed_table(encoder, table, tmp_path / "v")
    again = Counting(encoder)
    assert_complete(embed_table(again, table, tmp_path / "v"), table, encoder)
    assert again.count == 0
    anew = Counting(encoder)
    assert_complete(embed_table(anew, table, tmp_path / "v", resume=False), table, encoder)
    assert anew.count == len(table.records)


@pytest.mark.parametrize(
    "tail", [b'{"start": 8, "st', b"\0\0\0\n", b'{"start": 40, "stop": 48, "bad": []}\n']
)
def test_a_journal_cut_short_loses_its_last_part_only(
    encoder: Encoder, table: ImageTable, tmp_path: Path, tail: bytes
) -> None:
    with pytest.raises(KeyboardInterrupt):
        embed_table(Counting(encoder, limit=10), table, tmp_path / "v", part_rows=8, batch_size=4)
    with (tmp_path / "v/parts/journal.jsonl").open("ab") as journal:
        journal.write(tail)
    second = Counting(encoder)
    assert_complete(embed_table(second, table, tmp_path / "v", part_rows=8), table, encoder)
    assert second.count == len(table.records) - 8


KILLED = """
import os, signal, sys
from dml.data.table import open_table
from dml.encoder import Encoder, embed_table
encoder = Encoder.load(sys.argv[1], device="cpu")
def watch(done):
    if done >= 25:
        os.kill(os.getpid(), signal.SIGKILL)
embed_table(encoder, open_table(sys.argv[2]), sys.argv[3], part_rows=5, batch_size=5, on_progress=watch)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_loses_nothing(
    encoder: Encoder, table: ImageTable, tiny_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(encoder.path), str(tiny_folder), str(tmp_path / "v")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    second = Counting(encoder)
    assert_complete(embed_table(second, table, tmp_path / "v", part_rows=5), table, encoder)
    assert 0 < second.count <= len(table.records) - 20


def test_another_encoder_cannot_go_on(
    encoder: Encoder, table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_table(encoder, table, tmp_path / "v")
    monkeypatch.setattr(Encoder, "fingerprint", property(lambda self: "f" * 64))
    with pytest.raises(ModelMismatch, match=r"ffffffffffff…\. Vectors of two encoders cannot be mixed"):
        embed_table(encoder, table, tmp_path / "v")


def test_other_pictures_cannot_go_on(encoder: Encoder, table: ImageTable, tmp_path: Path) -> None:
    embed_table(encoder, table, tmp_path / "v")
    fewer = ImageTable(table.name, table.root, table.layout, table.records[1:])
    with pytest.raises(UsageError, match="48 then, 47 now"):
        embed_table(encoder, fewer, tmp_path / "v")


def test_a_folder_of_other_things_is_left_alone(encoder: Encoder, table: ImageTable, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for resume in (True, False):
        with pytest.raises(UsageError, match="left alone"):
            embed_table(encoder, table, tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.fixture
def spoiled(draw, tmp_path: Path) -> Path:
    """Ten pictures of which 2 and 7 are none."""
    folder = tmp_path / "spoiled" / "all"
    folder.mkdir(parents=True)
    for number in range(10):
        draw(number).save(folder / f"{number}.png")
    for number in (2, 7):
        (folder / f"{number}.png").write_text("no picture")
    return folder.parent


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_bad_pictures_are_listed_and_the_rest_embedded(
    encoder: Encoder, spoiled: Path, tmp_path: Path, format: Any
) -> None:
    table = open_table(spoiled)
    out = tmp_path / "v"
    result = embed_table(encoder, table, out, format=format, part_rows=3, max_bad_share=0.2)
    assert [item.path for item in result.items] == [f"all/{n}.png" for n in (0, 1, 3, 4, 5, 6, 8, 9)]
    assert [Path(one.path).name for one in result.bad] == ["2.png", "7.png"]
    assert "not a picture" in (out / "bad_images.csv").read_text()
    good = [table.root / item.path for item in result.items]
    np.testing.assert_allclose(result.vectors, encoder.embed(good), atol=CLOSE)


def test_too_many_bad_pictures_stop_the_job_early_and_nothing_is_lost(
    encoder: Encoder, spoiled: Path, tmp_path: Path
) -> None:
    counting = Counting(encoder)
    with pytest.raises(TooManyBadImages, match=r"1 of 10 images cannot be read(?s:.*)2\.png"):
        embed_table(counting, open_table(spoiled), tmp_path / "v", part_rows=3)
    assert counting.count == 2, "it stopped after the first part"
    result = embed_table(counting, open_table(spoiled), tmp_path / "v", part_rows=3, max_bad_share=0.5)
    assert (len(result), len(result.bad), counting.count) == (8, 2, 8)


def test_only_bad_pictures_make_an_empty_table_not_a_crash(
    encoder: Encoder, spoiled: Path, tmp_path: Path
) -> None:
    for path in spoiled.rglob("*.png"):
        path.write_text("")
    for format in ("npy", "parquet"):
        out = tmp_path / format
        result = embed_table(encoder, open_table(spoiled), out, format=format, max_bad_share=1.0)  # type: ignore[arg-type]
        assert (len(result), result.vectors.shape, len(result.bad)) == (0, (0, 16), 10)


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_file_names_that_can_be_no_id_are_skipped_and_listed(
    encoder: Encoder, draw, tmp_path: Path, format: Any
) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(3):
        draw(number).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / os.fsdecode(b"1latin\xff.png"))
    shutil.copy(folder / "0.png", folder / "two\nlines.png")
    result = embed_table(encoder, open_table(folder), tmp_path / "v", format=format, max_bad_share=0.5)
    assert [item.id for item in result.items] == ["0.png", "1.png", "2.png"]
    assert len(result.vectors) == 3
    assert [one.reason[:20] for one in result.bad] == ["an item's id must no"] * 2


def test_boxes_of_one_picture_are_items_of_their_own(encoder: Encoder, draw, tmp_path: Path) -> None:
    path = tmp_path / "p" / "a.png"
    path.parent.mkdir()
    draw(1).save(path)
    boxes = ((0, 0, 30, 30), (20, 20, 60, 60))
    records = (Record(path, "x"), *(Record(path, "x", box=box, payload={"price": 3}) for box in boxes))
    result = embed_table(encoder, ImageTable("t", path.parent, "test", records), tmp_path / "v")
    assert [item.id for item in result.items] == ["a.png", "a.png#0,0,30,30", "a.png#20,20,60,60"]
    assert {item.path for item in result.items} == {"a.png"}
    assert result.items[2].payload == {"price": 3, "label": "x", "box": [20, 20, 60, 60]}
    from PIL import Image

    with Image.open(path) as picture:
        expected = encoder.embed([picture, *(picture.crop(box) for box in boxes)])
    np.testing.assert_allclose(result.vectors, expected, atol=CLOSE)


def test_a_full_disk_is_said_and_the_job_can_go_on(
    encoder: Encoder, table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dml.encoder.embeddings

    save = dml.encoder.embeddings.save_array

    def full(path: Path, array: Any) -> None:
        if len(list(path.parent.glob("0*.npy"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    monkeypatch.setattr(dml.encoder.embeddings, "save_array", full)
    with pytest.raises(StorageError, match="disk is full"):
        embed_table(encoder, table, tmp_path / "v", part_rows=8)
    monkeypatch.undo()
    second = Counting(encoder)
    assert_complete(embed_table(second, table, tmp_path / "v", part_rows=8), table, encoder)
    assert second.count == len(table.records) - 16


def test_what_is_no_finished_embedding_is_refused(
    encoder: Encoder, table: ImageTable, tmp_path: Path
) -> None:
    assert not is_embeddings(tmp_path)
    with pytest.raises(DataError, match="holds no embeddings"):
        open_embeddings(tmp_path)
    out = tmp_path / "v"
    embed_table(encoder, table, out)
    assert is_embeddings(out)
    np.save(out / "vectors.npy", np.zeros((3, 16), np.float32))
    with pytest.raises(DataError, match=r"48 items and vectors of shape \(3, 16\)"):
        open_embeddings(out)
    (out / "vectors.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is damaged"):
        open_embeddings(out)
    tree = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**tree, "format_version": 9}))
    with pytest.raises(DataError, match="Upgrade dml"):
        open_embeddings(out)


# The command line


@pytest.fixture
def dml() -> Any:
    """dml("encoder check …") -> the result; our own errors come out as exceptions, as main.py gets them."""
    commands = typer.Typer()
    commands.add_typer(app, name="encoder")
    commands.command()(embed)

    def call(*words: object) -> Any:
        result = CliRunner().invoke(commands, [str(word) for word in words], catch_exceptions=True)
        if isinstance(result.exception, DmlError):
            raise result.exception
        return result

    return call


def test_embed_on_the_command_line(dml: Any, encoder: Encoder, tiny_folder: Path, tmp_path: Path) -> None:
    done = dml("embed", encoder.path, tiny_folder, "--out", tmp_path / "v", "--threads", 2, "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["vectors"], summary["dim"], summary["bad"]) == (48, 16, 0)
    assert summary["fingerprint"] == encoder.fingerprint
    assert np.load(tmp_path / "v" / "vectors.npy").shape == (48, 16)
    assert "48 images of 6 classes" in done.stderr, "what was recognised is said, beside the result"
    again = dml("embed", encoder.path, tiny_folder, "--out", tmp_path / "v")
    assert "48 vectors of 16 dimensions" in again.stdout
    with pytest.raises(UsageError, match="--format is one of npy, parquet"):
        dml("embed", encoder.path, tiny_folder, "--out", tmp_path / "w", "--format", "json")


def test_create_export_and_check_on_the_command_line(dml: Any, tmp_path: Path) -> None:
    out = tmp_path / "e"
    made = dml("encoder", "create", "--trunk", "tiny", "--weights", "none", "--image-size", 32, "--dim", 8,
               "--format", "safetensors", "--out", out, "--json")  # fmt: skip
    assert made.exit_code == 0, made.output
    fingerprint = json.loads(made.stdout)["fingerprint"]
    assert "weights are random" in made.stderr
    before = (out / "manifest.json").read_bytes()
    again = ("encoder", "create", "--trunk", "tiny", "--weights", "none", "--image-size", 32, "--out", out)
    with pytest.raises(UsageError, match="holds an encoder already.*--overwrite"):
        dml(*again)
    assert (out / "manifest.json").read_bytes() == before
    exported = dml("encoder", "export", out)
    assert fingerprint in exported.stdout
    assert "agree on 12 pictures" in exported.stdout
    report = json.loads(dml("encoder", "check", out, "--json").stdout)
    assert report["ok"]
    assert report["measured"]["min_cosine"] > 0.9999
    (out / "model.onnx").write_bytes(b"")
    with pytest.raises(DmlError, match=r"1 problem:(?s:.*)model.onnx is damaged"):
        dml("encoder", "check", out)
    with pytest.raises(UsageError, match="--pooling is one of avg, max"):
        dml(
            "encoder",
            "create",
            "--trunk",
            "tiny",
            "--weights",
            "none",
            "--pooling",
            "min",
            "--out",
            tmp_path / "f",
        )
    assert dml(*again, "--overwrite").exit_code == 0
    assert (out / "manifest.json").read_bytes() != before
