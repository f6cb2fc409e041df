"""The script around compute-sanitizer: what it calls clean, and that its calls run."""

from __future__ import annotations

from pathlib import Path

import hopper_tree
import pytest
import sanitize
import sanitize_cases
from sanitize import Outcome

from flash_attn_interface._common.ask.problem import Problem

RAN = "all 5 calls ran; kernels: flash2_combine x 3, flash2_fwd x 2\n"
CLEAN = RAN + "========= ERROR SUMMARY: 0 errors\n"
HAZARDS = RAN + "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
PLANTED = (
    "========= Invalid __global__ read of size 4 bytes\n=========     at probe_planted+0x90\n"
    "========= ERROR SUMMARY: 65 errors\n"
)


@pytest.mark.parametrize(
    ("outcome", "judged"),
    [
        (Outcome(0, CLEAN, 1.0), "clean"),
        (Outcome(0, RAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0)", 1), "clean"),
        (Outcome(0, HAZARDS, 1.0), "2 FINDINGS"),  # warnings leave the exit status at 0
        (Outcome(1, PLANTED, 1.0), "65 FINDINGS"),
        (Outcome(0, RAN, 1.0), "NO SUMMARY (exit status 0)"),
        (Outcome(1, "========= ERROR SUMMARY: 0 errors", 1), "THE CALLS FAILED (exit status 1)"),
        (Outcome(0, "========= ERROR SUMMARY: 0 errors", 1), "THE CALLS FAILED (exit status 0)"),
        (Outcome(None, CLEAN, 180.0), "OUT OF TIME"),
    ],
)  # fmt: skip
def test_only_a_complete_run_without_findings_is_clean(outcome: Outcome, judged: str) -> None:
    assert sanitize.verdict(outcome) == judged


DIVERGENT = (
    "========= Barrier error detected. Divergent thread(s) in block.\n"
    "=========     at flash2_bwd+0xaaa0\n=========     by thread (82,0,0) in block (10,0,0)\n"
    "========= Barrier error detected. Divergent thread(s) in block.\n"
    "=========     at flash2_bwd+0x1c40\n=========     by thread (1,0,0) in block (10,0,0)\n"
)
RACE = (
    RAN
    + "========= Error: Race reported between Write access at flash2_decode+0x58f0\n"
    + "=========     and Read access at flash2_decode+0x5920 [8 hazards]\n"
    + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)
LIMITED = RAN + DIVERGENT + "========= ERROR SUMMARY: 257 errors\n"


@pytest.mark.parametrize(
    ("tool", "text", "known"),
    [
        ("synccheck", LIMITED, True),
        ("racecheck", LIMITED, False),
        ("synccheck", LIMITED.replace(RAN, ""), False),
        ("synccheck", LIMITED.replace("flash2_bwd+0x1c40", "flash2_fwd+0x1c40"), False),
        ("synccheck", LIMITED.replace("in block.", "in warp."), False),
        ("synccheck", CLEAN, False),
        ("racecheck", HAZARDS, False),
        ("racecheck", RACE, True),
        (
            "racecheck",
            RACE.replace("and Read access at flash2_decode", "and Read access at x"),
            False,
        ),
        ("racecheck", RACE.replace("flash2_decode", "flash2_fwd"), False),
        ("synccheck", RACE, False),
    ],
)
def test_a_known_limit_covers_nothing_else(tool: str, text: str, known: bool) -> None:
    assert (sanitize.known_limit(tool, Outcome(1, text, 1.0)) is not None) == known


def test_planted_mistakes_must_be_found() -> None:
    assert sanitize.planted_verdict(Outcome(1, PLANTED, 1.0)) == "found"
    assert "NOT FOUND" in sanitize.planted_verdict(Outcome(0, CLEAN, 1.0))
    elsewhere = PLANTED.replace("probe_planted", "vectorized_elementwise_kernel")
    assert "NOT FOUND" in sanitize.planted_verdict(Outcome(1, elsewhere, 1.0))


def test_an_outcome_names_its_kernels() -> None:
    outcome = Outcome(0, CLEAN, 1.0)
    assert outcome.launches() == {"flash2_combine": 3, "flash2_fwd": 2}
    both = sanitize.described([outcome, Outcome(0, CLEAN, 3.0)])
    assert both == "10 calls: flash2_combine x 6, flash2_fwd x 4, 3 s"


def test_every_kernel_has_a_group() -> None:
    assert set(sanitize_cases.GROUPS) == set(sanitize.GROUPS)
    covered = {entry for group in sanitize_cases.GROUPS.values() for entry in group.entries}
    assert covered == set(sanitize.known_entries())
    for name, group in sanitize_cases.GROUPS.items():
        labels = [label for label, _ in group.cases]
        assert len(set(labels)) == len(labels), f"{name} lists a call twice"
        assert group.backend == sanitize._tree(name)


def test_every_division_of_the_hopper_backward_is_checked() -> None:
    """Also after measurements have moved a pair of head dims to other tiles."""
    hopper_tree.load()
    from flash_attn_3 import bwd_tiles

    divisions = set()
    for entry in sanitize_cases.HOPPER_BACKWARD:
        case = entry[0] if isinstance(entry, tuple) else entry
        rows = (case.batch, case.seqlen_q, case.seqlen_k, 1, 1)  # no list goes by total_q, total_k
        heads = (case.num_heads_q, case.num_heads_k, case.num_heads_v)
        asked = Problem(
            case.dtype, case.head_dim_qk, case.head_dim_v, *heads, *rows, softmax_scale=0.1,
            causal=case.causal, softcap=case.softcap, dropout_p=case.dropout_p,
        )  # fmt: skip
        tile = bwd_tiles.backward_tile(asked, "sm_90a")
        floats = not (tile.aux_lse(asked) and tile.aux_d(asked))
        divisions |= {
            ("split" if tile.split_roles else "joint", "floats" if floats else "aux"),
            ("bulk" if tile.add_stages else "registers",),
            ("pair" if tile.cluster_size == 2 else "one", f"{tile.dq_buffers} buffers"),
        }
    assert divisions >= {
        ("joint", "aux"), ("split", "aux"), ("split", "floats"), ("bulk",), ("registers",),
        ("one", "1 buffers"), ("one", "2 buffers"), ("pair", "2 buffers"),
    }  # fmt: skip


def test_the_filter_names_every_kernel() -> None:
    import re

    key, _, pattern = sanitize.KERNEL_FILTER.partition("=")
    assert key == "regex"
    for entry in (*sanitize.known_entries(), sanitize_cases.MISTAKES_ENTRY):
        assert re.search(pattern, entry)


@pytest.mark.parametrize("arguments", [["leakcheck"], ["--cases", "forward,nonsense"]])
def test_unknown_tools_and_groups_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sanitize.main(arguments)
    assert "known:" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["", "racecheck"])
