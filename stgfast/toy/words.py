"""The tokenizer of the toy model, which knows few words and warns of others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast


class Tokenizer(PreTrainedTokenizerFast):
    """All words that the model was not trained on are one token."""

    def __call__(self, text: str | Sequence[str], *args: Any, **kwargs: Any) -> Any:
        prompts = [text] if isinstance(text, str) else text
        words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+|[^\w\s]+", prompt.lower()))
        known = self.get_vocab()
        unknown = [word for word in words if word not in known]
        if unknown:
            warnings.warn(
                f"prompt: got {', '.join(map(repr, unknown[:5]))}, which the toy model was not trained on; "
                f"it knows {', '.join(sorted(word for word in known if word.isalpha()))}",
                stacklevel=2,
            )
        return super().__call__(text, *args, **kwargs)
