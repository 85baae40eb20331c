"""The results of a search as one self-contained HTML file: no script, no outside request."""

import base64
import json
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dml.cli.search import Answer, Found

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --paper: #fcfcfd; --card: #fff;
  --line: #e0e1e6; --accent: #3358d4; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --paper: #111113;
  --card: #18191b; --line: #2e3135; --accent: #9eb1ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 32px 24px 64px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; gap: 24px; align-items: flex-end; flex-wrap: wrap; margin-bottom: 32px; }
header img { max-width: 256px; max-height: 256px; border-radius: 12px; border: 1px solid var(--line); }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 0; color: var(--soft); }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
figure { margin: 0; }
.picture { aspect-ratio: 1; display: grid; place-items: center; background: var(--line); color: var(--soft); }
.picture img { width: 100%; height: 100%; object-fit: contain; background: var(--card); }
figcaption { padding: 10px 12px 12px; }
.score { float: right; font-variant-numeric: tabular-nums; color: var(--accent); font-weight: 600; }
.label { font-weight: 600; }
.id { display: block; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.bar { height: 3px; background: var(--accent); }
"""


def render(answer: "Answer", *, name: str, query: bytes | None) -> str:
    """The page.

    Args:
        answer: what was found, with thumbnails.
        name: of what was looked for.
        query: a picture of it as a JPEG, when there was one.
    """
    looked_for = (
        "" if query is None else f'<img src="{inlined(query)}" alt="the picture that was looked for">\n'
    )
    kind = "approximate" if answer.approximate else "exact"
    cards = "\n".join(card(hit) for hit in answer.hits)
    body = f"<ol>\n{cards}\n</ol>" if answer.hits else "<p>Nothing was found.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Like {escape(name)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
{looked_for}<div><h1>Like {escape(name)}</h1>
<p>{len(answer.hits)} results from {escape(answer.collection)} · {kind} search · {answer.took_ms:.0f} ms ·
cosine similarity, higher is nearer</p></div>
</header>
{body}
</body>
</html>
"""


def card(hit: "Found") -> str:
    """One result."""
    alt = escape(hit.label or hit.id, quote=True)
    picture = "no picture" if hit.thumbnail is None else f'<img src="{inlined(hit.thumbnail)}" alt="{alt}">'
    label = f'<span class="label">{escape(hit.label)}</span>' if hit.label else "&nbsp;"
    details = escape(json.dumps(hit.payload, ensure_ascii=False), quote=True)
    width = 100 * max(0.0, min(1.0, hit.score))
    return f"""<li title="{details}"><figure>
<div class="picture">{picture}</div>
<div class="bar" style="width:{width:.1f}%"></div>
<figcaption><span class="score">{hit.score:.3f}</span>{label}
<span class="id">{hit.rank}. {escape(hit.id)}</span>
</figcaption></figure></li>"""


def inlined(jpeg: bytes) -> str:
    """A picture as a data address."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
