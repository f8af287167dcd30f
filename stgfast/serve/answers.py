"""The responses of a server: the values of a request are checked, and the result is JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from stgfast.errors import SettingsError, wrong
from stgfast.queue.desk import Choice, Desk
from stgfast.queue.job import FIELDS, check_fields, check_text, shown
from stgfast.queue.listing import ORDERS, Entry, listed
from stgfast.queue.readers import Bad
from stgfast.queue.state import DONE, STATUSES, State
from stgfast.queue.status import status_of
from stgfast.queue.words import Words
from stgfast.render.gallery import described
from stgfast.serve.files import frames_of, kept_image

MAX_SHOWN = 200  # jobs in an answer
MAX_NAMES = 1000  # in a request
MAX_WORDS = 1000  # characters
FAR = 1 << 40

Given = Mapping[str, Any]


def status(state: Desk) -> dict[str, Any]:
    models = state.models()
    return {"folder": state.out.resolve().name, "time": time.time(), "models": models, **status_of(state).to_dict()}


def jobs(state: State, asked: Mapping[str, str]) -> dict[str, Any]:
    """Some of the jobs with a status and words, in an order: /api/jobs?status=done,failed&words=kite&offset=60."""
    check_fields_of(asked, {"status", "words", "order", "offset", "limit"})
    order = asked.get("order", "listed")
    if order not in ORDERS:
        raise wrong("order", shown(order), ", ".join(ORDERS))
    statuses = [status for status in asked.get("status", "").split(",") if status]
    words = asked.get("words", "")
    choice = choice_of({"statuses": statuses, "words": words}) if statuses or words.strip() else None
    total, found = listed(
        state,
        choice,
        order=order,
        offset=_number("offset", asked.get("offset", "0"), 0, FAR),
        limit=_number("limit", asked.get("limit", "60"), 1, MAX_SHOWN),
    )
    return {"total": total, "jobs": [_shown(state, entry) for entry in found]}


def _shown(state: State, entry: Entry) -> dict[str, Any]:
    """The data of a job for the page: `pictures` if it is a folder of them, else one file at `address`."""
    row = entry.row
    address, pictures = "", 0
    if row.status == DONE and not row.file.endswith(".npz"):  # no browser shows it
        address = f"/clips/{quote(row.file, safe='')}?v={entry.version:.3f}"
        pictures = len(frames_of(state.out / row.file))
    return {
        **described(row),
        "address": address,
        "pictures": pictures,
        "pipeline": dict(row.job.pipeline),
        "priority": entry.priority,
        "paused": entry.paused,
        "stage": entry.stage,
        "step": entry.step,
        "steps": entry.steps,
    }


# The changes of a folder: they return names of jobs, or a number.


def add(desk: Desk, given: Given) -> Any:
    """{"job": fields of a job; its image is one that was sent}. Prompts may have choices, as in job files."""
    check_fields_of(given, {"job"})
    count, bad = desk.add([_fields(desk, given.get("job"))], words=Words())
    return _added(bad, count)


def again(desk: Desk, given: Given) -> Any:
    """{"name": a clip, "changes": fields of its job, null for those to leave out}"""
    check_fields_of(given, {"name", "changes"})
    name = given.get("name")
    check_text("name", name, MAX_WORDS)
    return _added(desk.again(str(name), _fields(desk, given.get("changes"))), 1)


def _fields(desk: Desk, given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise wrong("job", shown(given), "an object with fields of a job")
    check_fields(given, FIELDS - {"loras", "image_sha256"})  # these are files of this machine
    if isinstance(given.get("recipe"), str):
        raise wrong("recipe", shown(given["recipe"]), "what is in its file")
    if given.get("model") is not None and given["model"] not in desk.models():
        raise wrong("model", shown(given["model"]), "one that this folder has clips of")
    if given.get("image") is not None:
        return {**given, "image": kept_image(desk, given["image"])}
    return given


def _added(bad: list[Bad], count: int) -> int:
    if bad:
        raise SettingsError(bad[0].why)
    return count


def cancel(desk: Desk, given: Given) -> list[str]:
    return desk.cancel(choice_of(given))


def retry(desk: Desk, given: Given) -> list[str]:
    return desk.retry(choice_of(given))


def pause(desk: Desk, given: Given) -> list[str]:
    return desk.pause(choice_of(given) if given else None)


def resume(desk: Desk, given: Given) -> list[str]:
    return desk.resume(choice_of(given) if given else None)


def priority(desk: Desk, given: Given) -> list[str]:
    rest = {name: value for name, value in given.items() if name != "priority"}
    return desk.prioritise(choice_of(rest), given.get("priority"))  # type: ignore[arg-type]  # which it checks


def dismiss(desk: Desk, given: Given) -> int:
    check_fields_of(given, ())
    return desk.dismiss()


ACTIONS: dict[str, Callable[[Desk, Given], Any]] = {
    action.__name__: action for action in (add, again, cancel, retry, pause, resume, priority, dismiss)
}


def choice_of(given: Given) -> Choice:
    """{"names": [...], "words": "...", "statuses": [...], "every": true}, or some of these."""
    check_fields_of(given, {"names", "words", "statuses", "every"})
    names, words = given.get("names", []), given.get("words", "")
    statuses, every = given.get("statuses", []), given.get("every", False)
    if not isinstance(names, list) or len(names) > MAX_NAMES:
        raise wrong("names", shown(names), f"a list of {MAX_NAMES} names at most")
    for name in names:
        check_text("names", name, MAX_WORDS)
    check_text("words", words, MAX_WORDS)
    if not isinstance(statuses, list) or not all(isinstance(one, str) and one in STATUSES for one in statuses):
        raise wrong("statuses", shown(statuses), f"a list of some of {', '.join(STATUSES)}")
    if not isinstance(every, bool):
        raise wrong("every", shown(every), "true or false")
    return Choice(names, words, statuses, every)


def check_fields_of(given: Mapping[str, Any], fields: Any) -> None:
    for name in given:
        if name not in fields:
            raise wrong("request", shown(name), f"some of {', '.join(sorted(fields))}" if fields else "nothing in it")


def _number(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high):
        raise wrong(name, shown(text), f"a whole number from {low} to {high}")
    return int(text)
