"""Converted checkpoints in Megatron's own model: the same function both ways, at any layout."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model
from transformers import AutoModelForCausalLM

from megatron_llr.ranks import gather_objects, together
from megatron_llr.tools.convert.options import FLAGS, STATE, Options
from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
from megatron_llr.tools.convert.to_megatron import to_megatron
from tests.reference import families

LAYOUTS = {
    1: {"tp1": ""},
    2: {
        "tp2": "--tensor-model-parallel-size 2",
        "pp2": "--pipeline-model-parallel-size 2",
        "dp2": "--bf16 --use-distributed-optimizer",
    },
}

# The vocabulary of 250 is padded to 256, as the converter does, by Megatron on every layout.
CALM = "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 128"
TOKENS = torch.randint(250, (2, 16), generator=torch.Generator().manual_seed(3))


def logits(run: Run) -> torch.Tensor:
    """Megatron's logits of TOKENS, [batch, sequence, padded vocabulary], on every rank."""
    model = unwrap_model(run.model[0])
    was_training = model.training
    positions = torch.arange(16).expand_as(TOKENS)
    mask = torch.ones(1, 1, 16, 16).triu(1).bool()
    forward = functools.partial(model.eval(), TOKENS, positions, mask)
    with torch.no_grad():
        if mpu.get_pipeline_model_parallel_world_size() == 1:
            found = gather_objects(forward())
            parts = found if mpu.get_tensor_model_parallel_world_size() > 1 else found[:1]
        else:
            hidden = gather_objects(forward() if dist.get_rank() == 0 else None)[0]
            if dist.get_rank() == 1:
                model.set_input_tensor(hidden)
            parts = gather_objects(forward() if dist.get_rank() == 1 else None)[1:]
    model.train(was_training)
    return torch.cat(parts, dim=-1)


def convert_on_one(action: Any) -> None:
    """Run a conversion on rank 0; an error reaches every rank."""
    together(lambda: action() if dist.get_rank() == 0 else None)


def flags_here(name: str) -> str:
    """Flags of a layout; skips the test where it does not fill the world."""
    layouts = LAYOUTS[dist.get_world_size()]
    if name not in layouts:
        pytest.skip("another world size")
    return layouts[name]


def flags_of(folder: Path) -> str:
    return (folder / FLAGS).read_text().replace("\n", " ")


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("family", families.BUILDERS)
@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2"])
def test_a_hugging_face_model_is_the_same_function_in_megatron(
    name: str, family: str, shared_dir: Path
) -> None:
    """Logits agree to 1e-4 in fp32; the checkpoint loads as a release and trains from update 1.

    The tokenizer knows fewer tokens than the model has rows, as with Qwen.
    """
    layout = flags_here(name)
    model = families.build(family)
    convert_on_one(
        lambda: (
            families.save(model, shared_dir / "hf"),
            to_megatron(shared_dir / "hf", shared_dir / "megatron", Options()),
        )
    )
    found: list[torch.Tensor] = []
    run = train(
        flags_of(shared_dir / "megatron"),
        layout,
        f"--vocab-size 100 --load {shared_dir / 'megatron'} --exit-interval 2",
        tied=model.config.tie_word_embeddings,
        on_built=lambda built: found.append(logits(built)),
    )
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert torch.allclose(found[0][..., :250], expected, atol=1e-4)
    assert run.controller.state_dict()["schedule"]["start"] == 1
    assert len(run.losses) == 2


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("family", families.BUILDERS)
@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2"])
def test_a_trained_checkpoint_is_the_same_function_in_transformers(
    name: str, family: str, shared_dir: Path
) -> None:
    """Trained, saved and converted: logits agree to 1e-4; the layerwise state lies beside."""
    layout = flags_here(name)
    found: list[torch.Tensor] = []

    def keep(run: Run, update: int, done: bool) -> None:
        if update == 2 and done:
            found.append(logits(run))

    run = train(
        families.FLAGS[family],
        CALM,
        layout,
        f"--save {shared_dir / 'megatron'} --save-interval 2 --exit-interval 2",
        tied=family == "qwen2",
        on_update=keep,
    )
    convert_on_one(lambda: to_hugging_face(shared_dir / "megatron", shared_dir / "hf", Options()))
    model = AutoModelForCausalLM.from_pretrained(shared_dir / "hf", attn_implementation="eager")
    assert model.config.model_type == family
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    assert torch.allclose(found[0][..., :250], expected, atol=1e-4)
    document = json.loads((shared_dir / "hf" / STATE).read_text())
    assert document == run.controller.state_dict()


@pytest.mark.world_size(2)
def test_a_converted_checkpoint_trains_in_bf16_over_replicas(shared_dir: Path) -> None:
    """DP 2 with the distributed optimizer, from an fp32 and from a bf16 conversion."""
    model = families.build("llama")
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        hf, target = shared_dir / "hf", shared_dir / str(dtype)
        convert_on_one(
            lambda dtype=dtype, hf=hf, target=target: (
                hf.exists() or families.save(model, hf),
                to_megatron(hf, target, Options(dtype=dtype)),
            )
        )
        flags = f"--load {target} --exit-interval 3"
        run = train(flags_of(target), CALM, LAYOUTS[2]["dp2"], flags)
        losses.append(run.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
