"""Custom operations from explicit schemas. Used by `ops.py`, `fa2_ops.py` and their like."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.compiler import is_compiling

from .._common.ask.check_tensors import require_device, require_tensor
from .._common.ask.check_values import flag, optional_flag

_OPTIONAL = ("pack_gqa",)  # flags of type "bool?"
_HAS_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters


class Argument(NamedTuple):
    """One argument of a schema."""

    name: str
    is_flag: bool
    is_mutated: bool


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
    arguments = arguments_of(schema)
    decorator: Callable[[Callable[..., Any]], CustomOpDef] = torch.library.custom_op(
        name,
        mutates_args=[each.name for each in arguments if each.is_mutated],
        schema=schema,
        **options,
    )

    def checked(function: Callable[..., Any]) -> CustomOpDef:
        operation = decorator(function)
        # Clients look for a CustomOpDef, which torch alone can make.
        operation.__class__ = _CheckedOp
        assert isinstance(operation, _CheckedOp)
        operation.names = [each.name for each in arguments]
        operation.flags = [(i, each.name) for i, each in enumerate(arguments) if each.is_flag]
        return operation

    return checked


def arguments_of(schema: str) -> list[Argument]:
    """Of "[name](type argument=default, ...) -> ..."."""
    listed = schema[schema.index("(") + 1 :].split(") -> ")[0].split(", ")
    return [
        Argument(
            name=part.split()[1].split("=")[0],
            is_flag=part.startswith("bool"),
            is_mutated="!)" in part,
        )
        for part in listed
    ]


class _CheckedOp(CustomOpDef):
    """Says in our words what torch's dispatcher says in its own, or takes without a word: for a
    bool anything that has a truth value."""

    names: list[str]
    flags: list[tuple[int, str]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]
        for i, name in self.flags:
            value = args[i] if i < len(args) else kwargs.get(name, False)
            if value is not True and value is not False:
                value = optional_flag(name, value) if name in _OPTIONAL else flag(name, value)
                if i < len(args):
                    args = (*args[:i], value, *args[i + 1 :])
                else:
                    kwargs[name] = value
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            ours = argument_error(error)
            if ours is not None:
                raise ours from None
            for name, value in (dict(zip(self.names, args, strict=False)) | kwargs).items():
                if isinstance(value, Tensor):
                    require_tensor(name, value)  # torch finds no kernel for nested and sparse ones
            raise

    def register_fake(self, function: Callable[..., Any], /) -> Callable[..., Any]:
        super().register_fake(on_one_device(function, self.names))
        return function


def on_one_device(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """A fake that refuses a meta tensor among others: torch would take the fake's result, which is
    uninitialised memory, for that of the call."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        leader = "q" if "q" in tensors else next(iter(tensors))
        for name, value in tensors.items():
            require_device(name, value, tensors[leader].device, leader)
        return function(*args, **kwargs)

    return fake


_MISMATCH = re.compile(
    r"\S+\(\) Expected a value of type '(?P<type>[^']*)' for argument '(?P<name>\w+)' "
    r"but instead found type '(?P<found>[^']*)'"
)
_MISSING = re.compile(r"\S+\(\) is missing value for argument '(?P<name>\w+)'")


def argument_error(error: RuntimeError) -> TypeError | None:
    """What torch's dispatcher says about an argument's type, as the exception that Python has for
    it; None if it says something else."""
    text = str(error)
    if match := _MISMATCH.match(text):
        return TypeError(f"{match['name']} is {match['found']}: expected {match['type']}")
    if match := _MISSING.match(text):
        return TypeError(f"{match['name']} is missing")
    return None
