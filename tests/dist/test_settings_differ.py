"""Ranks that were given different settings, states or files: one error on all, never a hang."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from harness import train

from megatron_llr import LLRConfig, state
from megatron_llr.config import flag, shared_settings
from megatron_llr.megatron import assembly, library, versions
from megatron_llr.ranks import gather_objects, require_equal
from megatron_llr.script_config import ScriptConfig
from megatron_llr.telemetry.observer import Observer

pytestmark = pytest.mark.world_size(2)

# Another value of every field, with what it needs to be a valid one.
OTHERS: dict[str, dict[str, Any]] = {
    "policy": {"policy": "uniform"},
    "min_multiplier": {"min_multiplier": 0.5},
    "max_multiplier": {"max_multiplier": 4.0},
    "interval": {"interval": 200},
    "ramp_iters": {"ramp_iters": 49},
    "active_fraction": {"active_fraction": 0.3},
    "active_iters": {"active_iters": 7},
    "estimator": {"estimator": "ks"},
    "mapping": {"mapping": "sqrt"},
    "inverse": {"inverse": True},
    "quantile": {"quantile": 0.1},
    "mean_preserving": {"mean_preserving": True},
    "granularity": {"granularity": "role"},
    "role_table": {"policy": "fixed", "role_table": "llr"},
    "role_factors": {"role_factors": "q=0.7"},
    "depth_floor": {"depth_floor": 0.2},
    "random_seed": {"random_seed": 1},
    "weight_decay": {"weight_decay": "decoupled"},
    "step": {"step": "grouped"},
    "embedding": {"embedding": "one"},
    "router": {"router": "policy"},
    "spectrum": {"spectrum": "sharded"},
    "spectrum_source": {"spectrum_source": "master"},
    "farms_rows": {"farms_rows": 100},
    "farms_windows": {"farms_windows": 2},
    "hyperball": {"hyperball": True},
    "hyperball_lr": {"hyperball": True, "hyperball_lr": 0.01},
    "measure_memory": {"measure_memory": 1.0},
    "log_matrices": {"log_matrices": "roles"},
    "log_relative_update": {"log_relative_update": True},
    "skip_unknown": {"skip_unknown": True},
    "reset_state": {"reset_state": True},
}
# Fields that need another one, which is reported first.
NEEDED = {"role_table": "policy", "hyperball_lr": "hyperball"}
OTHERS_OF_THE_SCRIPT: dict[str, Any] = {
    "dry_run": True,
    "explain": "head",
    "same_start": True,
    "fixed_validation": True,
    "device": "cpu",
}
LOCAL = {"log_dir"}


def by_rank(first: Any, second: Any) -> Any:
    return first if dist.get_rank() == 0 else second


def told_everywhere(caught: pytest.ExceptionInfo[Exception]) -> str:
    """The text of an error, which must be the same on both ranks, in one line."""
    told = gather_objects((type(caught.value), str(caught.value)))
    assert told[0] == told[1]
    assert "\n" not in told[0][1]
    return str(told[0][1])


def test_no_field_was_forgotten() -> None:
    """A new flag is compared, or is one of those that may differ."""
    assert set(OTHERS) | LOCAL == {field.name for field in fields(LLRConfig)}
    assert set(OTHERS_OF_THE_SCRIPT) == {field.name for field in fields(ScriptConfig)}


@pytest.mark.parametrize("field", OTHERS)
def test_a_flag_that_differs_is_named(field: str) -> None:
    before = LLRConfig()
    after = replace(before, **OTHERS[field])
    with pytest.raises(RuntimeError) as caught:
        assembly.require_same_settings(by_rank(before, after))
    text = told_everywhere(caught)
    named = NEEDED.get(field, field)
    old, new = getattr(before, named), getattr(after, named)
    assert f"{flag(named)} differs between ranks: {old!r} on rank 0, {new!r} on rank 1" in text
    assert f". Give every rank the same {flag(named)}." in text
    if field in NEEDED:
        assert f"also different: {flag(field)}" in text


@pytest.mark.parametrize("name", OTHERS_OF_THE_SCRIPT)
def test_a_flag_of_the_script_that_differs_is_named(name: str) -> None:
    other = ScriptConfig(**{name: OTHERS_OF_THE_SCRIPT[name]})
    with pytest.raises(RuntimeError) as caught:
        require_equal(shared_settings(by_rank(ScriptConfig(), other)), lambda _: "")
    assert f"{flag(name)} differs between ranks" in told_everywhere(caught)


def test_where_each_node_writes_may_differ() -> None:
    assembly.require_same_settings(by_rank(LLRConfig(log_dir="a"), LLRConfig(log_dir="b")))


@pytest.fixture(scope="module")
def built() -> Iterator[Any]:
    """A model and its optimizer with layer groups."""
    run = train("--exit-interval 1")
    yield run
    harness.destroy_groups()


@pytest.mark.parametrize(
    ("argument", "values", "flag_of_it"),
    [
        ("total_updates", (100, 200), "--train-iters"),
        ("observer", (Observer(say=print, log_interval=7), Observer(say=print)), "--log-interval"),
    ],
)
def test_what_the_training_loop_gives_is_compared_too(
    argument: str, values: tuple[Any, Any], flag_of_it: str, built: Any
) -> None:
    """Each would change when, or over what, ranks have collectives."""
    given = {"total_updates": 100, argument: by_rank(*values)}
    with pytest.raises(RuntimeError) as caught:
        library.make_controller(built.optimizer, **given)
    assert f"{flag_of_it} differs between ranks" in told_everywhere(caught)


def test_the_vocabulary_is_compared_too(built: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        assembly.name_weights(built.model, LLRConfig(), by_rank(250, None))
    assert "--vocab-size differs between ranks" in told_everywhere(caught)


@pytest.mark.parametrize("what", ["iteration", "update", "contents", "presence"])
def test_a_start_that_differs_is_found_before_the_first_measurement(what: str, built: Any) -> None:
    controller = library.make_controller(built.optimizer, total_updates=100)
    document = {**built.controller.state_dict(), "meaning": {}, "timing": {}}
    others = {"update": {"next_update": 5}, "contents": {"alphas": {}}}
    if what in others:
        controller.load_state_dict(by_rank(document, {**document, **others[what]}))
    elif what == "presence" and dist.get_rank() == 1:
        controller.load_state_dict(document)
    with pytest.raises(RuntimeError) as caught:
        controller.prepare(by_rank(3, 4) if what == "iteration" else 1)
    text = told_everywhere(caught)
    assert {
        "iteration": "the number of the next update differs between ranks: 4 on rank 0, 5 on",
        "update": "the number of the next update differs between ranks: 2 on rank 0, 5 on",
        "contents": "the extension's state in the checkpoint differs between ranks: 'that of "
        "update 2 (",
        "presence": "the extension's state in the checkpoint differs between ranks: 'none' on "
        "rank 0, 'that of update 2 (",
    }[what] in text
    assert "Load one checkpoint on every rank; --llr-reset-state ignores its state" in text


def test_a_version_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_rank("0.19.2", "0.19.3")
    monkeypatch.setattr(versions.metadata, "version", lambda name: found)
    with pytest.raises(RuntimeError) as caught:
        assembly.require_same_settings(LLRConfig())
    text = told_everywhere(caught)
    assert "the version of megatron-core differs between ranks: '0.19.2' on rank 0" in text


def test_a_role_table_is_compared_by_what_it_holds(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path on two nodes, with other files behind it, or none on one."""
    node = shared_dir / str(dist.get_rank())
    node.mkdir()
    (node / "table.json").write_text(json.dumps({"q": 1 + dist.get_rank()}))
    if dist.get_rank() == 0:
        (node / "here_alone.json").write_text("{}")
    monkeypatch.chdir(node)
    with pytest.raises(RuntimeError) as caught:
        assembly.require_same_settings(LLRConfig(policy="fixed", role_table="table.json"))
    text = told_everywhere(caught)
    assert "the content of --llr-role-table differs between ranks: {'q': 1" in text
    with pytest.raises(ValueError, match="here_alone") as missing:
        assembly.require_same_settings(LLRConfig(policy="fixed", role_table="here_alone.json"))
    assert told_everywhere(missing).endswith("(rank 1)")


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ("--llr-interval 4", "--llr-interval 5", "--llr-interval"),
        ("--llr-same-start", "", "--llr-same-start"),
        ("--seed 1234", "--seed 1235", "--seed"),
    ],
)
def test_a_command_line_that_differs_stops_the_real_loop(one: str, other: str, named: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        train(by_rank(one, other))
    assert f"{named} differs between ranks: " in told_everywhere(caught)


def test_a_wrong_flag_on_one_rank_stops_all() -> None:
    with pytest.raises(ValueError, match="--llr-ramp-iters 9 is not valid") as caught:
        train(by_rank("", "--llr-ramp-iters 9"))
    assert told_everywhere(caught).endswith("(rank 1)")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{torn", "extension's state in the checkpoint cannot be read: it begins with '{torn'"),
        ("", "the extension's state in the checkpoint differs between ranks: 'that of update"),
    ],
)
def test_a_checkpoint_whose_state_one_rank_cannot_use_stops_all(
    text: str, error: str, shared_dir: Path
) -> None:
    """In Megatron's legacy format every tensor-parallel rank has a file of its own."""
    tp2 = "--tensor-model-parallel-size 2 --ckpt-format torch"
    train(tp2, f"--save {shared_dir} --save-interval 2 --exit-interval 2")
    path = shared_dir / "iter_0000002" / f"mp_rank_0{dist.get_rank()}" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    assert saved["opt_param_scheduler"][state.KEY].startswith('{"version":')
    if dist.get_rank() == 1:
        saved["opt_param_scheduler"][state.KEY] = text
        torch.save(saved, path)
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        train(tp2, f"--load {shared_dir}")
    assert error in told_everywhere(caught)


def test_values_and_ranks_are_listed_not_only_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank sends the repr of its values; here, twelve ranks."""
    of_ranks = [
        {"--x": repr(rank // 6 if rank < 11 else "odd"), "--y": repr(rank)} for rank in range(12)
    ]
    monkeypatch.setattr(
        "megatron_llr.ranks.gather_objects",
        lambda value: of_ranks if isinstance(value, dict) else list(range(12)),
    )
    with pytest.raises(RuntimeError) as caught:
        require_equal({}, lambda setting: f"set {setting}")
    text = str(caught.value)
    assert (
        ": 0 on ranks 0, 1, 2, 3 and 2 more, 1 on ranks 6, 7, 8, 9 and 1 more, 'odd' on rank 11"
        in text
    )
    assert "(also different: --y" in text
