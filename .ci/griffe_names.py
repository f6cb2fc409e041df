"""For the API reference: argument names that go over several lines are one entry.

softmax_scale, causal, window_size,
    return_attn_probs: as in `flash_attn_func`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = r"\w+(?:, \w+)*"
BROKEN = re.compile(rf"^( +{NAMES},)\n +(?={NAMES}[,:])", re.M)


class JoinNames(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text, count = BROKEN.subn(r"\1 ", obj.docstring.value)
        while count:
            text, count = BROKEN.subn(r"\1 ", text)
        obj.docstring.value = text
