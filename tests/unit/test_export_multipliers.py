"""Exported multipliers: what the files hold, from logs; checkpoints are in tests/dist."""

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.telemetry.log_rows import MEASUREMENT_FIELDS, RATE_FIELDS
from megatron_llr.tools.export_multipliers import cli, formats, source
from megatron_llr.tools.export_multipliers.names import megatron_parameters, name_pattern
from tests.reference.matrix_ids import by_id

# Rows of q, k, v, o, gate, up, down of two blocks of width 8.
ROWS = {"q": 8, "k": 2, "v": 2, "o": 8, "gate": 16, "up": 16, "down": 8}
MODULES = {**dict.fromkeys("qkvo", "attention"), **dict.fromkeys(("gate", "up", "down"), "mlp")}
BASE = formats.BaseRates(1e-3, 1e-4, 0.1)


def multipliers() -> dict[str, float]:
    """Of a small model; o agrees over the blocks, q, k, v of block 1 among each other."""
    found = {"embedding": 5.0}
    for block in (0, 1):
        values = {"q": 1.5, "k": 3.0, "v": 1.5, "o": 0.5, "gate": 2.0, "up": 2.0, "down": 1.0}
        for role, value in values.items():
            value = 2.5 if block and role in "qkv" else value
            found[f"block.{block}.{MODULES[role]}.{role}"] = value
    return {**found, "head": 0.0}


def write_logs(folder: Path, *, on_decay: bool = False) -> Path:
    """Log files of a run: all multipliers 1 at update 10, those of `multipliers` at update 20."""
    lines = [",".join(RATE_FIELDS)]
    for update, scale in ((10, False), (20, True)):
        for matrix, value in multipliers().items():
            multiplier = value if scale else 1.0
            rate = 1e-3 * (1.0 if on_decay else multiplier)
            lines.append(f"{update},{matrix},{multiplier},{rate},,,")
    (folder / "learning_rates.csv").write_text("\n".join(lines) + "\n")
    lines = [",".join(MEASUREMENT_FIELDS)]
    for matrix in by_id(multipliers()):
        empty = {**dict.fromkeys(MEASUREMENT_FIELDS, ""), "iteration": "1", "matrix": matrix}
        row = {**empty, "rows": str(ROWS.get(matrix.weight, 20)), "cols": "8"}
        lines.append(",".join(row.values()))
    (folder / "measurements.csv").write_text("\n".join(lines) + "\n")
    return folder


def export(folder: Path, name: str, *arguments: str) -> str:
    """Run the tool on the logs in a folder; returns the file's text."""
    assert cli.main([str(folder), str(folder / name), *arguments]) == 0
    return (folder / name).read_text()


def test_a_role_table_gives_the_multipliers_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_llr.policies import read_role_table

    write_logs(tmp_path)
    text = export(tmp_path, "table.yaml")
    assert text.startswith(f"# Multipliers of update 20 in {tmp_path}/learning_rates.csv")
    assert "\n# For --llr-weight-decay coupled.\n" in text
    assert "update 20" in capsys.readouterr().out
    export(tmp_path, "table.json")
    for name in ("table.yaml", "table.json"):
        table = read_role_table(str(tmp_path / name))
        for matrix, value in by_id(multipliers()).items():
            assert table.row(matrix).multiplier == value
    content = json.loads((tmp_path / "table.json").read_text())
    # Roles whose matrices agree are one row.
    assert content["o"] == 0.5
    assert content["block.1.attention.k"] == 2.5
    assert "down" in content
    assert set(yaml.safe_load(text)) == set(content)


def test_an_earlier_update_is_exported_by_its_number(tmp_path: Path) -> None:
    text = export(write_logs(tmp_path), "table.yaml", "--iteration", "10")
    assert "Multipliers of update 10" in text
    assert set(yaml.safe_load(text).values()) == {1.0}


def test_automodel_gets_factors_on_rate_and_decay(tmp_path: Path) -> None:
    write_logs(tmp_path)
    for decay in ("coupled", "decoupled"):
        name = f"{decay}.yaml"
        text = export(tmp_path, name, "--format", "automodel", "--decay", decay)
        overrides = yaml.safe_load(text)["param_group_overrides"]

        def of(name: str, overrides: list[dict[str, object]] = overrides) -> list[object]:
            matching = [o for o in overrides if re.search(str(o["pattern"]), name)]
            return [value for o in matching for value in (o["lr_mult"], o["wd_mult"])]

        expected = [3.0, 1.0 if decay == "coupled" else 1 / 3]
        assert of("model.layers.0.self_attn.k_proj.weight") == expected
        assert of("model.layers.1.self_attn.k_proj.weight")[0] == 2.5
        assert of("model.layers.10.self_attn.k_proj.weight") == []
        assert of("lm_head.weight") == [0.0, 1.0]
        assert of("model.embed_tokens.weight")[0] == 5.0
        assert of("model.layers.0.mlp.down_proj.weight") == []
        assert of("model.norm.weight") == []


