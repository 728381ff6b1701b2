"""An HTML page as the tests read it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

OUTSIDE = re.compile(r"(?:https?:)?//|@import|<script|<link|<iframe|url\(", re.IGNORECASE)


class Page(HTMLParser):
    """Checks that elements are closed in their order; collects addresses and texts."""

    VOID = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text.strip())

    def check_alone(self) -> None:
        """Nothing is fetched: embedded pictures and references inside of the page only."""
        assert all(address.startswith(("data:image/", "#")) for address in self.addresses)
        without_pictures = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", self.source)
        assert "url(#" not in without_pictures or not re.search(r"url\((?!#)", without_pictures)
        assert not OUTSIDE.search(without_pictures.replace("url(#", "#("))


def shown(address: str) -> np.ndarray:
    content = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))
