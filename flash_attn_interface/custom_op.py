"""Custom operations from explicit schemas. Used by all modules that define operations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def fake_of(operation: CustomOpDef) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: computes the shapes of the operation's results, for meta and fake tensors.

    ValueError where they are on several devices: one meta tensor among others brings a call here,
    and whoever made it would take uninitialised memory for the result.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        schema: Any = operation._opoverload._schema
        checked = on_one_device(fake, [argument.name for argument in schema.arguments])
        operation.register_fake(checked)
        return fake

    return register


def on_one_device(fake: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """`fake`, which first looks at the devices of its arguments, whose names these are."""

    @functools.wraps(fake)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        given = [*zip(names, arguments, strict=False), *keywords.items()]
        tensors = [(name, value) for name, value in given if isinstance(value, Tensor)]
        first, leader = tensors[0]
        for name, tensor in tensors[1:]:
            if tensor.device != leader.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but {first} is on {leader.device}: move them "
                    "to one device"
                )
        return fake(*arguments, **keywords)

    return checked
