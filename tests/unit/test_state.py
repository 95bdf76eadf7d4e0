"""The state document as a checkpoint carries it: ids once."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_llr import LLRConfig, state
from megatron_llr.policies import meaning_of
from tests.reference.matrix_ids import by_id, info

MATRICES = ["embedding", *(f"block.0.mlp.expert.{number}.up" for number in range(3))]
DOCUMENT: dict[str, Any] = {
    "version": state.VERSION,
    "next_update": 5,
    "matrices": MATRICES,
    "meaning": LLRConfig().meaning(),
    "timing": LLRConfig().timing(),
    "schedule": {
        "start": 1,
        "window_end": 6,
        "observed_at": 4,
        "ramp": 3,
        "old": dict(zip(MATRICES, (5.0, 1.1, 2.2, 1 / 3), strict=True)),
        "new": dict(zip(MATRICES, (5.0, 1.3, 4.4, 1e-17), strict=True)),
    },
    # The embedding was not measured, one exponent could not be fitted.
    "alphas": {MATRICES[1]: 2.0000000000000004, MATRICES[2]: None, MATRICES[3]: 3.5},
    # The norms that hyperball steps keep.
    "radii": {MATRICES[1]: 1.25, MATRICES[2]: 0.1},
}


def test_every_id_stands_once_and_every_number_is_exact() -> None:
    text = state.encode(DOCUMENT)
    assert state.decode(text) == DOCUMENT
    assert all(text.count(f'"{matrix}"') == 1 for matrix in MATRICES[1:])


def test_nothing_measured_yet() -> None:
    schedule = {**DOCUMENT["schedule"], "observed_at": None, "old": {}, "new": {}}
    document = {**DOCUMENT, "schedule": schedule, "alphas": {}, "radii": {}}
    assert state.decode(state.encode(document)) == document


def test_a_role_table_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """Its file may move; another content would change what the saved multipliers mean."""
    matrix_index = by_id({m: info(m) for m in MATRICES})

    def config(name: str, table: str) -> LLRConfig:
        (tmp_path / name).write_text(table)
        return LLRConfig(policy="fixed", role_table=str(tmp_path / name))

    before, moved = config("a.json", '{"up": 2}'), config("b.json", '{"up": 2.0}')
    edited = config("c.json", '{"up": 3}')
    saved = {**DOCUMENT, "meaning": meaning_of(before)}
    saved = state.decode(state.encode(saved)) or {}
    assert state.check(saved, moved, matrix_index, meaning_of(moved)) == []
    with pytest.raises(ValueError, match=r"--llr-role-table is .*'up': 3.*saved with .*'up': 2"):
        state.check(saved, edited, matrix_index, meaning_of(edited))


@pytest.mark.parametrize("text", ["{", "[]", '{"version":2}', '{"version":"x"}'])
def test_what_is_no_document_is_told(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"state in the checkpoint cannot be read.*--llr-reset-state"
    ):
        state.decode(text)


def test_lists_that_do_not_fit_the_ids_are_told() -> None:
    packed = json.loads(state.encode(DOCUMENT))
    packed["alphas"].pop()
    with pytest.raises(ValueError, match="state in the checkpoint cannot be read"):
        state.decode(json.dumps(packed))


@pytest.mark.parametrize("version", [state.VERSION - 1, state.VERSION + 1])
def test_another_version_is_left_to_the_check(version: int) -> None:
    other = {"version": version, "in": "another form"}
    assert state.decode(json.dumps(other)) == other
    with pytest.raises(ValueError, match=rf"has version {version}"):
        state.check(other, LLRConfig(), {}, {})
