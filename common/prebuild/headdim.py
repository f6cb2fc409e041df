"""headdim.json: which kernels an installation brings along compiled. docs/prebuild.md describes it.

Read by `setup.py`, `hopper/setup.py` and `python -m flash_attn_interface build`. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .. import env
from ..runtime import arch as arch_table

Pair = tuple[int, int]

DEFAULT_PAIRS: tuple[Pair, ...] = ((32, 64), (64, 128), (96, 192), (128, 256), (192, 128))
DEFAULT_ARCHS = ("80", "90a")
MAX_HEAD_DIM_QK, MAX_HEAD_DIM_V = 576, 512
DTYPES = ("bf16", "fp16")
MASKS = ("full", "causal", "local")
LAYOUTS = ("dense", "varlen")
EXTRAS = ("softcap", "alibi", "dropout", "deterministic")
FEATURES = (*MASKS, *LAYOUTS, "backward", "decode", *EXTRAS)
DEFAULT_FEATURES = ("full", "causal", "dense", "varlen", "backward", "decode")


class HeadDimError(ValueError):
    """The list of pairs cannot be used. The message names file and entry."""


@dataclass(frozen=True)
class Wanted:
    """What to prebuild.

    pairs: (head_dim_qk, head_dim_v). features: of FEATURES. archs: such as "sm_90a"; None: nothing
    is said about them.
    """

    pairs: tuple[Pair, ...] = DEFAULT_PAIRS
    dtypes: tuple[str, ...] = DTYPES
    features: tuple[str, ...] = DEFAULT_FEATURES
    archs: tuple[str, ...] | None = None

    def describe(self) -> str:
        """One line for people."""
        pairs = " ".join(f"({qk},{v})" for qk, v in self.pairs)
        return f"head dims {pairs}; {', '.join(self.dtypes)}; {', '.join(self.features)}"


def read(path: Path) -> Wanted:
    """The file's wishes; HeadDimError for a file that cannot be read or means nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadDimError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise HeadDimError(f"{path.name} is not JSON: {error}") from error
    return parse(content, path.name)


def parse(content: Any, name: str = "headdim.json") -> Wanted:
    """`content`: what the JSON holds. name: of the file, for messages."""
    record = {"pairs": content} if isinstance(content, list) else content
    if not isinstance(record, dict):
        _refuse(name, content, 'a list of pairs, or an object with "pairs"')
    known = ("pairs", "equal_dims", "dtypes", "features", "archs")
    for key in record:
        if key not in known:
            _refuse(f"{name}: key {key!r}", record[key], f"one of the keys {', '.join(known)}")
    pairs = [
        _pair(f"{name}: pairs[{index}]", entry)
        for index, entry in enumerate(_list(name, record, "pairs"))
    ]
    pairs += [
        (_head_dim(f"{name}: equal_dims[{index}]", entry),) * 2
        for index, entry in enumerate(_list(name, record, "equal_dims"))
    ]
    chosen = _list(name, record, "archs") if "archs" in record else None
    return Wanted(
        tuple(dict.fromkeys(pairs)),
        _choices(name, record, "dtypes", DTYPES, DTYPES),
        features(_choices(name, record, "features", FEATURES, DEFAULT_FEATURES), name),
        None if chosen is None else archs_of(chosen, f"{name}: archs"),
    )


def archs(wanted: Wanted) -> tuple[str, ...]:
    """What to compile for: the environment's choice, else the file's, else DEFAULT_ARCHS."""
    chosen = env.CUDA_ARCHS.get()
    if chosen is not None:
        return archs_of(chosen, env.CUDA_ARCHS.name)
    return archs_of(DEFAULT_ARCHS, "") if wanted.archs is None else wanted.archs


def features(chosen: Sequence[str], name: str) -> tuple[str, ...]:
    """`chosen`, where a mask or layout that nothing is said about means the default ones."""
    found = list(chosen)
    for group in (MASKS, LAYOUTS):
        if not set(group) & set(found):
            found += [feature for feature in DEFAULT_FEATURES if feature in group]
    if "deterministic" in found and "backward" not in found:
        _refuse(f"{name}: features", list(chosen), '"backward" too: only it can be deterministic')
    return tuple(feature for feature in FEATURES if feature in found)


def archs_of(entries: Sequence[Any], where: str) -> tuple[str, ...]:
    """`["80", "sm_90a", "8.9"]` -> ("sm_80", "sm_90a", "sm_89"); HeadDimError for unknown ones."""
    known = ", ".join(name[3:] for name in arch_table.known_archs())
    found = []
    for index, entry in enumerate(entries):
        number = str(entry).removeprefix("sm_").replace(".", "")
        plain = number.removesuffix("a")
        # Code for one GPU alone ("a") is known from Hopper on.
        if f"sm_{plain}" not in arch_table.known_archs() or (plain != number and int(plain) < 90):
            _refuse(f"{where}[{index}]", entry, f"one of {known}, or 90a")
        found.append(f"sm_{number}")
    return tuple(dict.fromkeys(found))


def _list(name: str, record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        _refuse(f"{name}: {key}", value, "a list")
    return value


def _choices(
    name: str, record: dict[str, Any], key: str, allowed: Sequence[str], default: tuple[str, ...]
) -> tuple[str, ...]:
    if key not in record:
        return default
    values = _list(name, record, key)
    for index, value in enumerate(values):
        if value not in allowed:
            _refuse(f"{name}: {key}[{index}]", value, f"one of {', '.join(allowed)}")
    if not values:
        _refuse(f"{name}: {key}", values, f"at least one of {', '.join(allowed)}")
    return tuple(value for value in allowed if value in values)


def _pair(where: str, entry: Any) -> Pair:
    if not isinstance(entry, list) or len(entry) != 2:
        _refuse(where, entry, "a pair [head_dim_qk, head_dim_v]")
    qk, v = entry
    if not (_is_head_dim(qk, MAX_HEAD_DIM_QK) and _is_head_dim(v, MAX_HEAD_DIM_V)):
        allowed = f"a head_dim_qk from 1 to {MAX_HEAD_DIM_QK}, a head_dim_v"
        _refuse(where, entry, f"{allowed} from 1 to {MAX_HEAD_DIM_V}, both integers")
    return int(qk), int(v)


def _head_dim(where: str, value: Any) -> int:
    if not _is_head_dim(value, MAX_HEAD_DIM_V):
        _refuse(where, value, f"an integer from 1 to {MAX_HEAD_DIM_V}")
    return int(value)


def _is_head_dim(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _refuse(where: str, given: Any, allowed: str) -> NoReturn:
    raise HeadDimError(f"{where} is {json.dumps(given)}: expected {allowed}")
