"""Matrix ids over Transformer Engine's layer specs: what the layers of a cluster are called."""

import pytest
import torch
from harness import Run, train
from megatron.core.utils import unwrap_model

from tests.reference.models import Model

MOE = Model(experts=4, shared=96, shared_gate=True)
MODELS = {
    "dense": Model(),
    "moe": MOE,
    "moe-latent": Model(experts=4, latent=64, shared=96),
    "mla": Model(mla=True),
    "mla-q-lora": Model(mla=True, q_lora=64),
    "mtp": Model(predictions=2, experts=4),
    "hybrid": Model(pattern="*-*E", experts=4, shared=96, groups=4),
}
MLA = MODELS["mla-q-lora"]


class _DoneError(Exception):
    """Transformer Engine's layers are built on CPU, but cannot compute there."""


def built(model: Model, flags: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The model over Transformer Engine's layers, from `--llr-same-start`."""
    # Its grouped products ask for a GPU that has them, when they are built already.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    kept: list[Run] = []

    def stop(run: Run) -> None:
        kept.append(run)
        raise _DoneError

    with pytest.raises(_DoneError):
        train(
            "--transformer-impl transformer_engine --make-vocab-size-divisible-by 128",
            f"--llr-same-start {flags}",
            model=model.flags(),
            on_built=stop,
        )
    return kept[0]


@pytest.mark.parametrize("grouped", ["", "--moe-grouped-gemm"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_shapes_are_those_of_the_papers(
    name: str, grouped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]
    if grouped and not model.experts:
        pytest.skip("no experts to group")
    weights = built(model, grouped, monkeypatch).whole_weights(model.vocab)
    expected = model.start()
    assert weights.keys() == expected.keys()
    for matrix, weight in expected.items():
        assert torch.equal(weights[matrix], weight), matrix


def test_the_fused_down_projection_is_two_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The query's rows come first, as Megatron splits its output."""
    run = built(MLA, "--mla-down-proj-fusion", monkeypatch)
    parameters = dict(unwrap_model(run.model[0]).named_parameters())
    fused = parameters["decoder.layers.1.self_attention.linear_qkv_down_proj.weight"]
    expected = MLA.start()
    assert run.whole_weights(250).keys() == expected.keys()
    assert torch.equal(fused[: MLA.q_lora], expected["block.1.attention.q_down"])
    assert torch.equal(fused[MLA.q_lora :], expected["block.1.attention.kv_down"])
