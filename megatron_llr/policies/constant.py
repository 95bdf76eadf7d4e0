"""Policies that look only at a matrix's id: `uniform`, `embedding-only`, `fixed`."""

from collections.abc import Mapping

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.policies.mean import mean_one
from megatron_llr.policies.role_table import read_role_table


def uniform(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Every multiplier 1: plain training, measured like the others."""
    return dict.fromkeys(alphas, 1.0)


def embedding_only(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Embedding and head at `config.embedding`, everything else at 1.

    The first control of LLR (arXiv 2605.22297): how much of its gain is a larger learning rate on
    the embedding? A larger one only there is also what arXiv 2502.19002 finds to matter most.
    """
    multiplier = config.embedding_multiplier()
    assert multiplier is not None, "checked in LLRConfig"
    raised = EMBEDDING_IDS - {"head"} if config.hyperball else EMBEDDING_IDS
    return {matrix: multiplier if matrix in raised else 1.0 for matrix in alphas}


def fixed(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """One multiplier per pattern of `--llr-role-table`, whatever the spectra say.

    With the table `llr`: the constants that LLR's multipliers converged to in its authors' 1B run
    (arXiv 2605.22297), which asks whether anything has to be measured at all.
    """
    assert config.role_table is not None
    table = read_role_table(config.role_table)
    if config.router == "one" and table.names_routers():
        raise input_error(
            f"{flag('role_table')} {config.role_table} names routers, which have multiplier 1 with "
            f"{flag('router')} one. Add {flag('router')} policy, or leave them out of the table."
        )
    return mean_one({matrix: table.row(matrix).multiplier for matrix in alphas}, config)
