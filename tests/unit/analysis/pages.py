"""Reads a report as a browser would: its text, its tables, what it refers to."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Document:
    text: str = ""
    headings: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)  # caption -> rows, the head first
    codes: dict[str, str] = field(default_factory=dict)  # label -> text
    pictures: dict[str, str] = field(default_factory=dict)  # name -> alt text
    tags: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    references: list[str] = field(default_factory=list)  # src, href and the like


def read_page(path: Path) -> Document:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader.document


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.document = Document()
        self._open: list[str] = []
        self._caption, self._figure, self._buffer = "", "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.document.tags.add(tag)
        self.document.attributes |= set(values)
        self.document.references += [values[name] for name in ("src", "href", "action", "data") if name in values]
        if tag == "figure":
            self._figure = values["id"].removeprefix("figure-")
        if tag == "img":
            self.document.pictures[self._figure] = values["alt"]
        if tag == "table":
            self.document.tables[self._caption] = []
        if tag == "tr":
            self.document.tables[self._caption].append([])
        if tag in ("td", "th", "h2", "h3", "code"):
            self._buffer = ""
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag == "h3":
            self._caption = self._buffer
        if tag == "h2":
            self.document.headings.append(self._buffer)
            self._caption = ""
        if tag in ("td", "th"):
            self.document.tables[self._caption][-1].append(self._buffer)
        if tag == "code":
            self.document.codes[self._caption] = self._buffer

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.document.text += data
        self._buffer += data
