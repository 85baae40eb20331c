"""The pictures of a collection: stored by content, referenced where they lie, and thumbnails of both."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from dml.collection.base import Picture
from dml.collection.lock import folder_lock
from dml.errors import CollectionError, ImageNotKept, StorageError
from dml.storage import ASIDE, flush_to_disk, opened_aside, storage_errors

THUMBNAIL_QUALITY = 85
LARGEST_THUMBNAIL = 2048  # pixels
DIGEST = 32  # bytes of a sha256


class Pictures:
    """Files below a collection's folder.

    ::

        images/<first two of sha256>/<sha256>         the bytes as they came; flushed before their item is
        thumbnails/<first two>/<sha256>-<size>.jpg    a cache, with a sha256 behind the last byte of each JPEG

    Args:
        folder: of the collection.
        roots: name -> folder of referenced pictures.
        read_only: thumbnails are made, but not kept.
    """

    def __init__(self, folder: Path, roots: Mapping[str, Path], *, read_only: bool = False) -> None:
        self.folder = folder
        self.images, self.thumbnails = folder / "images", folder / "thumbnails"
        self.roots, self.read_only = dict(roots), read_only

    def store(self, data: bytes) -> Picture:
        """Keep these bytes; durable on return. Raises StorageError."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._stored(sha256)
        # A file of another length is what a crash of the machine may leave of a write that was never
        # acknowledged.
        if not path.exists() or path.stat().st_size != len(data):
            make_folder(path.parent)
            with opened_aside(path, tidy=False) as file:
                file.write(data)
        return Picture("stored", sha256)

    def refer(self, file: Path, sha256: str | None = None) -> Picture:
        """Refer to a file below one of the roots.

        Args:
            sha256: of its bytes, when it has just been read; None: it is read.

        Raises:
            CollectionError: it lies below none of them.
            ImageNotKept: it cannot be read.
        """
        absolute = Path(
            os.path.abspath(file)
        )  # not resolve(): links inside a root stay as the user made them
        inside = [(name, root) for name, root in self.roots.items() if absolute.is_relative_to(root)]
        if not inside:
            known = ", ".join(f"{name} = {root}" for name, root in self.roots.items()) or "none"
            raise CollectionError(
                f"{file} lies below no root of this collection (roots: {known}). "
                f"Store the picture instead, or add its folder as a root."
            )
        name, root = max(inside, key=lambda entry: len(entry[1].parts))
        digest = sha256 or digest_of(absolute)
        return Picture("referenced", digest, path=absolute.relative_to(root).as_posix(), root=name)

    def read(self, picture: Picture, id: str) -> bytes:
        """The bytes, as they were when the item was added.

        Raises:
            ImageNotKept: the file is gone, unreadable, outside its root, or not the same any more.
        """
        path = self.path(picture, id)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageNotKept(
                f'The picture of item "{id}" cannot be read at {path}: {error.strerror or error}'
            ) from error
        if hashlib.sha256(data).hexdigest() != picture.sha256:
            raise ImageNotKept(f'The picture of item "{id}" at {path} has changed since the item was added.')
        return data

    def path(self, picture: Picture, id: str) -> Path:
        """Where the bytes are. Raises ImageNotKept for an unknown root, or a path that leaves it."""
        if picture.kind == "stored":
            return self._stored(picture.sha256)
        root = self.roots.get(picture.root or "")
        if root is None:
            raise ImageNotKept(
                f'The picture of item "{id}" is below the root "{picture.root}", which is not known.'
            )
        relative = PurePosixPath(picture.path or "")
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ImageNotKept(
                f'The picture of item "{id}" is at "{picture.path}", which is outside its root.'
            )
        return root / relative

    def discard(self, sha256s: list[str]) -> None:
        """Delete stored pictures and the thumbnails of them.

        A file that resists is left for the next sweep, and so are all while somebody needs them (`kept`).
        """
        if not sha256s:
            return
        with suppress(OSError), folder_lock(self.folder, wait=False) as is_free:
            for sha256 in sha256s if is_free else ():
                with suppress(OSError):
                    self._stored(sha256).unlink(missing_ok=True)
                    for thumbnail in (self.thumbnails / sha256[:2]).glob(f"{sha256}-*.jpg"):
                        thumbnail.unlink(missing_ok=True)

    def misfits(self) -> list[Path]:
        """Stored pictures, used or not, whose bytes are not those of their name."""
        return [path for path in sorted(self.images.glob("??/*")) if not self._fits(path)]

    @staticmethod
    def _fits(path: Path) -> bool:
        try:
            return path.name.endswith(ASIDE) or digest_of(path) == path.name
        except ImageNotKept:
            return not path.exists()  # deleted by the writer just now

    def spoilt_thumbnails(self) -> list[Path]:
        """Thumbnails that are not as they were written."""
        found = (path for path in sorted(self.thumbnails.glob("??/*.jpg")) if read_thumbnail(path) is None)
        return [path for path in found if path.exists()]

    def folders(self) -> list[Path]:
        """Those that stored pictures lie in."""
        return list(self.images.glob("??"))

    def stored(self, folder: Path | None = None) -> set[str]:
        """sha256 of the pictures that are stored in a folder, or in all, used or not."""
        found = self.images.glob("??/*") if folder is None else folder.glob("*")
        return {path.name for path in found if not path.name.endswith(ASIDE)}

    @staticmethod
    def half_written(folder: Path) -> list[Path]:
        """Files of writes that were cut short, or that go on just now."""
        return list(folder.glob(f".*{ASIDE}"))

    def damaged(self, picture: Picture, id: str) -> str | None:
        """What is wrong with a picture, or None."""
        try:
            self.read(picture, id)
        except ImageNotKept as error:
            return str(error)
        return None

    def thumbnail(self, picture: Picture, id: str, size: int) -> bytes:
        """A JPEG whose longer side is at most `size` pixels, upright, without metadata.

        Raises:
            ImageNotKept: as `read`.
            InvalidImage: the bytes are no picture.
            ValueError: for a size out of range.
        """
        if not 16 <= size <= LARGEST_THUMBNAIL:
            raise ValueError(f"size must be between 16 and {LARGEST_THUMBNAIL} pixels, got {size}")
        cached = self.thumbnails / picture.sha256[:2] / f"{picture.sha256}-{size}.jpg"
        if (kept := read_thumbnail(cached)) is not None:
            return kept
        data = shrink(self.read(picture, id), size)
        if not self.read_only:
            try:
                make_folder(cached.parent)
                with opened_aside(cached, tidy=False) as file:
                    file.write(data + hashlib.sha256(data).digest())
            except StorageError:
                pass  # a cache: the picture is answered all the same
        return data

    def _stored(self, sha256: str) -> Path:
        return self.images / sha256[:2] / sha256


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """No process deletes a stored picture of the collection in `folder` meanwhile."""
    with folder_lock(folder, shared=True):
        yield


def read_thumbnail(path: Path) -> bytes | None:
    """The JPEG in a file of the cache; None when it is not there, or not as it was written."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    data, digest = kept[:-DIGEST], kept[-DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def shrink(data: bytes, size: int) -> bytes:
    """A small JPEG of a picture: upright, RGB, no metadata."""
    from PIL import Image

    from dml.imaging import decode

    image = decode(data)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    # A fresh image: what the file said about its maker, place and camera stays behind.
    clean = Image.new("RGB", image.size)
    clean.paste(image)
    clean.save(out, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return out.getvalue()


def digest_of(path: Path) -> str:
    """sha256 of a file. Raises ImageNotKept when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageNotKept(f"The picture {path} cannot be read: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Create a folder and flush the entry in its parent. Raises StorageError."""
    with storage_errors(folder):
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            flush_to_disk(folder.parent)
