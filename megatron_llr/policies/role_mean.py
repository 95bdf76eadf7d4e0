"""Control of the roles: one multiplier per role, the mean of what `esd` gives its matrices."""

from collections import defaultdict
from collections.abc import Mapping

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.policies.assign import assign_multipliers


def role_mean(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """The multipliers of LLR (arXiv 2605.22297), averaged over the matrices of each role.

    A gain that this keeps does not come from differences between blocks. The mean over all matrices
    is that of `esd`. Embedding and head keep their multipliers.
    """
    targets = assign_multipliers(alphas, config)
    by_role: dict[str, list[float]] = defaultdict(list)
    for matrix, target in targets.items():
        by_role[matrix.role].append(target)
    means = {role: sum(values) / len(values) for role, values in by_role.items()}
    return {
        matrix: target if matrix in EMBEDDING_IDS else means[matrix.role]
        for matrix, target in targets.items()
    }
