"""Parts of the self-test that need no ranks: layouts, environment, blame, table."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_llr.tools.self_test import environment
from megatron_llr.tools.self_test.layouts import LAYOUTS, fitting, selected, training_flags
from megatron_llr.tools.self_test.positions import Position, hang_message, responsible
from megatron_llr.tools.self_test.results import Cell, Results, Row, combined, spelled, table

BY_NAME = {layout.name: layout for layout in LAYOUTS}
FULL: dict[str, Any] = {"missing": [], "machine": {"compute capability": "9.0"}}


def without(*parts: str) -> dict[str, Any]:
    return {**FULL, "missing": [{"part": part} for part in parts]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 16, 64])
def test_a_layout_that_is_left_out_is_part_of_one_that_is_checked(ranks: int) -> None:
    checked = {layout.name for layout in selected(ranks)}
    for layout in fitting(ranks):
        while layout.name not in checked:
            layout = BY_NAME[layout.part_of]
    for layout in fitting(ranks):
        # Whole data-parallel replicas, and micro batches that fill a virtual pipeline.
        dense = layout.tensor * layout.pipeline * layout.context
        expert = layout.experts * layout.expert_tensor * layout.pipeline
        assert ranks % dense == ranks % expert == 0
        words = training_flags(layout, ranks)
        batches = int(words[words.index("--global-batch-size") + 1]) / (ranks // dense)
        assert batches % layout.pipeline == 0
        assert batches >= 2


def test_every_kind_of_parallelism_is_checked_on_8_ranks() -> None:
    words = {word for layout in selected(8) for word in layout.flags}
    assert {
        "--tensor-model-parallel-size",
        "--sequence-parallel",
        "--pipeline-model-parallel-size",
        "--num-virtual-stages-per-pipeline-rank",
        "--context-parallel-size",
        "--expert-model-parallel-size",
        "--expert-tensor-parallel-size",
        "--use-distributed-optimizer",
        "--overlap-param-gather",
        "--overlap-grad-reduce",
        "--bf16",
        "--fp8-format",
    } <= words


def test_a_layout_by_name_comes_with_the_one_whose_weights_it_loads() -> None:
    names = [layout.name for layout in selected(4, ["ep2-overlap-bf16", "tp2"])]
    assert names == ["dp", "tp2", "experts-distopt-bf16", "ep2-overlap-bf16"]
    with pytest.raises(ValueError, match=r"tp4-sp-bf16 needs a multiple of 4 ranks.*has 2"):
        selected(2, ["tp4-sp-bf16"])
    with pytest.raises(ValueError, match=r"layout tp3 does not exist\. Allowed here: dp, dp-over"):
        selected(2, ["tp3"])


@pytest.mark.parametrize(
    ("name", "facts", "device", "reason"),
    [
        ("fp8-delayed", FULL, "cuda", None),
        ("fp8-delayed", FULL, "cpu", "FP8 needs a GPU"),
        ("fp8-delayed", without("transformer_engine.pytorch"), "cuda", "Transformer Engine"),
        ("fp8-delayed", {**FULL, "machine": {"compute capability": "8.0"}}, "cuda", "8.9"),
        ("cp2-distopt-bf16", without("transformer_engine.pytorch"), "cuda", "--context-parallel"),
        ("cp2-distopt-bf16", without("transformer_engine.pytorch"), "cpu", None),
        ("tp4-sp-bf16", without("transformer_engine.pytorch"), "cuda", None),
        (
            "tp4-sp-bf16",
            without("transformer_engine.pytorch", "apex.normalization.fused_layer_norm"),
            "cuda",
            "--sequence-parallel needs Transformer Engine or apex",
        ),
    ],
)
def test_what_the_installed_packages_do_not_allow(
    name: str, facts: dict[str, Any], device: str, reason: str | None
) -> None:
    given = environment.unavailable(BY_NAME[name], facts, device)
    assert given is None if reason is None else reason in (given or "")


def test_the_environment_of_this_machine() -> None:
    facts = environment.describe("cpu")
    assert facts["software"]["megatron-core"].startswith("0.19")
    assert all(each["reason"] and each["needed for"] for each in facts["missing"])
    json.dumps(facts)
    other = {**facts, "software": {**facts["software"], "torch": "2.11.0"}}
    (line,) = environment.differences([facts, facts, other])
    assert line.startswith("torch differs between ranks")
    assert "2.11.0 on rank 2" in line
    assert "on ranks 0-1" in line
    assert environment.differences([facts, facts]) == []


def test_an_extension_that_cannot_be_loaded_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built for another torch."""
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(tmp_path)
    reasons = {each["part"]: each["reason"] for each in environment.missing_parts(load=True)}
    assert reasons["amp_C"] == "ImportError: undefined symbol: _ZN3c105Error"
    assert reasons["fused_weight_gradient_mlp_cuda"] == "not installed"
    assert reasons["apex.normalization.fused_layer_norm"] == "not installed"


