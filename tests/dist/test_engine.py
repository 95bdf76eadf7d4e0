"""The engine against plain code: no spectrum twice, sharded values pooled, padding left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import train
from layouts import HERE, Layout
from megatron.core.utils import unwrap_model

from megatron_llr.measurement import measure
from megatron_llr.megatron.model_chunks import process_groups
from megatron_llr.megatron.stepped_tensors import leaf_optimizers, stepped_tensors_of
from megatron_llr.ranks import gather_objects
from megatron_llr.spectrum import record_from_eigenvalues
from megatron_llr.spectrum.farms import farms_eigenvalues
from tests.reference import llr as reference

# One of each way to hold a matrix: whole, split, on another stage, stale until gathered.
KINDS = {"tp1", "tp2", "pp2", "vpp2", "dp2-overlap-bf16", "tp2-pp2", "tp4-split-groups"}


@pytest.fixture(params=[layout for layout in HERE if layout.name in KINDS], ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


def test_no_spectrum_is_computed_twice_anywhere(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole job: as many solver calls as matrices; embedding and head are not among
    them.
    """
    shapes: list[tuple[int, ...]] = []
    solve = measure.eigenvalues_of

    def counted(weight: torch.Tensor, *, full: bool = False) -> object:
        shapes.append(tuple(weight.shape))
        return solve(weight, full=full)

    monkeypatch.setattr(measure, "eigenvalues_of", counted)
    run = train(layout.flags, "--exit-interval 1")
    solved = [shape for told in gather_objects(shapes) for shape in told]
    expected = [
        (info.rows, info.columns)
        for matrix, info in run.controller.matrix_index.items()
        if matrix not in ("embedding", "head")
    ]
    assert sorted(solved) == sorted(expected)


def test_sharded_pools_the_singular_values_of_the_shards(layout: Layout) -> None:
    """With tensor parallelism: each rank's own, pooled; without: the same as exact."""
    run = train(layout.flags, "--exit-interval 1 --llr-spectrum sharded")
    run.controller._engine.readers = range(dist.get_world_size())
    spectra = run.controller._engine.measure().spectra
    assert len(spectra) == 28
    ways = len(next(iter(run.controller.matrix_index.values())).holders[0])
    for matrix, weight in run.whole_weights().items():
        if matrix in spectra:
            role = matrix.rsplit(".", 1)[-1]
            pieces = [weight]
            if ways > 1:
                pieces = list(weight.chunk(ways, dim=1 if role in ("o", "down") else 0))
            if role in "qkv" and ways == 4:
                continue  # two groups over four ranks: q on two of them, k and v on the others
            pooled = torch.cat([torch.linalg.svdvals(piece.double()) for piece in pieces])
            found = spectra[matrix]
            assert len(found) == len(pooled), matrix
            # fp64 eigenvalues of a Gram matrix hold small singular values to about 1e-7.
            assert torch.allclose(found, pooled.sort().values, atol=1e-6), matrix


@pytest.fixture
def split_layout(layout: Layout) -> Layout:
    """One layout per world size is enough where nothing but the sharding matters."""
    if layout.name not in ("tp1", "tp2", "tp2-pp2"):
        pytest.skip("run on one layout per world size")
    return layout


def test_farms_pools_the_submatrices_of_whole_matrices(split_layout: Layout) -> None:
    """Windows of 64: the same spectra on every layout, as on the whole weights in one process."""
    flags = "--llr-spectrum farms --llr-farms-rows 64 --llr-farms-windows 3"
    run = train(split_layout.flags, flags, "--exit-interval 1")
    run.controller._engine.readers = range(dist.get_world_size())
    measured = run.controller._engine.measure()
    weights = run.whole_weights()
    assert measured.table["block.0.mlp.up"].num_eigenvalues == 3 * 3 * 64
    assert measured.table["block.0.attention.k"].num_eigenvalues == 3 * 64
    for matrix, record in measured.table.items():
        pooled, _ = farms_eigenvalues(weights[matrix], 64, 3)
        assert torch.allclose(measured.spectra[matrix].square(), pooled, atol=1e-6), matrix
        expected = record_from_eigenvalues(pooled, method="farms").alpha_hill_median
        assert record.alpha_hill_median == pytest.approx(expected, rel=1e-5), matrix
        assert record.method == "farms"


