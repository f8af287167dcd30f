"""A static page of the results: error by cost, and clips side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stgfast.pages import halves, safe
from stgfast.tune.search import front

if TYPE_CHECKING:
    from stgfast.tune.run import Tuned


def write_page(path: Path, tuned: Tuned, about: Mapping[str, Any]) -> None:
    best = front(tuned.trials)
    points = [
        {
            "recipe": str(trial.recipe),
            "solver": trial.recipe.solver or "the pipeline's own",
            "carried": trial.recipe.reuse_order is not None,
            "cost": trial.cost,
            "seconds": None if math.isnan(trial.times(tuned.usual)) else trial.times(tuned.usual),
            "distance": trial.distance,
            "clips": len(trial.distances),
            "best": any(trial is other for other in best),
            "usual": trial is tuned.usual,
            "chosen": trial is tuned.chosen,
        }
        for trial in tuned.trials
    ]
    data = {"aim": str(tuned.aim), "points": points, **about}
    before, after = halves("stgfast.tune", "page.html")
    path.write_text(f"{before}{safe(json.dumps(data, allow_nan=False))}{after}", encoding="utf-8")
