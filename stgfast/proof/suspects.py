"""Find the wrong fact of an adapter if engine and plain method differ: the one whose change makes them agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from stgfast.integrations.spec import Adapter
from stgfast.proof.links import Links

FLAGS = ("early", "learned_sigma", "float32")


def suspects(adapter: Adapter, links: Links, rows: int) -> Iterator[tuple[str, Adapter]]:
    """The same adapter with one fact changed, and the change in words.

    `rows` is the number of samples in a prediction.
    """
    blocks = adapter.blocks
    for name in FLAGS:
        other = not getattr(adapter, name)
        changed: dict[str, Any] = {name: other}
        yield f"{name}={other}", replace(adapter, **changed)
    yield f"full={not blocks.full}", replace(adapter, blocks=replace(blocks, full=not blocks.full))
    passed: set[Any] = {names for names in links.passed.values() if names and None not in names}
    seen = passed - {tuple(blocks.state)}
    for state in sorted(seen, key=str):
        yield f"state={state}", replace(adapter, blocks=replace(blocks, state=state))
    # Arguments by name whose first dimension is that of the samples of one prediction, or of several.
    counts = {name: value for given in links.arguments for name, value in given.items() if has_rows(value, rows)}
    missing = sorted(counts.keys() - blocks.rows)
    for names in [*([name] for name in missing), *([missing] if len(missing) > 1 else [])]:
        everything = blocks.rows | set(names)
        yield f"rows with {', '.join(names)} too", replace(adapter, blocks=replace(blocks, rows=everything))
    for name in sorted(blocks.rows - counts.keys()):
        yield f"rows without {name}", replace(adapter, blocks=replace(blocks, rows=blocks.rows - {name}))


def has_rows(value: Any, rows: int) -> bool:
    """Whether an argument may have one row for each sample."""
    if isinstance(value, dict):
        return any(has_rows(part, rows) for part in value.values())
    if isinstance(value, list | tuple):
        return any(has_rows(part, rows) for part in value)
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] % rows == 0 and value.shape[0] > 0
