"""Logs per block and role, where a block has many experts."""

from pathlib import Path

import pytest
import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.spectrum import record_from_eigenvalues
from megatron_llr.telemetry import plots
from megatron_llr.telemetry.csv_log import CsvLog, files_of
from megatron_llr.telemetry.log_rows import (
    ROLE_MEASUREMENT_FIELDS,
    ROLE_RATE_FIELDS,
)
from megatron_llr.telemetry.observer import MatrixRates, Observer
from megatron_llr.telemetry.read_logs import last_measurement, last_role_table, read_rows
from megatron_llr.telemetry.tables import block_table
from tests.reference.matrix_ids import by_id, info
from tests.unit.recorder import Recorder

EXPERTS = [MatrixId.read(f"block.2.mlp.expert.{number}.up") for number in range(3)]
MOE = [
    *map(MatrixId.read, ("embedding", "block.2.attention.q")),
    *EXPERTS,
    *map(MatrixId.read, ("mtp.0.attention.q", "head")),
]
MOE_INDEX = {m: info(m, columns=64 + 32 * (m in EXPERTS)) for m in MOE}
TARGETS = {m: 1.0 + index / 4 for index, m in enumerate(MOE)}


def write_moe(folder: Path, updates: int, *, by_role: bool, kept: int = 0) -> None:
    """One measurement per update, of all but embedding, head and expert 2; then its rates."""
    generator = torch.Generator().manual_seed(1)
    csv_log = CsvLog(folder, by_role=by_role)
    csv_log.open(measured_up_to=kept, rates_up_to=kept)
    for update in range(1, updates + 1):
        values = {m: torch.rand(64, generator=generator).double().sort().values for m in MOE}
        if update <= kept:
            continue
        table = {
            matrix: record_from_eigenvalues(found, method="gram64")
            for matrix, found in values.items()
            if matrix not in ("embedding", "head", EXPERTS[2])
        }
        csv_log.write_measurement(update, table, TARGETS, MOE_INDEX)
        rates = [
            (m, t, t * 1e-3, t * 1e-4, None if m == MOE[1] else t, None) for m, t in TARGETS.items()
        ]
        csv_log.write_rates(update, rates)


def test_a_row_per_block_and_role_is_the_summary_of_its_matrices(tmp_path: Path) -> None:
    write_moe(tmp_path, 2, by_role=True)
    write_moe(tmp_path / "matrices", 2, by_role=False)
    alphas = {
        row["matrix"]: float(row["alpha_hill_median"])
        for row in read_rows(tmp_path / "matrices" / "measurements.csv")
        if row["iteration"] == "2" and row["alpha_hill_median"]
    }
    rows = list(read_rows(tmp_path / "measurements_by_role.csv"))
    assert tuple(rows[0]) == ROLE_MEASUREMENT_FIELDS
    last = {(row["block"], row["role"]): row for row in rows if row["iteration"] == "2"}
    assert list(last) == [
        *(("", "embedding"), ("2", "q"), ("2", "expert.up"), ("mtp.0", "q"), ("", "head"))
    ]
    experts, measured = last["2", "expert.up"], [alphas[m] for m in EXPERTS[:2]]
    assert experts["matrices"] == "3"
    assert float(experts["alpha_hill_median_mean"]) == sum(measured) / 2
    assert float(experts["alpha_hill_median_max"]) == max(measured)
    assert [float(experts[f"target_multiplier_{of}"]) for of in ("mean", "min", "max")] == [
        *(1.75, 1.5, 2.0)
    ]
    assert last["", "head"]["alpha_hill_median_mean"] == ""
    rates = list(read_rows(tmp_path / "learning_rates_by_role.csv"))
    assert tuple(rates[0]) == ROLE_RATE_FIELDS
    assert len(rates) == 2 * 5
    assert [float(rates[2][f"learning_rate_{of}"]) for of in ("mean", "min", "max")] == [
        *(pytest.approx(1.75e-3), 1.5e-3, 2.0e-3)
    ]
    assert [row["relative_update_mean"] for row in rates[:3]] == ["1.0", "", "1.75"]


