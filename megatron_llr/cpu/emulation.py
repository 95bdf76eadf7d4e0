"""Run Megatron's own training loop on a machine without a GPU.

Megatron-Core names CUDA in many places that need nothing of it. `enable` answers
those places from the CPU so that the unchanged loop runs on gloo ranks. It is loaded by the
CPU route alone (`--llr-device cpu`, or `auto` where no GPU is found) and must be called before
megatron is first imported. It changes no number: what a test proves here is proved of Megatron's
code, not of a copy. It is not a substitute for measuring on a GPU.
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

# What Tensor.type() would answer on a GPU. clip_grads, the mixed-precision wrapper and the
# distributed optimizer of megatron-core 0.19 compare with these strings.
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}

_ANSWERED_HERE = frozenset({torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to})

_enabled = False


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Answer every request for a CUDA tensor with a CPU tensor."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Every torch call passes here: the common ones must leave again at once.
        if func in _ANSWERED_HERE:
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
    """Stands for a CUDA stream, event or device context: everything runs in program order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def record_event(self, *args: object) -> "_InertStream":
        """An event that has happened."""
        return self

    def elapsed_time(self, other: object) -> float:
        """Milliseconds between two events: not measured on CPU."""
        return 0.0

    def __enter__(self) -> "_InertStream":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _zero(*args: object, **kwargs: object) -> int:
    return 0


def _identity(module: torch.nn.Module, *args: object, **kwargs: object) -> torch.nn.Module:
    return module


def _get_cpu_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def _seed_cpu(seed: int) -> None:
    # A no-op here would make the tensor-parallel random streams of all ranks equal.
    torch.default_generator.manual_seed(int(seed))


def _substitute_torch_cuda() -> None:
    inert_stream = _InertStream()
    substitutes: dict[str, Any] = {
        "is_available": lambda: True,
        # 0 would make Megatron skip model-parallel initialisation.
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
        substitutes[name] = _zero
    for name, substitute in substitutes.items():
        setattr(torch.cuda, name, substitute)
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    torch.nn.Module.cuda = _identity  # type: ignore[method-assign,assignment]


def _substitute_torch() -> None:
    # Dynamo tabulates torch's functions when it is first imported and refuses two names for one.
    import torch._dynamo

    _CudaToCpu().__enter__()  # type: ignore[no-untyped-call]
    _substitute_torch_cuda()
    optimizer_class: Any = torch.optim.Optimizer
    optimizer_class._accelerator_graph_capture_health_check = _nothing
    original_loader_init = torch.utils.data.DataLoader.__init__

    def loader_init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        # An iterator draws a seed for its workers. From the default generator, which here also
        # drives dropout, that draw would come after a checkpoint's generator state is restored.
        kwargs.setdefault("generator", torch.Generator())
        original_loader_init(self, *args, **kwargs)

    torch.utils.data.DataLoader.__init__ = loader_init  # type: ignore[method-assign]


def _substitute_megatron() -> None:
    import megatron.core.optimizer as optimizer_package
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    import megatron.core.tensor_parallel.random as tensor_parallel_random
    import megatron.training.training as training

    random_module: Any = tensor_parallel_random
    # With one generator for both, the check for a CPU draw inside a GPU region always fires.
    logging.getLogger(tensor_parallel_random.__name__).setLevel(logging.ERROR)
    random_module._set_cuda_rng_state = _set_cpu_rng_state
    random_module._get_cuda_rng_state = _get_cpu_rng_state

    warm_up = training.set_jit_fusion_options

    def set_jit_fusion_options(*args: Any, **kwargs: Any) -> None:
        # Its warm-up draws random tensors whose size depends on the tensor-parallel size;
        # on a GPU that generator is not the one which initialises the weights on CPU.
        state = torch.get_rng_state()
        warm_up(*args, **kwargs)
        torch.set_rng_state(state)

    training.set_jit_fusion_options = set_jit_fusion_options

    # With torch's AdamW plain Megatron cannot resume the distributed optimizer exactly: it shares
    # one step tensor between all states. An AdamW that counts steps in its group, as Transformer
    # Engine's and apex's do, takes the path that every cluster takes.
    optimizer_module: Any = optimizer_package
    optimizer_module.Adam = GroupStepAdamW
    optimizer_module.USING_PYTORCH_OPTIMIZER = False
    distrib_module: Any = distrib_optimizer
    distrib_module.HAVE_APEX_OR_TE = True
    distrib_module.USING_APEX_OPTIMIZER = True
    distrib_module.Adam = GroupStepAdamW
    _substitute_async_save()

    # Each builds on what came before it.
    from megatron_llr.cpu import collectives, layers

    collectives.substitute()
    layers.substitute()

    from megatron_llr.cpu import hybrid

    hybrid.substitute()


def _substitute_async_save() -> None:
    """Fork a writer per save (--async-save), where a GPU job has one that it spawned at start.

    That one receives CPU tensors as shared memory, not as copies: it would write the weights
    while the next updates change them. A fork has the weights as they were.
    """
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils

    queue_class: Any = async_utils.AsyncCallsQueue
    queue_class._get_async_caller = lambda queue: async_utils.TemporalAsyncCaller()
    queue_class.warmup_persistent_caller = _nothing


def enable() -> None:
    """Make the substitutions of this module, once per process.

    Raises:
        RuntimeError: if megatron was imported before, since its modules have then already bound
            the names that are replaced here.
    """
    global _enabled
    if _enabled:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron_llr: the CPU runtime was enabled after megatron.core was imported; "
            "import megatron_llr.cpu.emulation and call enable() first"
        )
    _enabled = True
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _substitute_torch()
    _substitute_megatron()
