"""Sections of a report as one HTML page that needs no other file."""

import base64
from html import escape

from report_tables import Section

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; margin: 0.6em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: left; white-space: nowrap }
th { background: #f2f3f5 }
img { max-width: 100%; margin: 0.6em 0 }
pre { background: #f2f3f5; padding: 0.6em; overflow-x: auto }
"""


def page(sections: list[Section], images: dict[str, bytes]) -> str:
    """The page.

    Args:
        sections: in order.
        images: PNG by name, put before the sections.
    """
    body = [
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for name, image in images.items()
    ]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        for text in section.text:
            tag = "pre" if text.startswith("    ") else "p"
            body.append(f"<{tag}>{escape(text.strip())}</{tag}>")
        for table in section.tables:
            body += [f"<h3>{escape(table.title)}</h3>", f"<p>{escape(table.note)}</p>", "<table>"]
            body.append(_row("th", table.header))
            body += [_row("td", row) for row in table.rows]
            body.append("</table>")
        if section.missing:
            body += ["<h3>Missing</h3>", "<ul>"]
            body += [f"<li>{escape(entry)}</li>" for entry in section.missing]
            body.append("</ul>")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>klein-kv benchmarks</title><style>{_STYLE}</style></head><body>",
            "<h1>klein-kv benchmarks</h1>",
            *body,
            "</body></html>",
        ]
    )


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
