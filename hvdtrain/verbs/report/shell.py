"""What every page is made of: HTML that holds all it shows, and is forbidden to fetch anything."""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from hvdtrain.errors import ConfigError

# Nothing is fetched, whatever is in the page: scripts and styles are those that it holds.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
)

# A longer legend is folded: of many runs it would be most of the page.
_MOST_UNFOLDED = 6


class Figure(NamedTuple):
    """A chart of a page."""

    title: str
    item: dict[str, Any]
    """As `Bokeh.embed.embed_item` takes it."""
    caption: str
    """What is to be seen in it, as HTML: also for those who do not see it."""


def escape(text: object) -> str:
    """Return a text as HTML shows it; what cannot be printed is shown as unknown."""
    return html.escape("".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in str(text)))


def bokeh_source() -> str:
    """Return the JavaScript of Bokeh, for a page that fetches nothing.

    Raises:
        ConfigError: Bokeh is not installed.
    """
    try:
        from bokeh.resources import Resources
    except ImportError as error:
        raise ConfigError("report draws with Bokeh, which is not installed here: pip install bokeh") from error
    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw)


def framed(
    title: str, kind: str, body: Sequence[str], figures: Sequence[Figure], settings: Mapping[str, Any], bokeh: str
) -> str:
    """Return a page.

    Args:
        title: what it is about.
        kind: what it is.
        body: HTML of header and main part; `figures_of` has put the figures into it.
        figures: what is drawn there.
        settings: what the page's script is told.
        bokeh: the source of BokehJS.
    """
    parts = [*body, f"<script type='application/json' id='settings'>{_in_script(settings)}</script>"]
    if figures:
        items = {f"chart-{number}": figure.item for number, figure in enumerate(figures)}
        parts += [
            f"<script type='text/plain' id='bokeh'>{_packed(bokeh)}</script>",
            f"<script type='text/plain' id='charts'>{_packed(json.dumps(items))}</script>",
        ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} - hvdtrain {kind}</title><style>{_asset('page.css')}</style></head>"
        f"<body>{''.join(parts)}<script>{_asset('page.js')}</script></body></html>\n"
    )


def figures_of(figures: Sequence[Figure]) -> Iterator[str]:
    """Yield the places of figures in a page, with their titles and captions."""
    yield "<p id='trouble' class='notes' hidden>Curves cannot be drawn here: it takes a browser of 2023 or newer.</p>"
    yield "<noscript><p class='notes'>The curves are drawn by JavaScript, which is off here.</p></noscript>"
    yield "<div class='charts'>"
    for i, figure in enumerate(figures):
        yield (
            f"<figure aria-labelledby='title-{i}' aria-describedby='about-{i}'>"
            f"<h3 id='title-{i}'>{escape(figure.title)}</h3><div class='plot' id='chart-{i}'></div>"
            f"<figcaption id='about-{i}'>{figure.caption}</figcaption></figure>"
        )
    yield "</div>"


def legend(items: Sequence[tuple[str, str, str]]) -> str:
    """Return a legend: of each curve its colour, its dashes as Bokeh names them, and HTML that says what it is."""
    rows = []
    for colour, dashes, said in items:
        rows.append(f"<li>{chip(colour, dashes)}<span>{said}</span></li>")
    listed = f"<ul>{''.join(rows)}</ul>"
    if len(items) <= _MOST_UNFOLDED:
        return listed
    return f"<details><summary>{len(items)} curves, and what can be read off them</summary>{listed}</details>"


def chip(colour: str, dashes: str) -> str:
    """Return the piece of a curve that stands for it in a legend."""
    border = {"solid": "solid", "dashed": "dashed"}.get(dashes, "dotted")
    return f"<span class='chip' style='border-top-style:{border};border-color:{colour}'></span>"


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("hvdtrain.verbs.report") / name).read_text(encoding="utf-8")


@functools.lru_cache(maxsize=2)
def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _in_script(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")
