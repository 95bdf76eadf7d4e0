"""Small models by their sizes: Megatron's flags, and the logical matrices of the model.

Independent of the package, whose catalog is tested against it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Shape = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """A GPT model, or with `pattern` a hybrid one.

    Attributes:
        channels: width of a head, 0 for hidden / heads.
        experts: of every `moe_every`-th block, the last of that many; 0 for a dense model.
        shared: width of the shared expert, 0 for none; `shared_gate` weighs it.
        latent: width that experts work in, 0 for the model's.
        mla: multi-latent attention; `q_lora` is the width of the query's down projection.
        predictions: layers of multi-token prediction.
        pattern: letters of a hybrid model: `*` attention, `+` latent attention, `M` Mamba, `-`
            dense, `E` experts.
        prediction_pattern: letters of a layer of multi-token prediction in it.
    """

    blocks: int = 2
    hidden: int = 128
    heads: int = 4
    groups: int = 2
    channels: int = 0
    ffn: int = 192
    gated: bool = True
    tied: bool = False
    vocab: int = 250
    experts: int = 0
    expert_ffn: int = 64
    moe_every: int = 1
    shared: int = 0
    shared_gate: bool = False
    latent: int = 0
    mla: bool = False
    q_lora: int = 0
    kv_lora: int = 64
    predictions: int = 0
    pattern: str = ""
    prediction_pattern: str = ""

    # Widths of multi-latent attention and of Mamba, the same in all models.
    no_rope, rope, value = 32, 16, 32
    state, mamba_heads, mamba_width, mamba_groups = 16, 8, 16, 2

    def flags(self) -> str:
        """Megatron's flags; the vocabulary's padding is left to the layout."""
        chosen = [
            f"--hidden-size {self.hidden} --ffn-hidden-size {self.ffn}",
            f"--num-attention-heads {self.heads} --vocab-size {self.vocab}",
            "--seq-length 16 --max-position-embeddings 16 --normalization RMSNorm",
            "--position-embedding-type rope --disable-bias-linear",
        ]
        if self.pattern:
            whole = "/".join([self.pattern, *[self.prediction_pattern] * self.predictions])
            chosen.append(f"--hybrid-layer-pattern {whole}")
        else:
            chosen.append(f"--num-layers {self.blocks}")
        if self.gated:
            chosen.append("--swiglu")
        if not self.tied:
            chosen.append("--untie-embeddings-and-output-weights")
        if self.predictions:
            chosen.append(f"--mtp-num-layers {self.predictions}")
        if self.mla:
            chosen.append(
                f"--multi-latent-attention --kv-lora-rank {self.kv_lora} --qk-head-dim "
                f"{self.no_rope} --qk-pos-emb-head-dim {self.rope} --v-head-dim {self.value}"
            )
            if self.q_lora:
                chosen.append(f"--q-lora-rank {self.q_lora}")
        else:
            chosen.append(f"--group-query-attention --num-query-groups {self.groups}")
            chosen.append(f"--kv-channels {self.channels}" if self.channels else "")
        if self.experts:
            chosen.append(
                f"--num-experts {self.experts} --moe-ffn-hidden-size {self.expert_ffn} "
                f"--moe-router-topk 2 --moe-token-dispatcher-type allgather"
            )
            if not self.pattern:
                chosen.append(f"--moe-layer-freq ([0]*{self.moe_every - 1}+[1])*{self._periods}")
        if self.shared:
            chosen.append(f"--moe-shared-expert-intermediate-size {self.shared}")
            chosen.append("--moe-shared-expert-gate" if self.shared_gate else "")
        if self.latent:
            chosen.append(f"--moe-latent-size {self.latent}")
        if "M" in self.pattern + self.prediction_pattern:
            chosen.append(
                f"--mamba-state-dim {self.state} --mamba-head-dim {self.mamba_width} "
                f"--mamba-num-groups {self.mamba_groups} --mamba-num-heads {self.mamba_heads}"
            )
        return " ".join(chosen)

    @property
    def _periods(self) -> int:
        assert self.blocks % self.moe_every == 0
        return self.blocks // self.moe_every

    def matrices(self) -> dict[str, Shape]:
        """Matrix id -> shape, of all that are trained."""
        shapes: dict[str, Shape] = {"embedding": (self.vocab, self.hidden)}
        if self.pattern:
            shapes.update(_named("block.{}", self._hybrid(self.pattern)))
        else:
            for block in range(self.blocks):
                sparse = bool(self.experts) and (block + 1) % self.moe_every == 0
                shapes.update(_prefixed(f"block.{block}.", self._block(sparse)))
        for number in range(self.predictions):
            prefix = f"mtp.{number}."
            shapes[f"{prefix}eh_proj"] = (self.hidden, 2 * self.hidden)
            if self.pattern:
                inner = self._hybrid(self.prediction_pattern)
                assert len(inner) == 1, "one mixer is enough here"
                shapes.update(_prefixed(prefix, inner[0]))
            else:
                shapes.update(_prefixed(prefix, self._block(bool(self.experts))))
        if not self.tied:
            shapes["head"] = (self.vocab, self.hidden)
        return shapes

    def _block(self, sparse: bool) -> dict[str, Shape]:
        feed_forward = self._moe() if sparse else self._mlp(self.ffn, self.hidden)
        return {**self._attention(), **_prefixed("mlp.", feed_forward)}

    def _hybrid(self, letters: str) -> list[dict[str, Shape]]:
        """The blocks: one for every mixer, with the layers up to the next mixer."""
        blocks: list[dict[str, Shape]] = []
        for letter in letters.replace("|", ""):
            if letter in "*+M":
                blocks.append(self._mamba() if letter == "M" else self._attention())
                continue
            shapes = self._moe() if letter == "E" else self._mlp(self.ffn, self.hidden)
            before = len({name.split(".")[0] for name in blocks[-1]} - {"attention", "mamba"})
            blocks[-1].update(_prefixed(f"mlp{before + 1}." if before else "mlp.", shapes))
        return blocks

    def _attention(self) -> dict[str, Shape]:
        if not self.mla:
            width = self.channels or self.hidden // self.heads
            rows = {"q": self.heads * width, "k": self.groups * width, "v": self.groups * width}
            shapes = {role: (count, self.hidden) for role, count in rows.items()}
            return _prefixed("attention.", {**shapes, "o": (self.hidden, self.heads * width)})
        queries = self.heads * (self.no_rope + self.rope)
        shapes = {
            "kv_down": (self.kv_lora + self.rope, self.hidden),
            "kv_up": (self.heads * (self.no_rope + self.value), self.kv_lora),
            "o": (self.hidden, self.heads * self.value),
        }
        if self.q_lora:
            shapes.update(q_down=(self.q_lora, self.hidden), q_up=(queries, self.q_lora))
        else:
            shapes.update(q=(queries, self.hidden))
        return _prefixed("attention.", shapes)

    def _mamba(self) -> dict[str, Shape]:
        inner = self.mamba_heads * self.mamba_width
        rows = 2 * inner + 2 * self.mamba_groups * self.state + self.mamba_heads
        return {
            "mamba.in_proj": (rows, self.hidden),
            "mamba.out_proj": (self.hidden, inner),
        }

    def _mlp(self, width: int, model_width: int) -> dict[str, Shape]:
        shapes = {"up": (width, model_width), "down": (model_width, width)}
        return {**shapes, "gate": (width, model_width)} if self.gated else shapes

    def _moe(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"router": (self.experts, self.hidden)}
        inside = self.latent or self.hidden
        if self.latent:
            shapes.update(latent_down=(inside, self.hidden), latent_up=(self.hidden, inside))
        if self.shared:
            shapes.update(_prefixed("shared.", self._mlp(self.shared, self.hidden)))
        if self.shared_gate:
            shapes["shared.mix"] = (1, self.hidden)
        for expert in range(self.experts):
            shapes.update(_prefixed(f"expert.{expert}.", self._mlp(self.expert_ffn, inside)))
        return shapes

    def start(self, seed: int = 1234, std: float = 0.02) -> dict[str, torch.Tensor]:
        """The weights of `--llr-same-start`: every matrix drawn whole from the seed and its id.

        fp32; normal, with Megatron's smaller deviation for matrices that write to the residual
        stream (megatron/core/transformer/transformer_config.py).
        """
        return dict(self._drawn(seed, std))

    def _drawn(self, seed: int, std: float) -> Iterator[tuple[str, torch.Tensor]]:
        # Every layer of a hybrid model writes once, every layer of another twice.
        writes = len(self.pattern.replace("|", "")) or 2 * self.blocks
        outputs = ("o", "down", "out_proj", "latent_up")
        for matrix, shape in self.matrices().items():
            digest = hashlib.sha256(f"{seed} {matrix}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            small = std / writes**0.5 if matrix.rsplit(".", 1)[-1] in outputs else std
            yield matrix, torch.empty(shape).normal_(0.0, small, generator=generator)


def _prefixed(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _named(prefix: str, blocks: list[dict[str, Shape]]) -> dict[str, Shape]:
    return {
        f"{prefix.format(number)}.{name}": shape
        for number, block in enumerate(blocks)
        for name, shape in block.items()
    }
