"""`controller.explain` and `--llr-explain`: every factor of a matrix's learning rate."""

import pytest
import torch.distributed as dist
from harness import Run, train

from megatron_llr.ranks import gather_objects
from megatron_llr.telemetry.explanation import Explanation

pytestmark = pytest.mark.world_size(1, 2)

LAYOUTS = {1: "", 2: "--pipeline-model-parallel-size 2"}
MATRIX = "block.3.mlp.down"


def explained(matrix: str, *flags: str) -> list[dict[int, Explanation]]:
    """Rank -> update -> explanation of a matrix after that update; 0 is before the first."""
    seen: dict[int, Explanation] = {}

    def note(run: Run, update: int, done: bool) -> None:
        if update == 1 and not done:
            seen[0] = run.controller.explanation(matrix)
        if done:
            seen[update] = run.controller.explanation(matrix)
            assert str(seen[update]) == run.controller.explain(matrix)

    train(LAYOUTS[dist.get_world_size()], *flags, on_update=note)
    return gather_objects(seen)


def test_every_factor_of_the_rate_is_there() -> None:
    by_rank = explained(MATRIX)
    stepping = by_rank[-1]
    before, first, second, ramping, last = (stepping[update] for update in (0, 1, 2, 4, 8))
    # Warm-up from 0 to 2e-3 in two updates; the first targets hold at once.
    assert (before.update, before.done, first.update, first.done) == (1, False, 1, True)
    assert (first.base_rate, second.base_rate) == pytest.approx((0.0, 1e-3))
    assert (before.ramp_done, before.ramp_length, before.measured_at) == (1, 1, 1)
    assert first.multiplier == first.target
    assert second.rate == pytest.approx(1e-3 * first.target)
    # Measured again before update 4: a ramp of 3 + 1 updates.
    assert (ramping.ramp_done, ramping.ramp_length, ramping.measured_at) == (1, 4, 4)
    expected = first.target + (ramping.target - first.target) / 4
    assert ramping.multiplier == pytest.approx(expected)
    assert last.ramp_done == last.ramp_length
    assert last.multiplier == last.target
    assert last.weight_decay == pytest.approx(0.1)
    assert (last.shape, last.exponents, last.rule) == ((128, 192), 28, "")
    assert 1 <= last.exponent_rank <= 28
    for line in ("128x192", "of 28 from the smallest", "esd, linear from 1 to 5", "finished"):
        assert line in str(last)


def test_other_ranks_know_all_but_the_rates() -> None:
    by_rank = explained(MATRIX)
    for found in by_rank:
        same = ("multiplier", "target", "exponent", "exponent_rank", "owner", "shards")
        for name in same:
            assert getattr(found[8], name) == getattr(by_rank[-1][8], name)
    if len(by_rank) == 2:
        assert by_rank[0][8].rate is None
        assert "held by other ranks" in str(by_rank[0][8])


def test_the_embedding_and_decoupled_decay() -> None:
    found = explained("embedding", "--llr-weight-decay decoupled")[0][8]
    assert (found.owner, found.exponent, found.multiplier) == (None, None, 5.0)
    assert "--llr-embedding max" in found.rule
    assert found.weight_decay == pytest.approx(0.1 / 5)
    assert "not measured" in str(found)


def test_the_flag_prints_it_once_and_goes_with_the_dry_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    layout = LAYOUTS[dist.get_world_size()]
    with pytest.raises(SystemExit):
        train(layout, f"--llr-dry-run --llr-explain {MATRIX}")
    printed = [text for text in gather_objects(capfd.readouterr().out) if "for update 1" in text]
    assert len(printed) == 1
    assert f"{MATRIX}, for update 1" in printed[0]
    assert "held by other ranks" not in printed[0]
    with pytest.raises(ValueError, match=r"no matrix 'block.9.mlp.up'.*--llr-dry-run"):
        train(layout, "--llr-explain block.9.mlp.up")