def test_figures_and_tables_are_the_same_from_either_kind_of_file(tmp_path: Path) -> None:
    found = []
    for kind in (False, True):
        folder = tmp_path / str(kind)
        write_moe(folder, 2, by_role=kind)
        measured = last_measurement(folder)
        assert measured.iteration == 2
        assert measured.counts["2", "expert.up"] == 3
        assert measured.multipliers["2", "expert.up"].mean == 1.75
        found.append(last_role_table(measured))
        for name in ("multiplier_map", "learning_rate_lines", "relative_update_lines"):
            getattr(plots, name)(folder, folder / f"{name}.png")
            assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert found[0] == found[1]
    assert "expert.up         3" in found[0]


@pytest.mark.parametrize("by_role", [False, True])
@pytest.mark.parametrize("resumed_by_role", [False, True])
def test_a_resumed_log_is_the_unbroken_one(
    by_role: bool, resumed_by_role: bool, tmp_path: Path
) -> None:
    """Also where --llr-log-matrices has changed: the files of before end where the run resumed."""
    write_moe(tmp_path / "a", 4, by_role=by_role)
    torn = "measurements_by_role.csv" if by_role else "measurements.csv"
    with (tmp_path / "a" / torn).open("a") as file:
        file.write("4,2,up")
    write_moe(tmp_path / "a", 4, by_role=resumed_by_role, kept=2)
    write_moe(tmp_path / "b", 2 if by_role != resumed_by_role else 4, by_role=by_role)
    for name in ("measurements", "learning_rates"):
        path = f"{name}_by_role.csv" if by_role else f"{name}.csv"
        assert (tmp_path / "a" / path).read_text() == (tmp_path / "b" / path).read_text()
    after = read_rows(tmp_path / "a" / files_of(Path(), by_role=resumed_by_role)[0].path)
    expected = "34" if by_role != resumed_by_role else "1234"
    assert sorted({row["iteration"] for row in after}) == list(expected)


def test_curves_have_names_of_their_own(tmp_path: Path) -> None:
    """Experts, second layers of a block, multi-token prediction, gates: no two share a tag."""
    ids = [*MOE, "mtp.1.attention.q", "block.2.mlp.up", "block.2.mlp2.up", "block.2.attention.gate"]
    ids += [
        "block.2.mlp.gate",
        "block.2.mlp.shared.up",
        "block.12.mlp.expert.0.up",
        "mtp.0.eh_proj",
    ]
    ids += ["block.2.mlp2.expert.0.up"]
    recorder = Recorder()
    rates = by_id({matrix: MatrixRates(float(index), 1, 1) for index, matrix in enumerate(ids)})
    Observer(say=print, tensorboard=recorder).stepped(1, rates)
    tags = [tag for tag in recorder.scalars if tag.startswith("llr/multiplier/")]
    assert len(tags) == len(ids)
    assert recorder.scalars["llr/multiplier/expert.up/block_002/expert_001"] == 3.0
    assert recorder.scalars["llr/multiplier/q/mtp_000"] == 5.0


def test_curves_per_block_and_role_are_few(tmp_path: Path) -> None:
    recorder = Recorder()
    rates = {matrix: MatrixRates(TARGETS[matrix], 1.0, 1.0) for matrix in MOE}
    Observer(say=print, tensorboard=recorder, by_role=True).stepped(1, rates)
    found = {
        tag.removeprefix("llr/multiplier/"): value
        for tag, value in recorder.scalars.items()
        if tag.startswith("llr/multiplier/")
    }
    assert found == {
        "embedding": 1.0,
        "q/block_002": 1.25,
        "expert.up/block_002/mean": 1.75,
        "expert.up/block_002/min": 1.5,
        "expert.up/block_002/max": 2.0,
        "q/mtp_000": 2.25,
        "head": 2.5,
    }


def test_the_table_of_blocks_has_a_line_per_role() -> None:
    owners = {matrix: index % 2 for index, matrix in enumerate(EXPERTS)}
    lines = [line.split() for line in block_table(MOE_INDEX, owners, TARGETS).splitlines()]
    assert lines[0] == ["block", "role", "matrices", "shape", "owners", "multiplier"]
    assert lines[1] == ["-", "embedding", "1", "64x64", "-", "1.0000", "to", "1.0000"]
    assert lines[3] == ["2", "expert.up", "3", "64x96", "2", "1.5000", "to", "2.0000"]
    assert len(lines) == 6
