"""Pages: templates in which a line such as `// common.js` stands for a part that several pages share.

    common.css, common.js                for pages with plots
    clips.css, clips.js, compare.html    for pages of clips

Content from job files is data, never markup: scripts insert it as text only. Pages that are opened from disk contain
their data as JSON.
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
    """The parts of a page before and after its data."""
    before, after = whole(package, name).split(MARK)
    return before, after


def safe(text: str) -> str:
    """JSON that cannot end the element that contains it."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
