"""What a page is made of: sections of tables, figures, code and text. All text is plain; the template escapes it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from nostalgia.analysis.drawing import Drawer
from nostalgia.analysis.figure_style import png, svg

LARGEST_SVG = 400_000  # bytes; a figure of very many points is embedded as pixels instead
# A figure narrower than the first is scrolled in its frame, not shrunk; wider than the second it would look coarse.
PIXELS_AN_INCH = (64, 90)
# Figures of half the page's width are drawn smaller than on their own, so that their letters stay readable.
NARROWER, NARROWED_FROM = 0.82, 5.5  # inches
HALF_PAGE = 58  # letters of a table
WIDE = 7.0  # inches from which a figure takes the whole width of the page


@dataclass
class Table:
    """Rows of text; the first ``words`` columns align left, those of numbers right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""
    words: int = 1
    kind: str = "table"

    @property
    def wide(self) -> bool:
        """Whether half the page's width is too little for it."""
        columns = zip(self.head, *self.rows, strict=True)
        return sum(max(map(len, column)) + 2 for column in columns) > HALF_PAGE


@dataclass
class Pairs:
    """Names and values, such as a part of a configuration."""

    title: str
    items: Sequence[tuple[str, str]]
    kind: str = "pairs"


@dataclass
class Picture:
    """A figure as a data URI; ``alt`` says in words what it shows."""

    name: str
    source: str
    alt: str
    least: int  # pixels it needs to be read
    most: int
    wide: bool
    caption: str = ""
    kind: str = "picture"


@dataclass
class Code:
    """Text to copy."""

    text: str
    label: str
    kind: str = "code"


@dataclass
class Text:
    lines: Sequence[str]
    kind: str = "text"


Block = Table | Pairs | Picture | Code | Text


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def columns(self) -> bool:
        """Whether the blocks flow in columns: lists of unequal lengths would leave holes in a grid."""
        return any(isinstance(block, Pairs) for block in self.blocks)

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass
class Page:
    """A whole report; ``cards`` are the numbers a reader looks for first: name, value, what it means."""

    title: str
    subtitle: str
    cards: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the reader must know before the numbers
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *blocks: Block | None) -> None:
        """A section of those ``blocks`` that are there; none where there are none."""
        found = [block for block in blocks if block is not None]
        if found:
            self.sections.append(Section(title, found))


class Pictures:
    """Draws figures by name; what cannot be drawn is None, and ``skipped`` says why."""

    def __init__(self, drawers: Mapping[str, Drawer], captions: Mapping[str, str]) -> None:
        self.drawers, self.captions = drawers, captions
        self.skipped: dict[str, str] = {}

    def __call__(self, name: str, caption: str | None = None) -> Picture | None:
        try:
            figure = self.drawers[name]()
        except ValueError as error:
            self.skipped[name] = str(error)
            return None
        caption = caption if caption is not None else self.captions.get(name, "")
        return picture(name, figure, caption)


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """The figure within the page, no file beside it."""
    inches = float(figure.get_figwidth())
    wide = inches >= WIDE
    if NARROWED_FROM <= inches < WIDE:
        inches *= NARROWER
        figure.set_size_inches(inches, figure.get_figheight() * NARROWER)
    content, kind = svg(figure), "svg+xml"
    if len(content) > LARGEST_SVG:
        content, kind = png(figure), "png"
    title = " ".join(next((a.get_title(loc="left") for a in figure.axes if a.get_title(loc="left")), name).split())
    return Picture(
        name=name,
        source=f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        alt=f"{title}. {caption}".strip(),
        least=round(inches * PIXELS_AN_INCH[0]),
        most=round(inches * PIXELS_AN_INCH[1]),
        wide=wide,
        caption=caption,
    )
