"""The hyperball step as a part of the fused step of an Adam optimizer.

The launch that steps the plain tensors steps only the moments of the others, and sums |W|^2, |u|^2
and <W, u> over every chunk. A second launch computes u from the moments again, which takes fewer
bytes than a copy of u and no memory, and writes the new weights. Together they move 40 bytes per
element with fp32 gradients, where a step without projection moves 28.
"""

from collections.abc import Mapping, Sequence

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.adam_kernel import Chunks, DirectionSums, Formula
from megatron_llr.param_groups.hyperball import HyperballStep
from megatron_llr.param_groups.hyperball_kernel import MatrixOrder, launch_projection, total_sums
from megatron_llr.param_groups.rate_rows import RateRow


class FusedProjection:
    """Sums over the chunks of a fused step, and the projection after it.

    Args:
        hyperball: the hyperball step.
        launches: computation and chunks of every launch.
        rows: the rows of rates, [R].

    Attributes:
        sums: what each launch writes.
        is_plain: [R] whether the weights of a row of rates are stepped; on the CPU.
    """

    def __init__(
        self,
        hyperball: HyperballStep,
        launches: Sequence[tuple[Formula, Chunks]],
        rows: Sequence[RateRow],
    ) -> None:
        self._hyperball = hyperball
        device = launches[0][1].row.device
        row_matrix = torch.tensor([row.hyperball for row in rows], dtype=torch.int32)
        self.is_plain = row_matrix < 0
        row_matrix = row_matrix.to(device)
        counted = torch.tensor([row.counted for row in rows], device=device)
        chunk_row = torch.cat([chunks.row for _, chunks in launches]).long()
        in_sums = torch.where(counted, row_matrix, -1)[chunk_row]
        self._order = MatrixOrder.of(in_sums, len(hyperball.sums.matrices))
        self._partials = torch.empty(chunk_row.numel(), 3, dtype=torch.float64, device=device)
        self._projections: list[tuple[Formula, Chunks]] = []
        self.sums: list[DirectionSums] = []
        first = 0
        for formula, chunks in launches:
            last = first + chunks.row.numel()
            self.sums.append(DirectionSums(row_matrix, self._partials[first:last]))
            chunk_matrix = row_matrix[chunks.row.long()]
            projected = chunk_matrix >= 0
            own = Chunks(
                chunks.tensor[projected],
                chunks.first[projected],
                chunks.length[projected],
                chunk_matrix[projected],
            )
            self._projections.append((formula, own))
            first = last

    def project(
        self,
        multipliers: Mapping[MatrixId, float],
        addresses: torch.Tensor,
        corrections: torch.Tensor,
    ) -> None:
        """Write the new weights. Call on all ranks, after the launches.

        Args:
            multipliers: of the matrices. Default 1.
            addresses: as for the launches.
            corrections: as for the launches.
        """
        sums = total_sums(self._partials, self._order)
        moves = self._hyperball.moves(multipliers, sums).float()
        for formula, chunks in self._projections:
            launch_projection(chunks, addresses, moves, formula, corrections)
