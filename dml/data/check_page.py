"""The findings of `dml data check` as one self-contained page, with the duplicates as pictures."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from dml.data.check import CheckReport
from dml.data.table import ImageTable
from dml.errors import InvalidImage
from dml.imaging import decode
from dml.storage import write_aside

SHOWN = 200
"""Findings of one kind on the page; the rest is counted."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
pre { background: var(--soft); padding: 1rem; border-radius: .5rem; overflow: auto; }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
.group { display: flex; gap: 1rem; align-items: center; padding: .6rem 0; }
.group { border-bottom: 1px solid var(--line); }
.group img { width: 72px; height: 72px; object-fit: cover; border-radius: .4rem; background: var(--soft); }
.flag { background: #c0392b; color: white; border-radius: 1rem; padding: .05rem .6rem; font-size: .8rem; }
.good { color: #2e8b57; }
"""


def write_page(report: CheckReport, table: ImageTable, path: Path) -> Path:
    """Write the report as HTML: no outside files, no script.

    Raises:
        StorageError: the disk is full or refuses; a page that was there before stays.
    """
    sections = [
        _listing(
            "Images that cannot be read", (f"{b.path}: {b.reason}" for b in report.bad), len(report.bad)
        ),
        _listing(
            "Classes with fewer than two readable images",
            (f"{label}: {count}" for label, count in report.tiny_classes.items()),
            len(report.tiny_classes),
        ),
        _listing("Leaks between splits", (leak.describe() for leak in report.leaks), len(report.leaks)),
        _duplicates(report, table.root),
    ]
    verdict = '<p class="good">Nothing wrong found.</p>' if report.ok else ""
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(report.name)}: data check</title>"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(report.name)}: data check</h1><pre>{escape(report.description)}</pre>{verdict}"
        f"{''.join(filter(None, sections))}</html>\n"
    )
    write_aside(path, lambda aside: aside.write_text(page, encoding="utf-8", errors="surrogateescape"))
    return path


def _listing(title: str, entries: Iterable[str], count: int) -> str:
    if not count:
        return ""
    rows = [f"<li>{escape(entry)}</li>" for _, entry in zip(range(SHOWN), entries, strict=False)]
    more = f"<p>… and {count - SHOWN:,} more</p>" if count > SHOWN else ""
    return f"<h2>{title} ({count:,})</h2><ul>{''.join(rows)}</ul>{more}"


def _duplicates(report: CheckReport, root: Path) -> str:
    if not report.duplicates:
        return ""
    rows = []
    for group in report.duplicates[:SHOWN]:
        flags = "".join(
            f' <span class="flag">{text}: {escape(", ".join(names))}</span>'
            for text, names in (("classes", group.labels), ("splits", group.splits))
            if len(names) > 1
        )
        names = "<br>".join(escape(p) for p in group.paths)
        rows.append(f'<div class="group">{_thumbnail(root / group.paths[0])}<div>{names}{flags}</div></div>')
    more = f"<p>… and {len(report.duplicates) - SHOWN:,} more</p>" if len(report.duplicates) > SHOWN else ""
    return f"<h2>Identical files ({len(report.duplicates):,} groups)</h2>{''.join(rows)}{more}"


def _thumbnail(path: Path, size: int = 144) -> str:
    try:
        picture = decode(path)
    except InvalidImage:
        return ""
    picture.thumbnail((size, size))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
