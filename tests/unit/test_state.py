"""The state document as a checkpoint carries it: ids once."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr import LLRConfig, state
from megatron_llr.policies import meaning_of
from megatron_llr.schedule import MultiplierSchedule
from tests.reference.matrix_ids import by_id, info
from tests.unit.plain_values import KEYS, plain_values

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


JSON = plain_values(
    st.sampled_from([*MATRICES, 10**400, 2**63]), keys=st.sampled_from(MATRICES) | KEYS
)
PLACES = [(key,) for key in DOCUMENT] + [("schedule", key) for key in DOCUMENT["schedule"]]


def continue_from(text: Any) -> None:
    """What a resumed run does with the text in its checkpoint: it continues, or one clear error."""
    matrix_index = by_id({m: info(m) for m in MATRICES})
    message, document = "", None
    try:
        document = state.decode(text)
        if document:
            state.check(document, LLRConfig(), matrix_index, LLRConfig().meaning())
    except ValueError as error:
        message = str(error)
    if message:
        assert message.startswith("megatron_llr: ")
        assert "--llr-reset-state" in message
        assert "\n" not in message
        assert len(message) < 2000
    if message or not document:
        return
    schedule = MultiplierSchedule.resume(LLRConfig(), document["schedule"])
    for update in (document["next_update"], document["next_update"] + 1):
        assert all(math.isfinite(m) for m in schedule.multipliers(update).values())
        schedule.due(update)
        schedule.settled(update)
    assert state.decode(state.encode(document)) == document
    state.digest(document)


def packed_with(place: tuple[str, ...], value: Any) -> str:
    packed = json.loads(state.encode(DOCUMENT))
    inner = packed
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return json.dumps(packed)


REMOVED = object()


@given(place=st.sampled_from(PLACES), value=JSON | st.just(REMOVED))
def test_any_value_in_a_document(place: tuple[str, ...], value: Any) -> None:
    continue_from(packed_with(place, value))


@given(place=st.sampled_from(["old", "new", "alphas", "radii"]), value=JSON)
def test_any_number_in_a_table(place: str, value: Any) -> None:
    where = ("schedule", place) if place in ("old", "new") else (place,)
    continue_from(packed_with(where, [value, *[1.5] * 3]))


@given(
    text=st.text(max_size=80)
    | JSON.map(json.dumps)
    | JSON
    | st.sampled_from(["[" * 100_000, '{"version":' + "1" * 5000 + "}", '{"version":Infinity}'])
)
def test_any_text_as_a_document(text: Any) -> None:
    continue_from(text)


@given(
    place=st.integers(0, 900), inserted=st.text("0-9.eE[]{},:\"'naN", max_size=3), cut=st.booleans()
)
def test_a_document_with_something_inserted(place: int, inserted: str, cut: bool) -> None:
    text = state.encode(DOCUMENT)
    continue_from(text[:place] + inserted + ("" if cut else text[place + 1 :]))


@pytest.mark.parametrize("place", [("schedule", "old"), ("schedule", "new"), ("radii",)])
def test_zeros_of_frozen_matrices_and_of_zero_weights_are_valid(place: tuple[str, ...]) -> None:
    document = state.decode(packed_with(place, [0.0] * len(MATRICES)))
    assert document is not None
    matrix_index = by_id({m: info(m) for m in MATRICES})
    state.check(document, LLRConfig(), matrix_index, LLRConfig().meaning())
