"""LoRAs of jobs: loaded before a batch denoises, and unloaded before the next one with others.

After unloading, the model's layers are its own again, so that a clip is equal to one rendered alone.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError
from stgfast.queue.job import Lora


class Loras:
    """The LoRAs that a pipeline has now."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.foreign = bool(getattr(pipe, "get_list_adapters", dict)())  # LoRAs that the user loaded
        self.now: tuple[Lora, ...] = ()

    def use(self, wanted: tuple[Lora, ...]) -> None:
        """Load these, and unload all others. Nothing denoises meanwhile."""
        if wanted == self.now:
            return
        if self.foreign:
            raise SettingsError("loras: got a pipeline that has some already, expected one without")
        if self.now:
            self.now = ()
            self.pipe.unload_lora_weights()
        try:
            for number, lora in enumerate(wanted):
                self._load(lora, f"lora_{number}")
            if wanted:
                self.pipe.set_adapters([f"lora_{n}" for n in range(len(wanted))], [lora.weight for lora in wanted])
        except BaseException:
            self.pipe.unload_lora_weights()
            raise
        self.now = wanted

    def _load(self, lora: Lora, name: str) -> None:
        second = {"load_into_transformer_2": True} if lora.second else {}
        self.pipe.load_lora_weights(lora.path, adapter_name=name, **second)
        if not any(name in names for names in self.pipe.get_list_adapters().values()):
            raise SettingsError(f"loras: got {Path(lora.path).name!r}, a file without weights for this model")


def lacking(kind: type[Any], loras: tuple[Lora, ...]) -> str:
    """What a pipeline lacks for these LoRAs, or ""."""
    import importlib.util

    if not loras:
        return ""
    if not hasattr(kind, "load_lora_weights"):
        return f"none: {kind.__name__} takes none"
    if importlib.util.find_spec("peft") is None:
        return "peft installed: pip install 'stgfast[lora]'"
    takes = "load_into_transformer_2" in inspect.getsource(kind.load_lora_weights)
    if any(lora.second for lora in loras) and not takes:
        return f"none for a second model: {kind.__name__} loads them into the first one"
    return ""
