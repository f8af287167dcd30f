"""Check the estimate of `stgfast render --plan`: render twenty clips of the model in the package, then more.

python bench/forecast.py --clips 40
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from stgfast import toy
from stgfast.render.run import render


def jobs(count: int, first: int) -> list[dict[str, Any]]:
    return [{"prompt": toy.PROMPTS[n % len(toy.PROMPTS)], "seed": n} for n in range(first, first + count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=int, default=20, help="clips that the forecast goes by")
    parser.add_argument("--clips", type=int, default=40, help="clips that are forecast")
    parser.add_argument("--max-batch", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, events = Path(folder), []
        settings = {"listener": events.append, "max_batch": given.max_batch}
        render("toy", jobs(given.before, 0), out, **settings)
        later = jobs(given.clips, given.before)
        render("toy", later, out, plan_only=True, **settings)
        (said,) = [event for event in events if event["event"] == "forecast"]
        times: list[float] = []

        def listener(event: dict[str, Any]) -> None:
            if event["event"] in ("claimed", "done"):
                times.append(time.monotonic())

        before = sum(path.stat().st_size for path in out.glob("*.mp4"))
        render("toy", later, out, **{**settings, "listener": listener})
        took = times[-1] - times[0]
        size = sum(path.stat().st_size for path in out.glob("*.mp4")) - before
    row = {"forecast": said["seconds"], "took": round(took, 3), "off": round(said["seconds"] / took - 1, 3)}
    print(json.dumps({**row, "bytes": said["bytes"], "were": size, "off in bytes": round(said["bytes"] / size - 1, 3)}))


if __name__ == "__main__":
    main()
