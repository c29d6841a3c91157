"""A page of HTML that needs nothing but itself: its style is inline, its pictures are data, and it runs nothing."""

import base64
import html
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page allows itself: a browser refuses all that would be fetched or run."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0; --well: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #3d444d; --well: #151b23; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1100px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { border-bottom: 1px solid var(--line); font-size: 1.2rem; margin: 2.2rem 0 0.8rem; padding-bottom: 0.3rem; }
p.note { color: var(--soft); margin: 0.3rem 0; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 1.2rem 0.25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: normal; white-space: nowrap; }
img { background: #ffffff; border-radius: 6px; display: block; height: auto; max-width: 100%; }
pre { background: var(--well); border: 1px solid var(--line); border-radius: 6px; font-size: 0.85rem; overflow-x: auto;
  padding: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def page(title: str, note: str, sections: Mapping[str, str]) -> str:
    """The page. Sections are HTML, by their headings; all other words anywhere in this file are plain text."""
    body = "\n".join(f"<section>\n<h2>{html.escape(name)}</h2>\n{part}\n</section>" for name, part in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{paragraph(note)}\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """A line beside the matter."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(rows: Mapping[str, Any]) -> str:
    """Names and what they are."""
    cells = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(it))}</td></tr>" for name, it in rows.items()
    )
    return f"<table>\n{cells}\n</table>"


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def folded(name: str, text: str) -> str:
    """Text that is shown when it is asked for."""
    return f"<details>\n<summary>{html.escape(name)}</summary>\n{preformatted(text)}\n</details>"


def picture(png: Path, text: str) -> str:
    """A PNG inside the page, at most as wide as the page; `text` stands for it where there are no pictures."""
    data = png.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # the header chunk is the first one
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(text)}" width="{width}" height="{height}" src="{source}">'


def joined(parts: Sequence[str]) -> str:
    """Parts below each other."""
    return "\n".join(parts)
