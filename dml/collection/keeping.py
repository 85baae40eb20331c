"""Looking after a collection: is everything in it what was written?"""

from pathlib import Path

from dml.checksums import seal_fits
from dml.collection import catalog as sql
from dml.collection.audit import check_catalog
from dml.collection.base import Picture
from dml.collection.catalog import Catalog
from dml.collection.manifest import read_manifest
from dml.collection.pictures import Pictures
from dml.collection.snapshots import Snapshots
from dml.encoder.manifest import MANIFEST as ENCODER_MANIFEST
from dml.encoder.manifest import read_manifest as read_encoder_manifest
from dml.encoder.manifest import verify_file
from dml.errors import DamagedFile, EncoderError, StorageError, UnknownCollection


def check(
    folder: Path,
    *,
    catalog: Catalog,
    snapshots: Snapshots,
    pictures: Pictures,
    fingerprint: str,
) -> list[str]:
    """Read everything and compare it with its checksums; somebody may write to it meanwhile.

    Not compared is what says nothing: `writer.lock`, SQLite's shared memory (`-shm`), which is made anew, and
    catalogues of older formats that a migration left.

    Args:
        folder: of the collection.
        fingerprint: that the encoder must have.

    Returns:
        One sentence per problem; an empty list when all is well.
    """
    problems = [*check_manifest(folder), *check_catalog(catalog)]
    try:
        there = snapshots.paths()
        with catalog.reading() as db:
            sequence = sql.read_state(db)[0]
        problems += snapshots.check(there, sequence)
        problems += check_pictures(catalog, pictures)
    except (DamagedFile, StorageError) as error:
        problems.append(str(error))
    return [*dict.fromkeys(problems), *check_encoder(folder / "encoder", fingerprint)]


def check_manifest(folder: Path) -> list[str]:
    try:
        read_manifest(folder)
    except (DamagedFile, UnknownCollection) as error:
        return [str(error)]
    return []


def check_pictures(catalog: Catalog, pictures: Pictures) -> list[str]:
    """Pictures that are missing or not what they were, and thumbnails that are not."""
    misfits = pictures.misfits()
    checked: dict[Picture, str | None] = {}
    with catalog.reading() as db:
        used = list(sql.all_pictures(db))
    for id, picture in used:
        if picture not in checked:
            checked[picture] = pictures.damaged(picture, id)
    with catalog.reading() as db:  # what the writer has deleted since is no problem
        still = {picture for _, picture in sql.all_pictures(db)}
    problems = [problem for picture, problem in checked.items() if problem and picture in still]
    known = {picture.sha256 for picture in checked}
    problems += [
        f"{path} is not the picture of its name, and no item uses it"
        for path in misfits
        if path.name not in known
    ]
    problems += [
        f"{path} is not the thumbnail that was written; it is made again when it is asked for"
        for path in pictures.spoilt_thumbnails()
    ]
    return problems


def check_encoder(folder: Path, fingerprint: str) -> list[str]:
    """What is wrong with the encoder that lies in the collection, if there is one."""
    if not folder.is_dir():
        return []
    problems = []
    try:
        if seal_fits((folder / ENCODER_MANIFEST).read_bytes()) is False:
            problems.append(
                f"{folder / ENCODER_MANIFEST} is not as it was written: its checksum does not fit"
            )
        manifest = read_encoder_manifest(folder)
        if manifest.fingerprint != fingerprint:
            problems.append(
                f"the encoder in {folder} is {manifest.fingerprint}, and the collection was made by "
                f"{fingerprint}"
            )
    except (EncoderError, OSError) as error:
        return [*problems, str(error)]
    for name in manifest.files:
        try:
            verify_file(manifest, name)
        except EncoderError as error:
            problems.append(str(error))
    return problems
