"""Tensors that somebody watches: subclasses, modes, transforms, traces, pending negations.

Every public function either gives what it gives for plain tensors, or says why not. `cpu` runs the
reference, `sim` the dispatch of kernels (by the reference as well), `gpu` kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from public_calls import FUNCTIONS, Operators, check_same, every_function, mapped, run, steps
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from flash_attn_interface.call import traced

BF16 = torch.bfloat16


class Functions(TorchFunctionMode):
    """Likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Knows nothing but its type."""


@every_function
def test_plain_tensors_take_the_direct_way(device, make, monkeypatch):
    def no_operators(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("an operator was called")

    for operation in ("_flash_attn_forward", "_flash_attn_varlen_forward", "attention_forward"):
        monkeypatch.setattr(traced, operation, no_operators)
    with Watch("flash_attn") as seen:
        run(make(device))
        torch.set_default_device(device)
        try:
            run(make(device))
        finally:
            torch.set_default_device(None)
    assert not seen.names


class Watch:
    """The operators that torch's profiler sees, which watches without changing anything."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.names: list[str] = []

    def __enter__(self) -> Watch:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        self.names = [event.name for event in self._profile.events() if self._part in event.name]


@every_function
def test_dispatch_modes_see_an_operator(device, make):
    mode = Operators()
    check_same(made := make(device), mapped(lambda tensor: tensor, made), mode)
    assert len(mode.names) == 1


@every_function
def test_function_modes_see_an_operator(device, make):
    mode = Functions()
    check_same(made := make(device), mapped(lambda tensor: tensor, made), mode)
    assert any("flash_attn" in name for name in mode.names)


@every_function
def test_subclasses(device, make):
    check_same(made := make(device), mapped(lambda tensor: tensor.as_subclass(Subclass), made))


@every_function
def test_results_of_collectives_are_waited_for(device, make):
    made = make(device)
    check_same(made, mapped(AsyncCollectiveTensor, made))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
def test_lengths_from_collectives_are_waited_for(device, name: str):
    made = function, arguments = FUNCTIONS["fa3-varlen"](device)
    watched = dict(arguments) | {name: AsyncCollectiveTensor(arguments[name].clone())}
    check_same(made, (function, watched))


@every_function
def test_a_pending_negation_of_lengths_is_applied(device, make):
    """Kernels would take them for addresses far outside."""

    def negated(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_floating_point() else torch._neg_view(tensor.neg())

    check_same(made := make(device), mapped(negated, made))


@every_function
def test_a_pending_negation_is_applied(device, make):
    def negated(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch._neg_view(tensor.neg())

    made = make(device)
    watched = mapped(negated, made)
    if "k" in made[1].get("tensors", {}):
        with pytest.raises(NotImplementedError, match=r"pass k_cache.resolve_neg\(\)"):
            run(watched)
        for name in ("k_cache", "v_cache"):
            watched[1]["tensors"][name] = watched[1]["tensors"][name].resolve_neg()
    check_same(made, watched)


@every_function
def test_meta_and_fake_tensors_have_the_shapes_of_the_results(device, make):
    from torch._subclasses import FakeTensorMode

    made = make(device)
    want, _ = run(mapped(lambda tensor: tensor, made))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = run(mapped(mode.from_tensor, made))
    meta, _ = run(mapped(lambda tensor: tensor.to("meta"), made))
    for mine, theirs in zip((*fake, *meta), (*want, *want), strict=True):
        assert mine.is_meta or mine.device.type == device.type
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert steps(mine) == steps(theirs)


@every_function
def test_one_meta_tensor_among_others_is_an_error(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and name != "qkv":
            changed = tensors | {name: value.to("meta")}
            changed = {"tensors": changed} if "tensors" in arguments else changed
            with pytest.raises(ValueError, match="on meta|on cpu|on cuda"):
                function(**changed)


@every_function
def test_make_fx_records_an_operator(device, make):
    function, arguments = made = make(device)
    if "tensors" in arguments:
        tensors, others = arguments["tensors"], {}
    else:
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
    length = tensors.get("max_seqlen_q")

    def of_list(*values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True)) | ({"max_seqlen_q": length} if length else {})
        return function(tensors=named) if "tensors" in arguments else function(**named, **others)

    names = [name for name, x in tensors.items() if isinstance(x, Tensor)]
    graph = make_fx(of_list)(*(tensors[name].clone() for name in names))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("flash_attn" in target for target in targets) == 1
    want, _ = run(mapped(lambda tensor: tensor, made))
    got = graph(*(tensors[name].clone() for name in names))
    for mine, theirs in zip([got] if isinstance(got, Tensor) else got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@every_function
def test_jit_trace_records_an_operator(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    first = next(name for name in ("q", "qkv", "out_partial") if name in tensors)

    def of_first(x: Tensor) -> Any:
        changed = {name: y.clone() if isinstance(y, Tensor) else y for name, y in tensors.items()}
        changed[first] = x
        return function(tensors=changed) if "tensors" in arguments else function(**changed)

    with torch.no_grad():
        recorded = torch.jit.trace(of_first, (tensors[first],), check_trace=False)
        assert "flash_attn" in str(recorded.graph)
        other = torch.randn_like(tensors[first])
        for mine, theirs in zip(recorded(other), of_first(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@every_function
def test_vmap_is_a_loop(device, make):
    function, arguments = make(device)
    tensors = arguments.get("tensors", arguments)
    first = next(name for name in ("q", "qkv", "out_partial") if name in tensors)

    def of_first(x: Tensor) -> Any:
        changed = tensors | {first: x}
        results = function(tensors=changed) if "tensors" in arguments else function(**changed)
        return results if isinstance(results, Tensor) else results[0]

    if "k" in tensors and "k_cache" in tensors:
        with pytest.raises(NotImplementedError, match="under torch.vmap"):
            torch.vmap(of_first)(torch.stack([tensors[first]] * 2))
        return
    several = torch.stack([tensors[first], torch.randn_like(tensors[first])])
    got = torch.vmap(of_first)(several)
    want = torch.stack([of_first(one) for one in several])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [FUNCTIONS["fa3-kvcache"], FUNCTIONS["fa2-kvcache-append"]])
def test_caches_have_no_gradient_under_transforms(device, make):
    function, arguments = make(device)
    tensors = arguments["tensors"]

    def of_q(q: Tensor) -> Tensor:
        return function(tensors=tensors | {"q": q})[0].float().sum()

    with pytest.raises(NotImplementedError, match="no backward"):
        torch.func.grad(of_q)(tensors["q"])
