"""The layer groups of all inner optimizers on a rank."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import flat_ranges
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.hyperball import HyperballStep
from megatron_llr.param_groups.hyperball_norms import NormSums, SteppedDomain
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import MatrixRanges, SteppedTensor, TensorMatrices


class LayerGroups:
    """The layer groups of all inner optimizers on this rank.

    Args:
        optimizers: every inner optimizer of this rank with the tensors that it steps.
        shards: catalog of this rank.
        decoupled_decay: whether weight decay is independent of the multiplier.
        on_decay: whether multipliers scale the weight decay instead of the learning rate.
        step: `--llr-step`: auto, fused or grouped.
        domains: the parameters of every inner optimizer, in their order, for hyperball steps.

    Attributes:
        radii: matrix id -> norm that it keeps, of all matrices of the job with a hyperball step.
    """

    def __init__(
        self,
        optimizers: Iterable[tuple[torch.optim.Optimizer, Sequence[SteppedTensor]]],
        shards: Sequence[MatrixShard],
        *,
        decoupled_decay: bool = False,
        on_decay: bool = False,
        step: str = "auto",
        domains: Sequence[SteppedDomain] = (),
    ) -> None:
        self.decoupled_decay, self.on_decay = decoupled_decay, on_decay
        by_parameter = _by_parameter(shards)
        self._inner: list[InnerGroups] = []
        self._sums: list[NormSums] = []
        self._domains = domains
        self.radii: Mapping[MatrixId, float] = {}
        for optimizer, stepped in optimizers:
            parts = {
                id(each.tensor): (each, _matrices_in(each, by_parameter[id(each.parameter)]))
                for each in stepped
                if id(each.parameter) in by_parameter
            }
            self._inner.append(
                InnerGroups(
                    optimizer, parts, decoupled_decay=decoupled_decay, on_decay=on_decay, step=step
                )
            )

    @property
    def matrices(self) -> list[MatrixId]:
        """Matrices of which this rank's optimizers step at least a part."""
        return [matrix for inner in self._inner for matrix in inner.matrices]

    @property
    def inseparable(self) -> dict[MatrixId, str]:
        """Matrix that must share its parameter's multiplier -> class of the optimizer."""
        return {
            matrix: type(inner.optimizer).__name__
            for inner in self._inner
            for stepped, parts in inner.parts.values()
            if inner.is_inseparable(stepped.tensor)
            for matrix, _ in parts
        }

    @property
    def without_fp32_weights(self) -> dict[str, torch.dtype]:
        """Class of an optimizer -> dtype of tensors that it steps without fp32 weights."""
        return {
            type(inner.optimizer).__name__: stepped.tensor.dtype
            for inner in self._inner
            for stepped, _ in inner.parts.values()
            if not inner.has_fp32_weights(stepped.tensor)
        }

    def base_settings(self, matrix: MatrixId) -> tuple[float, float] | None:
        """Base learning rate and weight decay of a matrix; None if this rank does not step it.

        The decay includes its factor of `set_decay_factors`. With a hyperball step: the hyperball
        learning rate and 0.

        The rate is that of the last step, or of the next if there was none.
        """
        for inner in self._inner:
            rates = {id(t): float(rate) for rate, tensors in inner.base_rates for t in tensors}
            tensors = {
                id(stepped.tensor)
                for stepped, parts in inner.parts.values()
                if any(name == matrix for name, _ in parts)
            }
            for group in inner.optimizer.param_groups:
                for tensor in group["params"]:
                    if id(tensor) in tensors:
                        rate = rates.get(id(tensor), float(group["lr"]))
                        decay = float(group.get("weight_decay", 0.0))
                        factor = 0.0 if matrix in self.radii else inner.decay_factors.get(matrix, 1)
                        return rate, decay * factor
        return None

    def norms(self, shards: Sequence[MatrixShard]) -> dict[MatrixId, float]:
        """Norms of the matrices that may have a hyperball step. Enter on all ranks.

        Args:
            shards: catalog of this rank without rows that pad the vocabulary.

        Returns:
            Matrix id -> Frobenius norm of the whole matrix, of those in this rank's optimizers.
        """
        norms: dict[MatrixId, float] = {}
        self._sums = []
        sources = zip(self.parts_in(shards), self._domains, strict=True)
        for (_, tensors), domain in sources:
            sums = NormSums(domain, shards, tensors)
            self._sums.append(sums)
            norms.update(sums.norms())
        return norms

    def start_hyperball(self, radii: Mapping[MatrixId, float], learning_rate: float | None) -> None:
        """Step some matrices on spheres from now on. Call after `norms`.

        Args:
            radii: matrix id -> Frobenius norm that it keeps, of all matrices of the job with a
                hyperball step.
            learning_rate: largest hyperball learning rate; None for the default.
        """
        self.radii = dict(radii)
        for inner, sums, domain in zip(self._inner, self._sums, self._domains, strict=True):
            own = {matrix: radii[matrix] for matrix in sums.matrices if matrix in radii}
            if own:
                inner.start_hyperball(
                    HyperballStep(
                        inner.optimizer,
                        sums,
                        list(inner.parts.values()),
                        own,
                        learning_rate=learning_rate,
                        peak_rate=domain.peak_rate,
                    )
                )

    def set_multipliers(self, multipliers: Mapping[MatrixId, float]) -> None:
        """Set the multipliers for the next update. Default 1."""
        for inner in self._inner:
            inner.multipliers = {m: multipliers[m] for m in inner.matrices if m in multipliers}

    def set_decay_factors(self, factors: Mapping[MatrixId, float]) -> None:
        """Set factors on the weight decay for the whole run, before its first step. Default 1."""
        for inner in self._inner:
            inner.decay_factors = {m: factors[m] for m in inner.matrices if m in factors}

    def parts_in(
        self, shards: Sequence[MatrixShard]
    ) -> list[tuple[InnerGroups, list[TensorMatrices]]]:
        """Every inner optimizer, and the ranges of matrices in the tensors that it steps.

        Args:
            shards: catalog of this rank. Rows that it omits (padding) are in no range.
        """
        by_parameter = _by_parameter(shards)
        return [
            (
                inner,
                [
                    (stepped, _matrices_in(stepped, by_parameter[id(stepped.parameter)]))
                    for stepped, _ in inner.parts.values()
                ],
            )
            for inner in self._inner
        ]


def _by_parameter(shards: Sequence[MatrixShard]) -> dict[int, list[MatrixShard]]:
    by_parameter: dict[int, list[MatrixShard]] = defaultdict(list)
    for shard in shards:
        by_parameter[id(shard.parameter)].append(shard)
    return by_parameter


def _matrices_in(stepped: SteppedTensor, shards: Sequence[MatrixShard]) -> tuple[MatrixRanges, ...]:
    """The matrices of one parameter in the slice of it that an optimizer steps."""
    columns = stepped.parameter.shape[1]
    parts = [
        (shard.matrix, flat_ranges(shard.placement.spans, columns, stepped.start, stepped.stop))
        for shard in shards
    ]
    # A slice with only padding of a vocabulary has no element of the matrix but is stepped with it.
    return tuple(parts) if len(parts) == 1 else tuple(part for part in parts if part[1])
