"""FlashAttention-2's module names: each is there, or the error of its import says what to use."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_interface.compat.missing_modules import INSTEAD, install

# What flash-attn 2.8.4 and its predecessors from 1.0 on ship as Python modules, `cute` aside, which
# is flash-attn-4's.
UPSTREAM = """
bert_padding flash_attention flash_attn_interface flash_attn_triton flash_attn_triton_amd
flash_attn_triton_og flash_blocksparse_attention flash_blocksparse_attn_interface fused_softmax
layers layers.patch_embed layers.rotary losses losses.cross_entropy losses.cross_entropy_parallel
models models.baichuan models.bert models.bigcode models.btlm models.falcon models.gpt
models.gpt_neox models.gptj models.llama models.opt models.vit
modules modules.block modules.embedding modules.mha modules.mlp
ops ops.activations ops.fused_dense ops.gelu_activation ops.layer_norm ops.rms_norm ops.triton
ops.triton.cross_entropy ops.triton.k_activations ops.triton.layer_norm ops.triton.layernorm
ops.triton.linear ops.triton.mlp ops.triton.rotary
utils utils.benchmark utils.distributed utils.generation utils.library utils.pretrained
utils.testing utils.torch
""".split()


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_module_of_upstream_is_there_or_says_what_to_use(name: str):
    module = f"flash_attn.{name}"
    known = any(module == each or module.startswith(f"{each}.") for each in INSTEAD)
    if not known:
        importlib.import_module(module)
        return
    with pytest.raises(
        ModuleNotFoundError, match=r"No module named .* Instead: \w+.*\.$"
    ) as caught:
        importlib.import_module(module)
    assert module.startswith(str(caught.value.name))


def test_every_advice_is_about_a_module_of_upstream():
    assert {name.removeprefix("flash_attn.") for name in INSTEAD} <= set(UPSTREAM)


def test_asking_whether_a_module_is_there_is_no_error():
    for name in ("modules", "utils", "ops.rms_norm", "ops.triton.linear", "nonsense"):
        assert importlib.util.find_spec(f"flash_attn.{name}") is None
    with pytest.raises(ModuleNotFoundError, match="^No module named 'flash_attn.nonsense'$"):
        importlib.import_module("flash_attn.nonsense")
    with pytest.raises(ModuleNotFoundError, match="^No module named 'nonsense'$"):
        importlib.import_module("nonsense")


def test_the_finder_is_the_last_and_only_one():
    install()
    ours = [
        finder for finder in sys.meta_path if "missing_modules" in getattr(finder, "__module__", "")
    ]
    assert len(ours) == 1


def test_another_distribution_may_ship_such_a_module(tmp_path: Path):
    package = tmp_path / "flash_attn" / "modules"
    package.mkdir(parents=True)
    (package / "mha.py").write_text("MHA = 1\n")
    program = (
        "import sys; import flash_attn; "
        f"flash_attn.__path__.append({str(tmp_path / 'flash_attn')!r}); "
        "from flash_attn.modules.mha import MHA; assert MHA == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
