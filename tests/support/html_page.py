"""Reading an HTML page: that its tags nest, what it says, and that it needs nothing but itself."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Text, attributes and headings of a page; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def assert_stands_alone(html):
    """Nothing is loaded from anywhere, and nothing runs."""
    for tag, attributes in Page(html).elements:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "xlink:href", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
        if tag != "a":
            assert attributes.get("href", "data:").startswith("data:")
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
