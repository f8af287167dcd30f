"""Pages: each a template, in which a line such as `// common.js` stands for a part that several of them share.

common.css, common.js                of pages of plots
clips.css, clips.js, compare.html    of pages of clips

What comes from elsewhere is data there and never markup: the script puts it in as text alone. Pages that are opened
from disk have their data in them as JSON.
"""

from __future__ import annotations

from importlib import resources

MARK = "<!-- data -->"
PARTS = {
    "/* common.css */\n": "common.css",
    "// common.js\n": "common.js",
    "/* clips.css */\n": "clips.css",
    "// clips.js\n": "clips.js",
    "<!-- compare.html -->\n": "compare.html",
}


def whole(package: str, name: str) -> str:
    """A template with its parts."""
    page = resources.files(package).joinpath(name).read_text("utf-8")
    for line, part in PARTS.items():
        if line in page:
            page = page.replace(line, resources.files(__name__).joinpath(part).read_text("utf-8"))
    return page


def halves(package: str, name: str) -> tuple[str, str]:
    """What comes before the data of a page, and what comes after."""
    before, after = whole(package, name).split(MARK)
    return before, after


def safe(text: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