def test_a_line_for_each_tool_and_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    def execute(command: list[str], limit_s: float) -> Outcome:
        if sanitize.PLANTED in command:
            return Outcome(1, PLANTED, 1.0)
        return Outcome(0, HAZARDS if broken in command and "1/2" in command else CLEAN, 1.0)

    monkeypatch.setattr(sanitize, "execute", execute)
    good = sanitize.check("compute-sanitizer", sanitize.TOOLS, ["append", "decode"], 2, 1.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("=")]
    assert good == (not broken)
    assert len([line for line in lines if "clean" in line]) == (5 if broken else 6)
    assert len([line for line in lines if "mistakes  found" in line]) == 3
    findings = [line for line in lines if "2 FINDINGS" in line]
    assert [line.split()[:2] for line in findings] == ([["racecheck", "decode"]] if broken else [])


def test_each_process_checks_one_group() -> None:
    command = sanitize.sanitizer_command("compute-sanitizer", "racecheck", "decode", "1/2")
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    script, *arguments = command[-6:]
    assert script == str(Path(sanitize.__file__))
    assert arguments == ["--run", "decode", "--part", "1/2", "racecheck"]


def test_a_process_out_of_time_is_ended_with_its_children() -> None:
    """The sanitizer runs the program under it, which would hold the pipe of its output open."""
    outcome = sanitize.execute(["sh", "-c", "echo begun; sleep 60 & wait"], limit_s=0.5)
    assert outcome.status is None and outcome.text == "begun\n" and outcome.seconds < 30
    assert sanitize.verdict(outcome) == "OUT OF TIME"


@pytest.mark.sim
def test_the_calls_run_in_the_simulator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flash_attn_interface._common.launch.driver import DeviceKernel
    from flash_attn_interface._common.sim.launcher import SimKernel

    for kernel_class in (DeviceKernel, SimKernel):  # put back what counting replaces
        monkeypatch.setattr(kernel_class, "launch", kernel_class.launch)
    monkeypatch.setenv(sanitize.FORCE_BACKEND, "flash2")
    sanitize.run_group("combine", "", simulate="sm_80")
    assert "all 5 calls ran; kernels: flash2_combine x 5" in capsys.readouterr().out
