"""The picture of a model card in docs/card.md: the card of a result, as the Hub shows it.

    python -m benchmarks.card_picture RESULT docs/pictures/card.png

Needs weasyprint and pymupdf beside ckavg, which nothing else here does.
"""

from __future__ import annotations

import html
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from ckavg.output.origin import parse_card

_WIDTH, _LONGEST = 840, 6_000
_SHOWN = ("pipeline_tag", "library_name", "datasets", "language", "tags", "license")
"""Fields that the Hub shows as a row above the card, in its order."""

_STYLE = """
@page { size: %(width)dpx %(height)dpx; margin: 24px 32px; }
body { font: 15px/1.5 "Noto Sans", "DejaVu Sans", sans-serif; color: #1f2328; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 5px; margin: 22px 0 12px; line-height: 1.25; }
h1 { font-size: 27px; margin-top: 14px; } h2 { font-size: 20px; }
p, ul, pre, table { margin: 0 0 14px; } ul { padding-left: 26px; }
code, pre { font-family: "DejaVu Sans Mono", monospace; font-size: 12.5px; background: #f1f3f5; border-radius: 5px; }
code { padding: 2px 5px; } pre { padding: 12px 14px; line-height: 1.45; } pre code { padding: 0; background: none; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { border: 1px solid #d1d9e0; padding: 4px 12px; text-align: right; } tr:nth-child(even) { background: #f6f8fa; }
img { width: 100%%; } a { color: #0969da; text-decoration: none; }
.tags { font-size: 12.5px; border-bottom: 1px solid #e5e7eb; padding-bottom: 12px; }
.tags span { display: inline-block; border: 1px solid #e5e7eb; border-radius: 9px; padding: 1px 9px; }
.tags span { margin: 0 3px 5px 0; }
.tags i { color: #6b7280; font-style: normal; }
"""


def main(result: Path, picture: Path) -> None:
    """Draw the card of a result."""
    weasyprint: Any = importlib.import_module("weasyprint")
    pymupdf: Any = importlib.import_module("pymupdf")
    card = parse_card((result / "README.md").read_bytes())
    text = MarkdownIt().enable("table").render(card.text)
    style = _STYLE % {"width": _WIDTH, "height": _LONGEST}
    page = f"<style>{style}</style>{_tags(card.metadata)}{text}"
    drawn = weasyprint.HTML(string=page, base_url=f"{result.resolve()}/").write_pdf()
    (only,) = pymupdf.open(stream=drawn)
    bottom = max(block[3] for block in only.get_text("blocks"))
    only.set_cropbox(pymupdf.Rect(0, 0, only.rect.width, bottom + 24))
    pixels = only.get_pixmap(dpi=110, colorspace=pymupdf.csRGB)
    picture.write_bytes(pixels.tobytes("png"))


def _tags(metadata: Mapping[str, Any]) -> str:
    found = []
    for name in _SHOWN:
        value = metadata.get(name)
        for each in value if isinstance(value, list) else [value] if value else []:
            label = {"datasets": "dataset: ", "license": "license: "}.get(name, "")
            found.append(f"<span><i>{label}</i>{html.escape(str(each))}</span>")
    return f'<div class="tags">{"".join(found)}</div>'


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