def test_torch_is_not_imported_before_the_environment_is_set() -> None:
    program = (
        "import sys, os\n"
        "from megatron_llr.tools.self_test import cli\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def at(rank: int, **fields: Any) -> Position:
    plain = Position(rank, f"node{rank}", 7, 20, "dp: uniform, update 3", "f (a.py:1)", True)
    return dataclasses.replace(plain, **fields)


LATE = "did not arrive where the other ranks wait"


@pytest.mark.parametrize(
    ("after", "ranks", "reason"),
    [
        ([at(0), at(1), at(2, error="OSError: full", beat=8)], [2], "failed: OSError: full"),
        ([at(0, beat=8), None, at(2, beat=8)], [1], "did not start"),
        ([at(0, beat=8), at(1), at(2, beat=8)], [1], "does not run"),
        ([at(0, beat=8), at(1, beat=8), at(2, beat=8, marks=19)], [2], LATE),
        ([at(0, beat=8), at(1, beat=8, waits=False), at(2, beat=8)], [1], LATE),
        ([at(0, beat=8), at(1, beat=8), at(2, beat=8, code="g (b.py:2)")], [2], LATE),
        ([at(0, beat=8), at(1, beat=8), at(2, beat=8)], [0, 1, 2], "wait for each other"),
    ],
)
def test_the_ranks_that_hold_up_the_others(
    after: list[Position | None], ranks: list[int], reason: str
) -> None:
    named, why = responsible([at(0), at(1), at(2)], after)
    assert named == ranks
    assert why.startswith(reason)
    text = hang_message(named, why, after, 30)
    assert text.startswith(spelled(ranks))
    assert "in dp: uniform, update 3" in text or None in after


def test_the_table_names_what_is_not_ok_and_the_file_has_everything(tmp_path: Path) -> None:
    good, bad, absent = Row("dp", "dense"), Row("tp2", "dense"), Row("fp8", "dense")
    good.set_all("ok", "")
    bad.cells["rates"] = combined(
        [{"status": "ok", "note": ""}, {"status": "FAILED", "note": "block.0.mlp.up"}]
    )
    bad.set_all("ok", "")
    absent.set_all("not applicable", "FP8 needs a GPU")
    lines = table([good, bad, absent]).splitlines()
    assert lines[2].split() == ["tp2", "dense", "ok", "ok", "FAILED", "ok", "0.0"]
    assert lines[4:] == [
        "tp2 rates: FAILED: block.0.mlp.up (rank 1)",
        "fp8: not applicable: FP8 needs a GPU",
    ]
    results = Results(2, "cpu", rows=[good, absent])
    assert not results.failed
    results.rows.append(bad)
    assert results.failed
    results.write(tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["result"] == "FAILED"
    assert document["rows"][2]["cells"]["rates"] == dataclasses.asdict(
        Cell("FAILED", "block.0.mlp.up (rank 1)")
    )
