"""What a kernel tree refuses, as the difference between what a problem needs and what it serves.

Each backend declares a set of names, those of `Problem.needs`. A name that is in no set, that of a
feature which is new, is refused by all: no kernel can pass over what it has never heard of.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

FEATURES = frozenset(
    {
        "alibi",
        "append",
        "attention_chunk",
        "cache_batch_idx",
        "causal",
        "dropout",
        "kv_cache",
        "leftpad",
        "pages",
        "qv",
        "rotary",
        "s_dmask",
        "seqused",
        "softcap",
        "splits",
        "varlen",
        "window",
    }
)
"""All that a call can ask for today."""


def unserved(
    needs: Set[str], serves: Set[str], reasons: Mapping[str, str] | None = None
) -> str | None:
    """Why a backend that serves these features cannot serve what is needed; None if it can.

    reasons: in its own words, the first that applies; for other features the words are general.
    """
    missing = needs - serves
    if not missing:
        return None
    for name, reason in (reasons or {}).items():
        if name in missing:
            return reason
    return f"it has no kernels with {' and '.join(sorted(missing))}"
