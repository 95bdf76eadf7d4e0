"""The library route of the README on a bare Megatron-Core loop, without `megatron.training`'s."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_llr import LLRConfig
from megatron_llr.megatron.assembly import UNSTEPPABLE
from megatron_llr.megatron.stepped_tensors import leaf_optimizers

README = Path(__file__).resolve().parents[2] / "README.md"
SEQUENCE, VOCABULARY = 16, 64


def library_block() -> str:
    """The code block of the README that shows the library route."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (found,) = (block for block in blocks if "get_megatron_optimizer(" in block)
    assert isinstance(found, str)
    return found


def build_model(tensor_parallel: int) -> list[torch.nn.Module]:
    harness.destroy_groups()
    parallel_state.initialize_model_parallel(tensor_parallel)
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE)
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=False)
    return [DistributedDataParallel(config, ddp, model)]


def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    losses = model(tokens, positions, mask, labels=tokens.roll(-1, 1))
    return losses, lambda out: (out.mean(), {"loss": out.mean().detach()})


def train_one_step(
    batch: torch.Tensor, *, model_chunks: list[Any], namespace: dict[str, Any], steps: list[float]
) -> None:
    model_chunks[0].zero_grad_buffer()
    namespace["optimizer"].zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch]),
        model=model_chunks,
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    succeeded, _, _ = namespace["optimizer"].step()
    assert succeeded
    steps.append(float(reports[0]["loss"]))


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("distributed", [False, True])
def test_the_readmes_block_trains_a_bare_megatron_model(distributed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)
    namespace: dict[str, Any] = {}
    steps: list[float] = []
    model_chunks = build_model(dist.get_world_size())
    namespace.update(
        optimizer_config=OptimizerConfig(
            optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0
        ),
        model_chunks=model_chunks,
        batches=[batch] * 8,
        train_one_step=partial(
            train_one_step, model_chunks=model_chunks, namespace=namespace, steps=steps
        ),
    )
    before = {name: p.detach().clone() for name, p in model_chunks[0].named_parameters()}
    exec(compile(library_block(), "README.md", "exec"), namespace)
    controller = namespace["controller"]
    assert steps[-1] < steps[0]
    assert controller.next_update == 9
    assert len(set(controller.multipliers.values())) > 5
    inner = next(iter(leaf_optimizers(namespace["optimizer"]))).optimizer
    assert any(not torch.equal(p, before[n]) for n, p in model_chunks[0].named_parameters())
    # Megatron's own groups are as it built them.
    assert len(inner.param_groups) <= 2
    resumed = LLRConfig(interval=100, ramp_iters=50)
    assert resumed.meaning() == controller.state_dict()["meaning"]


@pytest.mark.world_size(1)
def test_an_optimizer_that_megatron_built_gets_layer_groups() -> None:
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_llr import add_layer_groups, make_controller

    model_chunks = build_model(1)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), model_chunks)
    with pytest.raises(ValueError, match=r"has no layer groups.*add_layer_groups"):
        make_controller(optimizer, total_updates=100)
    add_layer_groups(optimizer, model_chunks, LLRConfig(), vocab_size=VOCABULARY)
    controller = make_controller(optimizer, total_updates=100)
    assert set(controller.multipliers.values()) == {1.0}
    controller.prepare()
    assert max(controller.multipliers.values()) == 5.0
    with pytest.raises(ValueError, match="already has layer groups"):
        add_layer_groups(optimizer, model_chunks, LLRConfig(), vocab_size=VOCABULARY)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", UNSTEPPABLE)
def test_what_layer_groups_do_not_work_with_is_refused_on_this_route_too(name: str) -> None:
    from megatron_llr import get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", lr=1e-3)
    setattr(config, name, True)
    with pytest.raises(ValueError, match=rf"{name}=True\) is not supported yet"):
        get_megatron_optimizer(config, build_model(1), llr=LLRConfig(), vocab_size=VOCABULARY)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("embedding", ["max", "measured"])
def test_the_vocabulary_is_asked_for(embedding: str) -> None:
    """Padding must never count, and only the caller knows what is padding."""
    from megatron_llr import get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", lr=1e-3)
    with pytest.raises(ValueError, match=r"vocab_size is None.* needed for embedding and head"):
        get_megatron_optimizer(config, build_model(1), llr=LLRConfig(embedding=embedding))


@pytest.mark.world_size(1, 2)
def test_padding_of_the_vocabulary_does_not_count() -> None:
    from megatron_llr import get_megatron_optimizer, make_controller

    config = OptimizerConfig(optimizer="adam", lr=1e-3)
    llr = LLRConfig(embedding="measured")
    alphas = []
    for padding in (0.0, 100.0):
        model_chunks = build_model(dist.get_world_size())
        holds_padding = dist.get_rank() == dist.get_world_size() - 1
        for name, parameter in model_chunks[0].named_parameters():
            if holds_padding and ("embedding" in name or "output_layer" in name):
                parameter.data[-4:] = padding
        optimizer = get_megatron_optimizer(config, model_chunks, llr=llr, vocab_size=VOCABULARY - 4)
        controller = make_controller(optimizer, total_updates=100)
        controller.prepare()
        assert controller.matrix_index["embedding"].rows == VOCABULARY - 4
        alphas.append(controller.alphas)
    assert alphas[0] == alphas[1]


@pytest.mark.world_size(1, 2)
def test_the_script_asks_the_tokenizer(shared_dir: Path) -> None:
    """`args.vocab_size` is another number, or none, with most tokenizers."""
    if dist.get_rank() == 0:
        words = {f"word{index}": index for index in range(242)} | {"</s>": 242}
        tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(
            shared_dir
        )
    dist.barrier()
    run = harness.train(
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shared_dir}",
        "--exit-interval 1",
    )
    assert {run.controller.matrix_index[m].rows for m in ("embedding", "head")} == {243}