def test_a_measured_embedding_does_not_depend_on_padding(split_layout: Layout) -> None:
    """Vocabulary 250, padded to 252 or 256 rows: the padding is not measured."""
    alphas = {}
    for divisible in (2, 32):
        flags = f"--make-vocab-size-divisible-by {divisible} --llr-embedding measured"
        run = train(split_layout.flags, flags, "--exit-interval 1")
        assert run.controller.matrix_index["head"].rows == 250
        from tests.reference.llr import hill_median

        whole = run.whole_weights()
        for matrix in ("embedding", "head"):
            assert run.alphas[matrix] == pytest.approx(hill_median(whole[matrix]), rel=1e-3)
        alphas[divisible] = run.alphas
    assert set(alphas) == {2, 32}


@pytest.mark.world_size(1)
def test_dry_run_prints_blocks_and_roles_if_asked_to(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("--llr-dry-run --llr-log-matrices roles")
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["block", "role", "matrices", "shape", "owners", "multiplier"] in lines
    (down,) = (line for line in lines if line[:2] == ["3", "down"])
    assert down[2:5] == ["1", "128x192", "1"]


def test_dry_run_prints_and_stops_with_code_0(
    split_layout: Layout, capfd: pytest.CaptureFixture[str], shared_dir: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(split_layout.flags, "--llr-dry-run")
    assert stopped.value.code == 0
    printed = [text for text in gather_objects(capfd.readouterr().out) if "multiplier" in text]
    assert len(printed) == 1
    lines = [line.split() for line in printed[0].splitlines()]
    head = next(line for line in lines if line[:1] == ["matrix"])
    assert head == ["matrix", "role", "shape", "shards", "owner", "multiplier"]
    found = {line[0]: line for line in lines if line and line[0].startswith("block.")}
    assert len(found) == 28
    assert found["block.3.mlp.down"][1:3] == ["down", "128x192"]


@pytest.mark.world_size(1, 2, 4)
@pytest.mark.parametrize("layout", HERE, ids=str)
def test_masters_are_measured_whole(layout: Layout) -> None:
    """--llr-spectrum-source master: exponents of the fp32 copies, assembled from their slices."""
    if "distopt" not in layout.name and "bf16" not in layout.name:
        pytest.skip("fp32 weights are their own masters")
    run = train(layout.flags, "--llr-spectrum-source master --exit-interval 3")
    measured = run.controller._engine.measure().table
    slices = {}
    for leaf in leaf_optimizers(run.optimizer):
        for master in stepped_tensors_of(leaf):
            flat = master.tensor.detach().view(-1).clone()
            slices[id(master.parameter)] = (master.start, flat)
    # Put the fp32 copies in place of the weights, then read those whole.
    groups = process_groups(run.model)
    for chunk in run.model:
        for parameter in unwrap_model(chunk).parameters():
            start, flat = slices.get(id(parameter), (0, torch.empty(0)))
            replicas = groups.dp if getattr(parameter, "allreduce", True) else groups.expt_dp
            told: list[Any] = [None] * dist.get_world_size(replicas)
            dist.all_gather_object(told, (start, flat), group=replicas)
            whole = torch.empty(parameter.numel())
            for first, part in told:
                whole[first : first + part.numel()] = part
            parameter.data = whole.view(parameter.shape)
    alphas, _ = reference.multipliers(run.whole_weights(), 1.0, 5.0, ("embedding", "head"))
    for matrix, alpha in alphas.items():
        assert measured[matrix].alpha_hill_median == pytest.approx(alpha, rel=1e-5), matrix
    if layout.name in ("tp1-bf16", "dp2-distopt-bf16"):
        weights = train(layout.flags, "--exit-interval 3").controller._engine.measure().table
        assert any(
            weights[matrix].alpha_hill_median != pytest.approx(alpha, rel=1e-5)
            for matrix, alpha in alphas.items()
        )
