"""Clients find the two distributions, installed as users do it, by their own ways of looking.

What each client looks for is in client_probes.py, which runs in an interpreter of its own.
docs/clients.md is the table of this for users.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from installs import ROOT, build_wheel, copy_checkout, run

from flash_attn_interface.version import RELEASE

pytestmark = pytest.mark.skipif(
    find_spec("setuptools") is None or find_spec("pip") is None,
    reason="setuptools and pip are not installed in this environment",
)
PROBES = ROOT / "tests" / "support" / "client_probes.py"
OFFLINE = ("--quiet", "--no-deps", "--no-index")
EDITABLE = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with what is installed: the main distribution alone, both, both editable."""
    top = tmp_path_factory.mktemp("clients")
    source = copy_checkout(top / "source")
    for name, folder in (("main", source), ("hopper", source / "hopper")):
        build_wheel(folder, top / name)
        (top / f"editable-{name}").mkdir()
        run(sys.executable, "-c", EDITABLE, top / f"editable-{name}", cwd=folder)
    contents = {
        "main alone": ["main"],
        "both": ["main", "hopper"],
        "editable": ["editable-main", "editable-hopper"],
    }
    for name, parts in contents.items():
        wheels = [wheel for part in parts for wheel in (top / part).glob("*.whl")]
        assert len(wheels) == len(parts)
        pip = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target", top / name]
        run(*pip, *wheels, cwd=top)
    return {name: top / name for name in contents}


@pytest.fixture(scope="module")
def answers(sites: dict[str, Path]) -> dict[str, Any]:
    """Site -> client -> what it finds there."""
    return {
        name: json.loads(run(sys.executable, PROBES, site, cwd=site.parent))
        for name, site in sites.items()
    }


HOPPER_IS_HERE = any(
    distribution.metadata["Name"] == "flash-attn-3" for distribution in metadata.distributions()
)
ALONE = pytest.param(
    "main alone",
    marks=pytest.mark.skipif(HOPPER_IS_HERE, reason="flash-attn-3 is installed here"),
)
SITES = [ALONE, "both", "editable"]


@pytest.mark.parametrize("site", SITES)
def test_metadata(answers, site: str):
    """Names, versions, owners: all that most clients look at before they import."""
    answer = answers[site]["metadata_only"]
    hopper = ["flash-attn-3"] if site != "main alone" else []
    for mapping in ("owners", "owners_3_10"):
        assert {name: sorted(set(found)) for name, found in answer[mapping].items()} == {
            "flash_attn": ["flash-attn"],
            "flash_attn_2_cuda": ["flash-attn"],
            "flash_attn_interface": ["flash-attn", *hopper],
            "flash_attn_3": hopper,
        }
    versions = {"flash-attn": "2.8.3", "flash_attn": "2.8.3"}
    versions |= dict.fromkeys(("flash-attn-3", "flash_attn_3"), "3.0.0" if hopper else None)
    assert answer["versions"] == versions
    assert answer["specs"]["flash_attn_3"] == bool(hopper)
    assert all(found for name, found in answer["specs"].items() if name != "flash_attn_3")


def test_no_file_belongs_to_both(sites):
    """pip would let the later one overwrite the earlier one's, and remove it with either."""
    records = [
        {line.split(",")[0] for line in path.read_text().splitlines()}
        for path in sites["both"].glob("flash_attn*.dist-info/RECORD")
    ]
    assert len(records) == 2 and not records[0] & records[1]


@pytest.mark.parametrize("site", SITES)
def test_transformers(answers, site: str):
    answer = answers[site]["transformers"]
    assert answer == {
        "fa2": True,
        "fa3": site != "main alone",
        "fa4": False,
        "lacking": [],
        "flash_attn takes": [
            "dropout_p", "window_size", "deterministic", "softcap", "max_seqlen_q", "s_aux",
        ],
        "flash_attn pages": "block_table",
        "flash_attn hides": False,
        "flash_attn_interface takes": [
            "window_size", "deterministic", "softcap", "max_seqlen_q", "s_aux",
        ],
        "flash_attn_interface pages": "page_table",
        "flash_attn_interface hides": False,
    }  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_diffusers(answers, site: str):
    answer = answers[site]["diffusers"]
    assert answer == {"fa2": True, "fa3": site != "main alone", "lacking": []}


@pytest.mark.parametrize("site", SITES)
def test_transformer_engine(answers, site: str):
    """Its releases up to 2.9 want at most 2.8.1; nothing suits those and the later ones both."""
    hopper = site != "main alone"
    answer = answers[site]["transformer_engine"]
    assert answer == {
        "accepted": ["2.10", "2.18", "2.19"],
        "fa3": hopper,
        "fa3 before 2.15": hopper,
        "lacking": [],
    }


