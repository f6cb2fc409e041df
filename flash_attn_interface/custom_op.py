"""Custom operations from explicit schemas. Used by `ops.py` and `private_ops.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

_HAS_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters


def custom_op(
    name: str, schema: str, *, random: bool = False
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: the operation `name`, on every device.

    The schema is spelled out because it is a contract with callers and because what torch infers
    from annotations differs between its versions. Arguments that it marks with (x!) are mutated.
    random: draws random numbers, which checkpointing has to repeat when it computes again.
    """
    options: dict[str, Any] = {}
    if random and _HAS_TAGS:
        options["tags"] = (torch.Tag.nondeterministic_seeded,)
    arguments = schema.split(" -> ")[0].strip("()").split(", ")
    mutated = [part.split()[1].split("=")[0] for part in arguments if "!)" in part]
    decorator: Callable[[Callable[..., Any]], CustomOpDef] = torch.library.custom_op(
        name, mutates_args=mutated, schema=schema, **options
    )
    return decorator
