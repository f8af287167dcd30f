"""Counts launches of the attention kernel. Its tiles are larger meanwhile, because Triton's interpreter takes as long
for a small one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from stgfast.kernels import attention
from tests.kernels import interpreter  # noqa: F401  (repairs it)


@contextmanager
def launched() -> Iterator[list[tuple[int, int]]]:
    """For each launch, the number of its output rows, and how many of them are the identity."""
    launches: list[tuple[int, int]] = []
    kernel = attention.attention_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            def launch(q: Any, k: Any, v: Any, out: Any, sources: Any, identity: Any, *others: Any, **how: Any) -> None:
                launches.append((len(out), int(identity.sum()) if how["HAS_IDENTITY"] else 0))
                kernel[grid](q, k, v, out, sources, identity, *others, **how)

            return launch

    def larger(*given: Any) -> attention.Config:
        return config(*given)._replace(m=64, n=64)

    config = attention.config
    with mock.patch.object(attention, "attention_kernel", Counted()), mock.patch.object(attention, "config", larger):
        yield launches
