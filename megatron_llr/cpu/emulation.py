"""Runs Megatron's training loop on a machine without a GPU.

Megatron-Core uses CUDA functions in many places that do not need a GPU. `enable` replaces these
functions, so that the unchanged loop runs on gloo ranks. It is used only by the CPU route
(`--llr-device cpu`, or `auto` without a GPU) and must be called before megatron is first imported.
It does not change results, so tests on it test Megatron's code, not a copy. It says nothing about
performance on a GPU.
"""

import contextlib
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_llr.cpu.adam import GroupStepAdamW

CPU = torch.device("cpu")

# Results of Tensor.type() on a GPU. clip_grads, the mixed-precision wrapper and the distributed
# optimizer of megatron-core 0.19 compare with these strings.
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

_REPLACED_METHODS = frozenset({torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to})

_enabled = False


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Creates a CPU tensor for every request for a CUDA tensor."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Every torch call is handled here, so the common ones must return early.
        if func in _REPLACED_METHODS:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
            if func is torch.Tensor.to:
                args = tuple(CPU if _names_cuda(argument) else argument for argument in args)
        if not kwargs:
            return func(*args)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _InertStream:
    """Replaces a CUDA stream, event or device context. Everything runs in program order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        """Whether all work is complete: always true."""
        return True

    def record_event(self, *args: object) -> "_InertStream":
        """A completed event."""
        return self

    def elapsed_time(self, other: object) -> float:
        """Milliseconds between two events, which is not measured on CPU: 0."""
        return 0.0

    def __enter__(self) -> "_InertStream":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _get_cpu_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def _seed_cpu(seed: int) -> None:
    # Without it, the random streams of all tensor-parallel ranks would be equal.
    torch.default_generator.manual_seed(int(seed))


def _substitute_torch_cuda() -> None:
    inert_stream = _InertStream()
    substitutes: dict[str, Any] = {
        "is_available": lambda: True,
        # With 0, Megatron would skip model-parallel initialization.
        "device_count": lambda: max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "current_device": lambda: CPU,
        "current_stream": lambda *a, **k: inert_stream,
        "default_stream": lambda *a, **k: inert_stream,
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "device": _InertStream,
        "Stream": _InertStream,
        "Event": _InertStream,
        "get_rng_state": _get_cpu_rng_state,
        "set_rng_state": _set_cpu_rng_state,
        "manual_seed": _seed_cpu,
        "manual_seed_all": _seed_cpu,
        "memory_stats": lambda *a, **k: defaultdict(int),
        "get_device_name": lambda *a, **k: "cpu",
        "get_device_properties": lambda *a, **k: SimpleNamespace(
            name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0
        ),
        "get_device_capability": lambda *a, **k: (0, 0),
        "FloatTensor": torch.FloatTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "HalfTensor": torch.HalfTensor,
        "LongTensor": torch.LongTensor,
    }
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "set_stream",
        "reset_peak_memory_stats",
        "_lazy_init",
    ):
        substitutes[name] = _nothing
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        substitutes[name] = lambda *a, **k: 0
    for name, substitute in substitutes.items():
        setattr(torch.cuda, name, substitute)
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


def _substitute_torch() -> None:
    # At its first import, Dynamo builds a table of torch's functions and rejects duplicates.
    import torch._dynamo

    _CudaToCpu().__enter__()  # type: ignore[no-untyped-call]
    _substitute_torch_cuda()
    optimizer_class: Any = torch.optim.Optimizer
    optimizer_class._accelerator_graph_capture_health_check = _nothing
    original_loader_init = torch.utils.data.DataLoader.__init__

    def loader_init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        # An iterator draws a seed for its workers. With the default generator, which dropout also
        # uses here, it would be drawn after a checkpoint's generator state is restored.
        kwargs.setdefault("generator", torch.Generator())
        original_loader_init(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = loader_init  # type: ignore[method-assign]


def _substitute_megatron() -> None:
    import megatron.core.optimizer as optimizer_package
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    import megatron.core.tensor_parallel.random as tensor_parallel_random
    import megatron.training.training as training

    random_module: Any = tensor_parallel_random
    # With one generator for both, the check for a CPU draw in a GPU region always warns.
    logging.getLogger(tensor_parallel_random.__name__).setLevel(logging.ERROR)
    random_module._set_cuda_rng_state = _set_cpu_rng_state
    random_module._get_cuda_rng_state = _get_cpu_rng_state

    warm_up = training.set_jit_fusion_options

    def set_jit_fusion_options(*args: Any, **kwargs: Any) -> None:
        # Its warm-up draws random tensors whose size depends on the tensor-parallel size. On a GPU,
        # their generator is not the one that initializes the weights on CPU.
        state = torch.get_rng_state()
        warm_up(*args, **kwargs)
        torch.set_rng_state(state)

    training.set_jit_fusion_options = set_jit_fusion_options

    # With torch's AdamW, Megatron cannot resume the distributed optimizer exactly, since it shares
    # one step tensor between all states. An AdamW with the step in the group, as in Transformer
    # Engine and apex, uses the same code in Megatron as a GPU job.
    optimizer_module: Any = optimizer_package
    optimizer_module.Adam = GroupStepAdamW
    optimizer_module.USING_PYTORCH_OPTIMIZER = False
    distrib_module: Any = distrib_optimizer
    distrib_module.HAVE_APEX_OR_TE = True
    distrib_module.USING_APEX_OPTIMIZER = True
    distrib_module.Adam = GroupStepAdamW
    _substitute_async_save()

    # In this order: each import depends on the substitutions before it.
    from megatron_llr.cpu import collectives, local_layers

    collectives.substitute()
    local_layers.substitute()

    from megatron_llr.cpu import hybrid

    hybrid.substitute()


def _substitute_async_save() -> None:
    """Fork one writer per save (--async-save). A GPU job spawns one persistent writer.

    A persistent writer receives CPU tensors as shared memory, not as copies, and would write
    weights that the next updates have changed. A forked writer has a copy of the weights.
    """
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils

    queue_class: Any = async_utils.AsyncCallsQueue
    queue_class._get_async_caller = lambda queue: async_utils.TemporalAsyncCaller()
    queue_class.warmup_persistent_caller = _nothing


def enable() -> None:
    """Replace the CUDA functions, once per process.

    Raises:
        RuntimeError: if megatron has been imported, since its modules have then already bound the
            names that are replaced.
    """
    global _enabled
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron_llr: the CPU emulation was enabled after megatron.core was imported. "
            "Call megatron_llr.cpu.emulation.enable() first"
        )
    _enabled = True
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _substitute_torch()
    _substitute_megatron()