@pytest.mark.parametrize("site", SITES)
def test_xformers(answers, site: str):
    answer = answers[site]["xformers"]
    assert answer["accepted"] and answer["lacking"] == []
    assert answer["fa3"] == (site != "main alone")
    if answer["fa3"]:
        forward, backward = answer["schemas"]
        assert "Tensor? q_v=None, Tensor(out!)? out=None" in forward
        assert "bool is_rotary_interleaved=False" in forward
        assert forward.endswith("-> (Tensor(out!), Tensor, Tensor, Tensor)")
        assert "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), " in backward


@pytest.mark.parametrize("site", SITES)
def test_pytorch(answers, site: str):
    """torch.nn.attention.activate_flash_attention_impl("FA3")."""
    answer = answers[site]["pytorch"]
    hopper = site != "main alone"
    assert answer["operations"] == (["fwd", "bwd"] if hopper else [])
    assert not answer["loaded"], "importing flash_attn_interface must not load the Hopper tree"
    if hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        assert answer["activated"] == "FA3" if hopper else "refused" in answer["activated"]


@pytest.mark.hopper
@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="this PyTorch has no other implementations of flash attention",
)
def test_pytorch_attention_through_our_kernels():
    """Transposed views in and out, as nn.MultiheadAttention makes them, and their gradients."""
    attention, dot_product = torch.nn.attention, torch.nn.functional.scaled_dot_product_attention

    def tensor() -> torch.Tensor:
        return torch.randn(2, 300, 8, 64, device="cuda").bfloat16().transpose(1, 2)

    inputs, dout = [tensor().requires_grad_() for _ in range(3)], tensor()
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        want = dot_product(*(x.float() for x in inputs), is_causal=True)
        expected = (want, *torch.autograd.grad(want, inputs, dout.float()))
    attention.activate_flash_attention_impl("FA3")
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = dot_product(*inputs, is_causal=True)
            found = (out, *torch.autograd.grad(out, inputs, dout))
    finally:
        attention.restore_flash_attention_impl()
    for got, right in zip(found, expected, strict=True):
        assert got.shape == right.shape
        assert (got.float() - right.float()).abs().max() < 0.02 * right.float().abs().max()


@pytest.mark.parametrize("site", SITES)
def test_megatron(answers, site: str):
    answer = answers[site]["megatron"]
    assert answer["fa3"] == (site != "main alone")
    if answer["fa3"]:
        assert answer["copies"] == answer["lacking"] == []
        assert len(answer["parameters"]) == 34
        assert {"out_", "causal", "window_size_left"} <= set(answer["parameters"])


def test_ring_flash_attn(answers):
    """It passes what it finds by name, from these defaults."""
    answer = answers["main alone"]["ring_flash_attn"]
    shared = {
        "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left",
        "window_size_right", "softcap", "alibi_slopes",
    }  # fmt: skip
    lengths = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    gradients = {"dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic", "rng_state"}
    assert shared | {"return_softmax"} == set(answer["forward"])
    assert shared | lengths | {"return_softmax"} <= set(answer["varlen_forward"])
    assert shared | gradients == set(answer["backward"])
    assert shared | gradients | lengths <= set(answer["varlen_backward"])
    assert answer["varlen_forward"]["window_size_left"] == -1
    assert answer["varlen_forward"]["return_softmax"] is False


@pytest.mark.parametrize("site", SITES)
def test_every_name_that_a_client_imports(answers, site: str):
    """vLLM, unsloth, axolotl, ModernBERT, ESM, Wan: half a flash_attn is worse than none."""
    assert answers[site]["imports"] == {}


@pytest.mark.parametrize("site", SITES)
def test_build_flags(answers, site: str):
    flags = answers[site]["build_flags"]
    if site == "main alone":
        assert flags is None
        return
    for head_dim in (64, 96, 128, 192, 256):
        assert flags[f"FLASHATTENTION_DISABLE_HDIM{head_dim}"] is False
    assert flags["FLASHATTENTION_DISABLE_HDIMDIFF192"] is False
    assert flags["FLASHATTENTION_DISABLE_FP8"] is True


@pytest.mark.parametrize("site", [ALONE, "both"])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_flash_attn_4_keeps_working(sites, tmp_path: Path, site: str, place: str):
    """It installs flash_attn/cute and no flash_attn/__init__.py, into the same folder or another of
    the path. (Beside an editable installation Python does not find ours: docs/clients.md.)"""
    folders = [tmp_path / "ours", tmp_path / place]
    shutil.copytree(sites[site], folders[0])
    target = folders[0] if place == "beside" else folders[1]
    metadata_of_4 = "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n"
    for name, text in {
        "flash_attn/cute/__init__.py": "def flash_attn_func(): return 4\n",
        "flash_attn_4-4.0.0.dist-info/METADATA": metadata_of_4,
        "flash_attn_4-4.0.0.dist-info/top_level.txt": "flash_attn\n",
    }.items():
        file = target / name
        assert not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    program = """
import flash_attn, flash_attn.cute
assert flash_attn.cute.flash_attn_func() == 4 and flash_attn.__version__ == "2.8.3"
assert flash_attn.flash_attn_func is not flash_attn.cute.flash_attn_func
from importlib import metadata
owners = {x.replace("_", "-") for x in metadata.packages_distributions()["flash_attn"]}
assert {"flash-attn", "flash-attn-4"} <= owners, owners
"""
    for order in (folders, folders[::-1]):
        path = os.pathsep.join(map(str, order))
        run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=path)


