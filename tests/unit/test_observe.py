"""What is written where: scalars for the host's writers, tables for people."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llr.observe import plots
from megatron_llr.observe.csv_log import CsvLog, files_of
from megatron_llr.observe.log_rows import (
    MEASUREMENT_FIELDS,
    RATE_FIELDS,
    ROLE_MEASUREMENT_FIELDS,
    ROLE_RATE_FIELDS,
)
from megatron_llr.observe.observer import MatrixRates, Observer
from megatron_llr.observe.read_logs import last_measurement, last_role_table, read_rows
from megatron_llr.observe.summary import block_table, by_role, role_table
from megatron_llr.records import MatrixInfo
from megatron_llr.spectrum import record_from_eigenvalues

MATRIX = "block.2.mlp.up"
DIRECTORY = {MATRIX: MatrixInfo(MATRIX, "block.2.mlp.fc1", 64, 64, ((0,),), False)}


class Recorder:
    """Stands for the host's writers, which have these methods; W&B's rules for steps hold.

    Attributes:
        rows: by step what W&B has, the last of them open; a step below it is dropped.
    """

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.rows: dict[int, dict[str, float]] = {0: {}}
        self.dropped: list[str] = []
        self.axes: dict[str, str | None] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(
        self, values: dict[str, float], step: int | None = None, commit: bool | None = None
    ) -> None:
        now = max(self.rows)
        if step is not None and step < now:
            self.dropped += values
            return
        stepped, step = step is not None, now if step is None else step
        self.rows.setdefault(step, {}).update(values)
        if commit or (commit is None and not stepped):
            self.rows[step + 1] = {}


def test_tensorboard_and_wandb_get_the_same_scalars() -> None:
    tensorboard, wandb = Recorder(), Recorder()
    observer = Observer(say=print, tensorboard=tensorboard, wandb=wandb)
    rates = {MATRIX: MatrixRates(2.0, 2e-3, 1e-4, 3e-3), "head": MatrixRates(5.0, 5e-3, 2e-4)}
    observer.stepped(7, rates)
    assert tensorboard.scalars["llr/multiplier/up/block_002"] == 2.0
    assert tensorboard.scalars["llr/learning_rate/head"] == 5e-3
    assert tensorboard.scalars["llr/effective_learning_rate-by-role/up/max"] == 1e-4
    assert tensorboard.scalars["llr/relative_update/up/block_002"] == 3e-3
    assert tensorboard.scalars["llr/relative_update-by-role/up/mean"] == 3e-3
    assert "llr/relative_update/head" not in tensorboard.scalars
    # They join the row that the host has open, and leave it open.
    assert wandb.rows == {0: {**tensorboard.scalars, "llr/update": 7}}


def test_wandb_drops_neither_the_hosts_values_nor_ours() -> None:
    """The host logs at its iterations, after ours; updates that were skipped do not count here."""
    wandb = Recorder()
    under_way = 0
    observer = Observer(say=print, wandb=wandb, wandb_step=lambda: under_way)
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.measured(1, {}, {MATRIX: 1.0}, DIRECTORY, {})
    update = 0
    for under_way in range(1, 7):
        if under_way > 2:
            update += 1
            observer.stepped(update, {MATRIX: MatrixRates(float(update), 1.0, 1.0)})
            if update % 2:
                observer.measured(update + 1, {}, {MATRIX: 10.0 + update}, DIRECTORY, {})
        wandb.log({"lm loss": 9.0}, under_way)
    assert wandb.dropped == []
    assert [row.get("lm loss") for row in wandb.rows.values()] == [None] + [9.0] * 6
    for values, axis, expected in (
        ("llr/multiplier/up/block_002", "llr/update", [(3, 1, 1), (4, 2, 2), (5, 3, 3), (6, 4, 4)]),
        (
            "llr/target_multiplier/up/block_002",
            "llr/measured_before_update",
            [(0, 1, 1), (3, 2, 11), (5, 4, 13)],
        ),
    ):
        found = [(at, row[axis], row[values]) for at, row in wandb.rows.items() if values in row]
        assert found == expected
        pattern = next(name for name in wandb.axes if values.startswith(name.rstrip("*")))
        assert wandb.axes[pattern] == axis


def test_a_log_that_cannot_be_written_is_a_warning_not_the_end(tmp_path: Path, caplog: Any) -> None:
    observer = Observer(say=print, csv_log=CsvLog(tmp_path / "log"))
    observer.open(measured_up_to=0, rates_up_to=0)
    (tmp_path / "log" / "learning_rates.csv").unlink()
    (tmp_path / "log" / "learning_rates.csv").mkdir()
    observer.stepped(1, {MATRIX: MatrixRates(1.0, 1.0, 1.0)})
    assert "not written" in caplog.text


def test_a_writer_of_the_host_that_breaks_is_a_warning_not_the_end(caplog: Any) -> None:
    """TensorBoard's raises what its thread ran into, W&B's what its server said."""

    class Broken(Recorder):
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            raise OSError("no space left on device")

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            raise RuntimeError("run is gone")

        def log(
            self, values: dict[str, float], step: int | None = None, commit: bool | None = None
        ) -> None:
            raise RuntimeError("run is gone")

    rates = {MATRIX: MatrixRates(1.0, 1.0, 1.0)}
    Observer(say=print, tensorboard=Broken()).stepped(1, rates)
    observer = Observer(say=print, wandb=Broken())
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.stepped(1, rates)
    assert "llr/multiplier not written: no space left on device" in caplog.text
    assert "llr/learning_rate not written: run is gone" in caplog.text


def write_runs(folder: Path, relative: tuple[float | None, ...]) -> CsvLog:
    csv_log = CsvLog(folder)
    csv_log.open(measured_up_to=0, rates_up_to=0)
    for update, value in enumerate(relative, 1):
        rows = [(f"block.{b}.mlp.{r}", 1.0, 1e-3, 1e-4, value) for b in (0, 1) for r in ("up", "q")]
        csv_log.write_rates(update, rows)
    return csv_log


def test_relative_updates_are_written_where_they_were_recorded(tmp_path: Path) -> None:
    write_runs(tmp_path, (None, 2.5e-3))
    rows = list(read_rows(tmp_path / "learning_rates.csv"))
    assert [row["relative_update"] for row in rows] == [""] * 4 + ["0.0025"] * 4


def test_a_log_from_before_relative_updates_goes_on(tmp_path: Path) -> None:
    """Its rows stay, with an empty cell; those of other columns and torn ones do not."""
    old = tmp_path / "learning_rates.csv"
    header = ",".join(RATE_FIELDS[:-1])
    old.write_text(f"{header}\n4,head,5.0,0.005,0.0002\n8,head,5.0,0.004,0.0001\n8,{MATRIX},1")
    csv_log = CsvLog(tmp_path)
    csv_log.open(measured_up_to=0, rates_up_to=8)
    csv_log.write_rates(12, [("head", 5.0, 0.003, 0.0001, 2e-3)])
    rows = list(read_rows(old))
    assert tuple(rows[0]) == RATE_FIELDS
    kept = [(row["iteration"], row["relative_update"]) for row in rows]
    assert kept == [("4", ""), ("8", ""), ("12", "0.002")]
    old.write_text("iteration,matrix,colour\n4,head,red\n")
    csv_log.open(measured_up_to=0, rates_up_to=8)
    assert list(read_rows(old)) == []


def test_the_figure_of_relative_updates_is_drawn_where_there_are_any(tmp_path: Path) -> None:
    png = tmp_path / "updates.png"
    write_runs(tmp_path / "with", (None, 0.0, 2e-3, 1e-3))
    assert plots.relative_update_lines(tmp_path / "with", png)
    assert png.read_bytes()[:4] == b"\x89PNG"
    png.unlink()
    write_runs(tmp_path / "without", (None, None))
    assert not plots.relative_update_lines(tmp_path / "without", png)
    assert not png.exists()
    (tmp_path / "old").mkdir()
    header = ",".join(RATE_FIELDS[:-1])
    (tmp_path / "old" / "learning_rates.csv").write_text(f"{header}\n4,head,5.0,0.005,0.0002\n")
    assert not plots.relative_update_lines(tmp_path / "old", png)


@pytest.mark.parametrize("by_role", [False, True])
def test_the_exponents_that_set_the_multipliers_are_logged(by_role: bool, tmp_path: Path) -> None:
    """Beside alpha_hill_median, also in a log from before they were; nothing of those not asked."""
    csv_log, recorder = CsvLog(tmp_path, by_role=by_role), Recorder()
    path = files_of(tmp_path, by_role=by_role)[0].path
    names = ROLE_MEASUREMENT_FIELDS if by_role else MEASUREMENT_FIELDS
    old = [name for name in names if not name.startswith(("alpha_ks", "alpha_fix_finger"))]
    path.write_text(f"{','.join(old)}\n1{',' * (len(old) - 1)}\n")
    observer = Observer(say=print, csv_log=csv_log, tensorboard=recorder, by_role=by_role)
    observer.open(measured_up_to=1, rates_up_to=1)
    values = torch.rand(64, generator=torch.Generator().manual_seed(1)).double().sort().values
    record = record_from_eigenvalues(values, estimators=("ks",), method="gram64")
    observer.measured(2, {MATRIX: record}, {MATRIX: 1.0}, DIRECTORY, {MATRIX: values})
    assert recorder.scalars["llr/alpha_ks/up/block_002"] == record.alpha_ks
    assert recorder.scalars["llr/alpha_ks-by-role/up/mean"] == record.alpha_ks
    assert recorder.scalars["llr/alpha_hill_median/up/block_002"] == record.alpha_hill_median
    assert not any("fix_finger" in tag for tag in recorder.scalars)
    before, after = read_rows(path)
    end = "_mean" if by_role else ""
    assert (before["iteration"], before[f"alpha_ks{end}"]) == ("1", "")
    assert float(after[f"alpha_ks{end}"]) == record.alpha_ks
    assert after[f"alpha_fix_finger{end}"] == ""


def test_the_role_table_shows_what_was_not_measured() -> None:
    alphas, factors = by_role({MATRIX: 2.5}), by_role({MATRIX: 1.5, "head": 5.0})
    table = role_table({"up": 1, "head": 1}, alphas, factors).splitlines()
    assert table[1].split() == ["up", "1", "2.500", "1.500", "to", "1.500"]
    assert table[2].split() == ["head", "1", "-", "5.000", "to", "5.000"]
    assert table[0].split() == ["role", "matrices", "mean", "alpha_hill_median", "multiplier"]
    assert "  mean alpha_ks  " in role_table({"up": 1, "head": 1}, alphas, factors, "ks")


EXPERTS = [f"block.2.mlp.expert.{number}.up" for number in range(3)]
MOE = ["embedding", "block.2.attention.q", *EXPERTS, "mtp.0.attention.q", "head"]
MOE_DIRECTORY = {m: MatrixInfo(m, m, 64, 64 + 32 * (m in EXPERTS), ((0,),), False) for m in MOE}
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
        csv_log.write_measurement(update, table, TARGETS, MOE_DIRECTORY)
        rates = [(m, t, t * 1e-3, t * 1e-4, None if m == MOE[1] else t) for m, t in TARGETS.items()]
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
    rates = {matrix: MatrixRates(float(index), 1, 1) for index, matrix in enumerate(ids)}
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
    lines = [line.split() for line in block_table(MOE_DIRECTORY, owners, TARGETS).splitlines()]
    assert lines[0] == ["block", "role", "matrices", "shape", "owners", "multiplier"]
    assert lines[1] == ["-", "embedding", "1", "64x64", "-", "1.0000", "to", "1.0000"]
    assert lines[3] == ["2", "expert.up", "3", "64x96", "2", "1.5000", "to", "2.0000"]
    assert len(lines) == 6
