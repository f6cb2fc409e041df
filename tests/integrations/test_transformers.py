"""transformers models through "flexible_attention" against their eager implementation.

Tiny models with random weights, made from configurations; nothing is downloaded.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")
integration = pytest.importorskip("flash_attn_interface.integrations.transformers")

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 4, "moe_intermediate_size": 24}
LAYERS = ["sliding_attention", "full_attention"]
# All experts, so that rounding changes no choice of them.
# model type -> what its configuration has besides SHAPE; windows are shorter than the sequences.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8, "sliding_window": 4, "layer_types": LAYERS, "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": LAYERS},
    "deepseek_v3": dict(
        num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, **EXPERTS,
    ),
    "gpt_oss": {
        "head_dim": 8, "sliding_window": 4, "layer_types": LAYERS, "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
    "mimo_v2_flash": dict(
        head_dim=12, v_head_dim=8, swa_head_dim=12, swa_v_head_dim=8, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, sliding_window=4, layer_types=LAYERS, n_routed_experts=4,
        n_group=1, topk_group=1, **EXPERTS,
    ),
    "modernbert": {
        "local_attention": 8, "global_attn_every_n_layers": 2,
        "cls_token_id": None, "sep_token_id": None,
    },
}  # fmt: skip
DECODERS = [name for name in MODELS if name != "modernbert"]
HAS_SINKS = ("gpt_oss", "mimo_v2_flash")
HALF = torch.float16


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are made there; on the CPU the reference serves the calls."""
    with torch.device(request.param):
        yield


@functools.cache
def made(name: str) -> Any:
    """In float32, with weights that float16 holds exactly."""
    config = transformers.AutoConfig.for_model(name, **{**SHAPE, **MODELS[name]})
    kind = "AutoModelForMaskedLM" if name == "modernbert" else "AutoModelForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.to("cpu", HALF).float().eval()


def prepared(name: str, implementation: str, dtype: torch.dtype) -> Any:
    model = made(name).to(torch.get_default_device(), dtype)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    return model


def three_times(function: Callable[..., Any]) -> list[Any]:
    """Of ours, of eager in the same precision, which is the yardstick, and of eager in float32."""
    ways = ((integration.NAME, HALF), ("eager", HALF), ("eager", torch.float32))
    return [function(*way) for way in ways]


def compare(found: Any, eager: Any, exact: Any) -> None:
    """Tensors by name: the norm of our error is at most twice that of eager's (gradients: four
    times), or of what eager's median relative error makes it, since a parameter of few numbers can
    be right by chance. That is about 1 % of a gradient; a window one off gives 10 % and more."""
    assert found.keys() == eager.keys() == exact.keys()
    ours, theirs = (
        {n: float((x[n].float() - exact[n]).norm()) for n in exact} for x in (found, eager)
    )
    norms = {name: float(right.norm()) for name, right in exact.items()}
    usual = statistics.median(theirs[name] / norms[name] for name in exact if norms[name])
    for name, error in ours.items():
        factor = 2 if name.startswith(("logits", "step")) else 4
        allowed = factor * max(theirs[name], usual * norms[name])
        assert error <= allowed, (name, error, allowed, norms[name])


def run(model: Any, rows: torch.Tensor, **inputs: Any) -> dict[str, Any]:
    """Logits where `rows`, and all gradients of their sum of squares."""
    logits = model(**inputs).logits[rows]
    logits.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (batch, length))


def padding(side: str, batch: int = 3, length: int = 11) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    if side == "left":
        mask[0, :4] = mask[2, :1] = 0
    elif side == "right":
        mask[0, -4:] = mask[2, -1:] = 0
    return mask


@pytest.mark.parametrize("side", ["no", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name: str, side: str):
    mask = padding(side)
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    results = three_times(lambda *way: run(prepared(name, *way), mask.bool(), **inputs))
    compare(*results)
    assert any("sink" in parameter for parameter in results[0]) == (name in HAS_SINKS)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences(name: str):
    """Against each sequence alone: eager gpt_oss lets packed sequences see each other."""
    lengths = (5, 1, 7)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def result(implementation: str, dtype: torch.dtype) -> dict[str, Any]:
        model = prepared(name, implementation, dtype)
        if implementation == integration.NAME:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        else:
            logits = torch.cat([model(input_ids=x).logits[0] for x in ids.split(lengths, 1)])
        logits.float().square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), **gradients}

    compare(*three_times(result))


class Forced(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
    """Generates given tokens, so that rounding cannot lead to others."""

    def __init__(self, wanted: torch.Tensor, prompt: int) -> None:
        self.wanted, self.prompt = wanted, prompt

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.wanted[:, ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["no", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, side: str, cache: str):
    """Beyond the window, so that static sliding caches roll over."""
    mask = padding(side, 3, 6)
    ids, wanted = tokens(*mask.shape), tokens(3, 6)

    def result(implementation: str, dtype: torch.dtype) -> dict[str, Any]:
        answer = prepared(name, implementation, dtype).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False,
            output_logits=True, return_dict_in_generate=True, disable_compile=True,
            logits_processor=[Forced(wanted, 6)],
            cache_implementation=cache if implementation == integration.NAME else "dynamic",
        )  # fmt: skip
        assert torch.equal(answer.sequences[:, 6:], wanted)
        return {f"step {i}": logits for i, logits in enumerate(answer.logits)}

    compare(*three_times(result))


def test_nothing_pads_the_values(monkeypatch):
    seen = []
    plain = integration.flash_attn_func

    def watched(q, k, v, **options):
        seen.append((q.shape[-1], v.shape[-1]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(integration, "flash_attn_func", watched)
    model = prepared("deepseek_v3", integration.NAME, HALF)
    model(input_ids=tokens(1, 5))
    assert seen == [(12, 6)] * 2


def test_padding_between_tokens_is_refused():
    """Right padding followed by generated tokens; windows would be counted wrongly."""
    model, mask = prepared("llama", integration.NAME, HALF), padding("no")
    mask[1, 4] = 0
    with pytest.raises(NotImplementedError, match="padding between tokens.*on the left"):
        model(input_ids=tokens(*mask.shape), attention_mask=mask)


def test_mask_of_the_caller_is_refused():
    model = prepared("llama", integration.NAME, HALF)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="made by the caller"):
        model(input_ids=tokens(1, 5), attention_mask=mask)


def test_mask_beyond_windows_and_packing_is_refused():
    from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay

    chunks = and_masks(chunked_overlay(4, torch.zeros(1)), causal_mask_function)
    with pytest.raises(NotImplementedError, match="chunked_overlay"):
        integration.bounds_of_mask(1, 8, 8, mask_function=chunks)


def test_a_row_of_nothing_but_padding():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    bounds = integration.bounds_of_mask(2, 5, 5, attention_mask=mask)
    q = torch.randn(2, 2, 5, 4, dtype=HALF, requires_grad=True)
    module = torch.nn.Module()
    out, _ = integration.attention(module, q, q, q, bounds)
    assert out.shape == (2, 5, 2, 4) and not out[0].any() and out[1].all()
