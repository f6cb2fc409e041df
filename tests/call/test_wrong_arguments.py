"""One wrong argument at a time, for every public function: what is raised is an exception that the
docstrings name, in words that name the argument, and comes from a check, not from inside torch.

Nothing has to be raised: many of the values are right somewhere.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import pytest
import torch
from torch import Tensor
from wrong_argument_cases import ALSO_NAMED, FUNCTIONS, Case

import flash_attn_interface
from flash_attn_interface._common.ask import check_values

DOCUMENTED = (TypeError, ValueError, NotImplementedError)
PACKAGE = str(Path(flash_attn_interface.__file__).parent)
OURS = (PACKAGE, str(Path(check_values.__file__).parents[1]))
BF16 = torch.bfloat16


class Opaque:
    """An object that nobody expects."""

    def __repr__(self) -> str:
        return "<opaque>"


SCALARS: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 257, 2**31, 2**63, 2**70, -(2**63), 10**400, 0.0, 0.125,
    -1.5, 1e-46, 1e300, float("nan"), float("inf"), 1j, "False", "", "mean", b"x", (), [], [1],
    [1, 2], (1, 2, 3), (-1, None), (0.5, 0.5), (torch.ones(2), 1), {}, {1, 2}, {0: 1, 1: 2},
    object, len, torch.bfloat16, torch.int32, torch.device("cpu"), np.bool_(True),
    np.float32(0.5), np.int64(2), np.zeros(3, np.int32), range(2), slice(None), Opaque(),
)  # fmt: skip


def tensors(good: Any) -> Iterator[Tensor]:
    """Wrong relatives of a good tensor, and some that have nothing to do with it."""
    yield torch.tensor(1)
    yield torch.tensor(1.5)
    yield torch.tensor(True)
    yield torch.zeros(0)
    yield torch.zeros(2, dtype=torch.int32)
    yield torch.tensor([[-5, 3]], dtype=torch.int32)
    yield torch.tensor([0, 2**31 - 1, -1], dtype=torch.int32)
    yield torch.zeros(2, 3, 4, 5, 6, dtype=BF16)
    yield torch.zeros(1, 1, 1, 1, dtype=BF16, device="meta")
    yield torch.zeros(2, dtype=torch.int32, device="meta")
    yield torch.eye(3).to_sparse()
    yield torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    yield torch.nested.nested_tensor(
        [torch.zeros(2, 2, 16), torch.zeros(1, 2, 16)], layout=torch.jagged, dtype=BF16
    )
    if not isinstance(good, Tensor):
        return
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool,
        torch.complex64, torch.float8_e4m3fn, torch.uint8,
    ):  # fmt: skip
        yield good.to(dtype)
    for axis, size in enumerate(good.shape):
        yield good.narrow(axis, 0, 0)
        yield good.narrow(axis, 0, max(size - 1, 0))
        yield torch.cat([good, good.narrow(axis, 0, 1)], axis)
        yield torch.cat([good] * 20, axis)
        yield good.narrow(axis, 0, 1).expand(good.shape)
        yield good.select(axis, 0)
    yield good[None]
    yield good.mT.contiguous().mT if good.ndim > 1 else torch.stack((good, good), 1)[:, 0]
    yield good.mT if good.ndim > 1 else good.flip(0)
    yield good.to("meta")
    yield good.to_sparse()
    yield torch.nested.as_nested_tensor(list(good)) if good.ndim > 1 else good[:0]
    if good.dtype.is_floating_point:
        yield good.detach().clone().requires_grad_()
        yield good * float("nan")
    else:
        yield good * -1
        yield good + 1000
        yield good.flip(0)


def wrong_values(parameter: str, good: Any) -> list[Any]:
    too_large = (2**31,) if parameter in SIZES else ()  # for this machine, not for the function
    scalars = (x for x in SCALARS if not (isinstance(x, int) and x in too_large))
    return [*scalars, *tensors(good)]


SIZES = ("first_axis_dim", "batch", "seqlen")


def problem_with(error: BaseException, wrong: Iterable[str]) -> str | None:
    """What is wrong with the exception, if anything is. wrong: the arguments that are."""
    if type(error) not in DOCUMENTED:
        return "is no documented type"
    names = {alias for name in wrong for alias in (name, *ALSO_NAMED.get(name, ()))}
    if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in names):
        return "does not name the argument"
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if not innermost.startswith(OURS):
        return "is torch's own"
    return None


def complaint(case: Case, good: dict[str, Any], wrong: dict[str, Any]) -> str | None:
    """Calls with these wrong values among good ones; what to complain about."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call({**good, **wrong})
    except BaseException as error:
        found = problem_with(error, wrong)
        if found is None:
            return None
        place = traceback.extract_tb(error.__traceback__)[-1]
        given = ", ".join(f"{name}={described(value)}" for name, value in wrong.items())
        return (
            f"{case.name}({given}): {type(error).__name__} {found}: {str(error)[:160]!r} at "
            f"{Path(place.filename).name}:{place.lineno}"
        )
    return None


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:40] if value != 10**400 else "10**400"
    kind = "nested" if value.is_nested else str(tuple(value.shape))
    return f"<{kind} {value.dtype} {value.layout} {value.device}>"


def test_the_arguments_that_are_changed_are_good() -> None:
    for case in FUNCTIONS:
        case.call(case.good())


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
def test_a_wrong_argument_is_named(case: Case) -> None:
    """Every value for every parameter."""
    good = case.good()
    found = []
    for name in case.parameters():
        for value in wrong_values(name, good.get(name)):
            found.append(complaint(case, good, {name: value}))
            if found[-1] is not None:
                good = case.good()  # the call may have written to them
    complaints = [each for each in found if each is not None]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)
def test_one_of_two_wrong_arguments_is_named(case: Case) -> None:
    """Pairs, drawn: a check may not lean on another argument that has not been checked."""
    parameters = case.parameters()
    found = []
    for _ in range(60 if len(parameters) > 1 else 0):
        good = case.good()
        names = inputs.SEEDS.sample(parameters, 2)
        wrong = {name: inputs.SEEDS.choice(wrong_values(name, good.get(name))) for name in names}
        found.append(complaint(case, good, wrong))
    complaints = [each for each in found if each is not None]
    assert not complaints, "\n" + "\n".join(complaints)
