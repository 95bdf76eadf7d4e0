"""Shared by tests of hyperball steps in kernels: a small model, sliced as by Megatron."""

from collections.abc import Sequence

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement, Span, Spans, interleaved, stacked
from megatron_llr.param_groups.hyperball import HyperballStep
from megatron_llr.param_groups.hyperball_norms import SteppedDomain
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.projection import KernelProjection, WindowProjection
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from tests.reference.matrix_ids import shard_of
from tests.triton.adam import OPTIMIZERS, RATE

ETA = 0.03
COLUMNS = 50
# Name -> rows, the matrices in it, and where the distributed optimizer cuts it. The second slices
# begin inside a row; that of the head has only rows that pad the vocabulary.
PARAMETERS: dict[str, tuple[int, Spans, tuple[int, ...]]] = {
    "qkv": (24, interleaved([("q", 4), ("k", 2), ("v", 2)], 3, 0, 24), (333,)),
    "fc1": (40, stacked(("gate", "up"), 40, 0), ()),
    "down": (40, stacked(("down",), 40, 0), (433,)),
    "head": (24, stacked(("head",), 24, 0), (1020,)),
    "embedding": (24, stacked(("embedding",), 24, 0), ()),
    "norm": (1, {}, ()),
}
VOCABULARY = 20
PLAIN = ("embedding", "norm")
IDS = {
    role: MatrixId.read(
        role
        if role in ("head", "embedding")
        else f"block.0.{'attention' if role in 'qkv' else 'mlp'}.{role}"
    )
    for _, spans, _ in PARAMETERS.values()
    for role in spans
}
MULTIPLIERS = {
    IDS[role]: value
    for role, value in {
        "q": 1.5,
        "k": 5.0,
        "v": 0.25,
        "gate": 2.0,
        "up": 1.0,
        "down": 0.5,
        "embedding": 3.0,
    }.items()
}


class HyperballModel:
    """The tensors of `PARAMETERS` in two param groups (the norm without decay) of an optimizer.

    Args:
        name: of `tests.triton.adam.OPTIMIZERS`.
        device: cuda or cpu.
        way: fused, or the grouped way with its projection by kernels or by windows.
        only: names of the parameters; default all.
    """

    def __init__(self, name: str, device: str, way: str, only: Sequence[str] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        self.masters = name == "masters"
        self.weights: dict[str, torch.nn.Parameter] = {}
        self.stepped: dict[str, list[SteppedTensor]] = {}
        for key, (rows, _, cuts) in PARAMETERS.items():
            drawn = 0.02 * torch.randn(rows, COLUMNS, generator=generator)
            if only and key not in only:
                continue
            half = self.masters and key != "norm"
            weight = drawn.to(device, torch.bfloat16 if half else torch.float32)
            self.weights[key] = parameter = torch.nn.Parameter(weight)
            flat, ends = weight.view(-1), (*cuts, weight.numel())
            slices = zip((0, *cuts), ends, strict=True)
            self.stepped[key] = [SteppedTensor(flat[a:b], parameter, a) for a, b in slices]
        tensors = {key: [s.tensor for s in stepped] for key, stepped in self.stepped.items()}
        groups = [
            {"params": [t for key, own in tensors.items() if key != "norm" for t in own]},
            {"params": tensors.get("norm", []), "weight_decay": 0.0},
        ]
        self.optimizer = OPTIMIZERS[name](groups)
        every = [each for stepped in self.stepped.values() for each in stepped]
        self.layer_groups = LayerGroups(
            [(self.optimizer, every)],
            self._shards(padded=True),
            step="fused" if way == "fused" else "grouped",
            domains=[SteppedDomain(list(self.weights.values()), None, lambda group: RATE)],
        )
        self.radii = self.layer_groups.norms(self._shards(padded=False))
        self.layer_groups.start_hyperball(self.radii, ETA)
        self.layer_groups.set_multipliers(MULTIPLIERS)
        if way != "fused":
            kind = KernelProjection if way == "kernels" else WindowProjection
            step = self.hyperball
            step._projection = kind(list(step.tensors.values()), step.sums)

    def _shards(self, *, padded: bool) -> list:
        shards = []
        for key, weight in self.weights.items():
            for role, spans in PARAMETERS[key][1].items():
                if key in ("head", "embedding") and not padded:
                    spans = (Span(0, 0, VOCABULARY),)
                placement = Placement(spans, 0, COLUMNS)
                shards.append(shard_of(IDS[role], weight, (placement,), placement.rows, COLUMNS))
        return shards

    @property
    def inner(self) -> InnerGroups:
        return self.layer_groups._inner[0]

    @property
    def hyperball(self) -> HyperballStep:
        step = self.inner.hyperball
        assert step is not None
        return step

    def set_gradients(self, seed: int, without: Sequence[tuple[str, int]] = ()) -> None:
        """Random gradients of every slice, except those in `without`: (name, number)."""
        generator = torch.Generator().manual_seed(seed)
        for key, stepped in self.stepped.items():
            for number, each in enumerate(stepped):
                drawn = torch.randn(each.tensor.shape, generator=generator)
                gradient = None if (key, number) in without else drawn.to(each.tensor.device)
                setattr(each.tensor, "decoupled_grad" if self.masters else "grad", gradient)

    def step(self, seed: int, without: Sequence[tuple[str, int]] = ()) -> None:
        """One step of random gradients."""
        self.set_gradients(seed, without)
        self.optimizer.step()

    def fp32(self, key: str) -> torch.Tensor:
        """A copy of the fp32 weights of a parameter, of the tensors or of the state."""
        parts = []
        for each in self.stepped[key]:
            state = self.optimizer.state.get(each.tensor) or {}
            parts.append(state.get("master_param", each.tensor).detach().float())
        return torch.cat(parts).view(-1, COLUMNS).clone()

    def moments(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 copies of the moments of a parameter."""
        states = [self.optimizer.state[each.tensor] for each in self.stepped[key]]
        first, second = (
            torch.cat([state[name] for state in states]).double().view(-1, COLUMNS)
            for name in ("exp_avg", "exp_avg_sq")
        )
        return first, second


def rows_of(key: str, role: str) -> list[int]:
    """The rows of a matrix in its parameter, without padding."""
    rows = [
        r for span in PARAMETERS[key][1][role] for r in range(span.local, span.local + span.count)
    ]
    return rows[:VOCABULARY] if key in ("head", "embedding") else rows