def test_torchtitan_gets_absolute_rates_and_a_group_for_the_rest(tmp_path: Path) -> None:
    flags = ("--lr", "1e-3", "--min-lr", "0", "--weight-decay", "0.1")
    text = export(
        write_logs(tmp_path), "t.py", "--format", "torchtitan", "--decay", "decoupled", *flags
    )
    groups: list[dict[str, object]] = []
    program = text.replace("from torchtitan.components.optimizer import ParamGroupConfig", "")
    exec(program, {"ParamGroupConfig": lambda **kwargs: groups.append(kwargs)})
    first = [
        next(g for g in groups if re.search(str(g["pattern"]), name))["optimizer_kwargs"]
        for name in ("layers.0.attention.wk.weight", "layers.0.feed_forward.w2.weight", "norm")
    ]
    assert first[0] == {"lr": 3e-3, "weight_decay": pytest.approx(0.1 / 3), "betas": (0.9, 0.95)}
    assert first[1] == first[2] == {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def test_megatrons_fused_parameters_get_the_mean_weighted_by_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = source.read_logs(write_logs(tmp_path), None, decoupled=False)
    made = formats.megatron(rates, BASE)
    table = made.text[made.text.index("OVERRIDES") :]
    scope: dict[str, dict[str, dict[str, float]]] = {}
    exec(table[: table.index("\n\n")].replace("OVERRIDES: dict[str, dict[str, float]]", "T"), scope)
    overrides = scope["T"]
    mean = (1.5 * 8 + 3.0 * 2 + 1.5 * 2) / 12
    qkv = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert overrides[qkv.format(0)] == {"max_lr": mean * 1e-3, "min_lr": mean * 1e-4}
    assert overrides[qkv.format(1)] == {"max_lr": 2.5e-3, "min_lr": 2.5e-4}
    assert overrides["decoder.layers.0.mlp.linear_fc1.weight"]["max_lr"] == 2e-3
    assert overrides["output_layer.weight"] == {"max_lr": 0.0, "min_lr": 0.0}
    # The values of the base are no override, which would be a second group of one identity.
    assert "decoder.layers.0.mlp.linear_fc2.weight" not in overrides
    assert [line.split(":")[0] for line in made.merged] == [qkv.format(0)]
    assert "mean of q 1.5, k 3, v 1.5" in made.merged[0]


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_decay_of_a_fused_parameter_is_the_mean_decay(decoupled: bool) -> None:
    matrices = by_id({f"block.0.attention.{role}": 1.0 for role in "qkv"})
    values = dict(zip(matrices, (2.0, 4.0, 0.0), strict=True))
    factors = dict(zip(matrices, (1.0, 0.5, 1.0), strict=True))
    rates = source.ExportedRates(
        update=1, origin="", multipliers=values, decay_factors=factors, decoupled=decoupled
    )
    rate, decay = formats._settings(rates, list(matrices))
    assert rate == 2.0
    expected = (1.0 + 0.5 + 0.0) if decoupled else (2.0 + 2.0 + 0.0)
    assert rate * decay == pytest.approx(expected / 3)


def test_multipliers_on_the_decay_are_exported_as_such(tmp_path: Path) -> None:
    rates = source.read_logs(write_logs(tmp_path, on_decay=True), None, decoupled=False)
    assert set(rates.multipliers.values()) == {1.0}
    assert rates.decay_factors == by_id(multipliers())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["block.3.attention.q", "block.3.attention.k", "block.3.attention.v"], ["linear_qkv"]),
        (["block.3.attention.q", "block.3.attention.kv_up"], ["linear_q_proj", "linear_kv_up"]),
        (["block.3.mlp.up", "block.3.mlp.down"], ["linear_fc1", "linear_fc2"]),
        (["block.3.mlp.expert.7.down"], ["local_experts.7.linear_fc2", "linear_fc2.weight7"]),
        (["embedding"], ["embedding.word_embeddings", "output_layer"]),
        (["mtp.0.attention.o"], []),
    ],
)
def test_names_of_megatrons_parameters(ids: list[str], expected: list[str]) -> None:
    names = [name for name, _ in megatron_parameters(map(MatrixId.read, ids))]
    assert len(names) == len(expected)
    assert all(part in name for part, name in zip(expected, names, strict=True))
    if ids[0].startswith("block"):
        assert all(name.startswith("decoder.layers.3.") for name in names)


def test_what_has_no_name_is_left_out_and_listed(tmp_path: Path) -> None:
    expert = MatrixId.read("block.3.mlp.expert.7.down")
    assert name_pattern(expert, "automodel") is None
    rates = source.ExportedRates(update=1, origin="", multipliers={expert: 2.0})
    assert formats.automodel(rates).left_out == [expert]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--iteration", "15"], "has no row of update 15: it has updates 10 to 20"),
        (["--format", "megatron"], "--lr is missing. --format megatron has absolute rates"),
        (["--format", "torchtitan", "--lr", "nan"], "--lr is nan"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    write_logs(tmp_path)
    assert cli.main([str(tmp_path), str(tmp_path / "out"), *arguments]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_and_an_existing_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "There is no complete torch_dist checkpoint" in capsys.readouterr().err
    (tmp_path / "learning_rates.csv").write_text("iteration,matrix\n")
    (tmp_path / "out").write_text("")
    assert cli.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err
    (tmp_path / "learning_rates_by_role.csv").write_text("")
    (tmp_path / "learning_rates.csv").unlink()
    assert cli.main([str(tmp_path), str(tmp_path / "other")]) == 1
    assert "--llr-log-matrices all" in capsys.readouterr().err
