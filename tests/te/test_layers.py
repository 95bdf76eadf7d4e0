"""Models of Transformer Engine layers: the catalog reads them, converted checkpoints load."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Run, train

from megatron_llr.tools.convert.options import FLAGS, Options
from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
from megatron_llr.tools.convert.to_megatron import to_megatron
from tests.reference import families
from tests.unit.conversion import tensors


class _DoneError(Exception):
    """Transformer Engine's layers are built and loaded on CPU, but cannot compute there."""


@pytest.mark.parametrize("family", families.BUILDERS)
def test_a_converted_checkpoint_loads_into_transformer_engine_layers(
    family: str, shared_dir: Path
) -> None:
    """Every matrix is Hugging Face's, and what Megatron saves of it converts back to the bit."""
    from megatron.training.checkpointing import save_checkpoint

    families.save(families.build(family), shared_dir / "hf")
    to_megatron(shared_dir / "hf", shared_dir / "megatron", Options())
    source = tensors(shared_dir / "hf")

    def check(run: Run) -> None:
        kinds = {type(module).__name__ for module in run.model[0].modules()}
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= kinds
        weights = run.whole_weights(250)
        for block in range(4):
            prefix = f"model.layers.{block}."
            for matrix, name in (
                ("attention.q", "self_attn.q_proj"),
                ("attention.v", "self_attn.v_proj"),
                ("attention.o", "self_attn.o_proj"),
                ("mlp.up", "mlp.up_proj"),
            ):
                found = weights[f"block.{block}.{matrix}"]
                assert torch.equal(found, source[f"{prefix}{name}.weight"]), matrix
        save_checkpoint(1, run.model, run.optimizer, run.scheduler, 0)
        raise _DoneError

    with pytest.raises(_DoneError):
        train(
            (shared_dir / "megatron" / FLAGS).read_text().replace("\n", " "),
            "--transformer-impl transformer_engine --make-vocab-size-divisible-by 128",
            f"--load {shared_dir / 'megatron'} --save {shared_dir / 'saved'} --save-interval 1",
            tied=family == "qwen2",
            on_built=check,
        )
    to_hugging_face(shared_dir / "saved", shared_dir / "back", Options())
    back = tensors(shared_dir / "back")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)


def test_an_installed_transformer_engine_is_taken_as_whole() -> None:
    """In a new process: once imported, its library is found wherever it lies."""
    command = "from megatron_llr.megatron.packages import check_transformer_engine as c; c()"
    subprocess.run([sys.executable, "-c", command], check=True)