# ---- the two distributions and each other ------------------------------------------------------


def test_distributions_of_different_releases_are_an_error(sites, tmp_path: Path):
    """It names both numbers and the fix, also when the Hopper tree is imported by hand."""
    mixed = tmp_path / "mixed"
    shutil.copytree(sites["both"], mixed)
    (mixed / "flash_attn_3" / "version.py").write_text('RELEASE = "0.0.9"\n')
    program = """
import importlib
from flash_attn_interface.call import backends
for attempt in (
    lambda: importlib.import_module("flash_attn_3"),
    lambda: importlib.import_module("flash_attn_3._C"),
    backends.hopper,
):
    try:
        attempt()
    except ImportError as error:
        print(error)
"""
    messages = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(mixed)).splitlines()
    assert len(messages) == 3
    for message in messages:
        assert "0.0.9" in message and RELEASE in message and "from the same checkout" in message


def test_flash_attention_3_of_another_package_is_left_alone(sites, tmp_path: Path):
    """A second registration would free the first, whose holder crashes later."""
    program = """
import torch, warnings
library = torch.library.Library("flash_attn_3", "DEF")
library.define("fwd(Tensor q) -> Tensor")
library.impl("fwd", lambda q: q + 1, "CPU")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import flash_attn_interface
assert any("another package has registered" in str(w.message) for w in caught)
assert torch.ops.flash_attn_3.fwd(torch.zeros(1)).item() == 1
"""
    run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(sites["both"]))


def test_python_started_in_the_folder_hopper_finds_the_right_package(sites, tmp_path: Path):
    """Users come from `cd hopper && python setup.py install`; the current folder is on the path."""
    program = "import flash_attn_interface as i; assert i.flash_attn_func and i.__path__"
    run(sys.executable, "-c", program, cwd=ROOT / "hopper", PYTHONPATH=str(sites["both"]))


# ---- the clients themselves, where they are installed ------------------------------------------


def run_with_library(name: str, site: Path, program: str, folder: Path) -> None:
    """Runs the program with the site in front of where the library is; it believes in a GPU."""
    library = find_spec(name)
    if library is None or library.origin is None:
        pytest.skip(f"{name} is not installed")
    preamble = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (9, 0)
"""
    path = f"{site}{os.pathsep}{Path(library.origin).parent.parent}"
    run(sys.executable, "-c", preamble + program, cwd=folder, PYTHONPATH=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_transformers_trains_and_generates(sites, tmp_path: Path, name: str):
    """A Llama of two layers on the CPU, with padding: the reference serves the calls. Errors of its
    eager implementation are the yardstick."""
    program = f"""
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=50, head_dim=16, pad_token_id=0, dtype=torch.bfloat16,
    attn_implementation={name!r}, initializer_range=0.1,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
ids, mask = torch.randint(1, 50, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
mask[0, :5] = 0
labels = ids.clone()
labels[0, :6] = -100  # the sixth is what a padded position would predict
results = []
for implementation, dtype in (({name!r}, "bfloat16"), ("eager", "bfloat16"), ("eager", "float32")):
    model = model.to(getattr(torch, dtype))
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    gradient = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
    results.append((out.logits[mask.bool()], gradient))
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
for mine, eager, exact in zip(*results):
    error, allowed = (float((x - exact).abs().max()) for x in (mine, eager))
    assert 0 < error < 2 * allowed, (error, allowed)
"""
    run_with_library("transformers", sites["both"], program, tmp_path)


@pytest.mark.slow
def test_diffusers_dispatches(sites, tmp_path: Path):
    """Its `_flash_3` runs an operation of its own on GPUs only; the others take CPU tensors."""
    program = """
from diffusers.models import attention_dispatch as dispatch
assert dispatch._CAN_USE_FLASH_ATTN and dispatch._CAN_USE_FLASH_ATTN_3
q, k, v = (torch.randn(1, 16, 2, 32).bfloat16() for _ in range(3))
plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
for name in ("FLASH", "FLASH_VARLEN", "_FLASH_VARLEN_3"):
    backend = dispatch.AttentionBackendName[name]
    out = dispatch.dispatch_attention_fn(q, k, v, backend=backend)
    torch.testing.assert_close(out, plain.transpose(1, 2), rtol=0.02, atol=0.02)
"""
    run_with_library("diffusers", sites["both"], program, tmp_path)
