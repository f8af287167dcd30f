"""Pages that are opened from disk: each one file, with its data in it as JSON, which a script in it draws.

A page is a template, in which a line `/* common.css */` or `// common.js` stands for what pages of plots share. What
comes from elsewhere is data there and never markup: the script puts it in as text alone.
"""

from __future__ import annotations

from importlib import resources

MARK = "<!-- data -->"
COMMON = {"/* common.css */\n": "common.css", "// common.js\n": "common.js"}


def halves(package: str, name: str) -> tuple[str, str]:
    """What comes before the data of a page, and what comes after."""
    page = resources.files(package).joinpath(name).read_text("utf-8")
    for line, part in COMMON.items():
        page = page.replace(line, resources.files(__name__).joinpath(part).read_text("utf-8"))
    before, after = page.split(MARK)
    return before, after


def safe(text: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
