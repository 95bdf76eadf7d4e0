"""What thousands of logical matrices cost: construction, measurement, state, steps, logs.

Usage: OMP_NUM_THREADS=1 python benchmarks/many_matrices.py [--blocks 11] [--experts 128]
       python benchmarks/many_matrices.py --device cuda
       OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/many_matrices.py --layout tensor

A Megatron mixture of experts (SequentialMLP) on the library route: by default 128 experts in each
of 11 blocks, hidden 64, expert ffn 96, so that a matrix has 64 eigenvalues. On several ranks
`--layout` says what they share: `expert` (each its part of the experts), `tensor` (a part of every
matrix), `replica` (all hold all). Optimizer steps alternate with plain Megatron's in the same run:
in a ramp, in which all multipliers move, and after it. They are timed in processor time on a CPU,
in wall time up to the end of the GPU's work on a GPU.
"""

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr import LLRConfig, state
from megatron_llr.controller import LayerwiseController
from megatron_llr.measurement import measure
from megatron_llr.megatron import launch
from megatron_llr.telemetry.csv_log import CsvLog
from megatron_llr.telemetry.observer import Observer

# Megatron is imported inside the functions, after the device has been chosen.


class Clock:
    """Seconds by name, and the functions that they were spent in."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what happens inside to a name."""
        begun = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Time every call of a function of a module or an object."""
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return original(*args, **kwargs)

        setattr(owner, function, timed)

    def total(self, name: str) -> float:
        """All seconds of a name."""
        return sum(self.seconds.get(name, []))


def build_model(given: argparse.Namespace) -> list[torch.nn.Module]:
    """The model, wrapped, with a constant gradient in Megatron's buffers."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    world = dist.get_world_size()
    tensor = world if given.layout == "tensor" else 1
    expert = world if given.layout == "expert" else 1
    parallel_state.initialize_model_parallel(tensor, expert_model_parallel_size=expert)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=given.blocks,
        hidden_size=given.hidden,
        num_attention_heads=4,
        num_moe_experts=given.experts,
        moe_ffn_hidden_size=given.ffn,
        moe_token_dispatcher_type="allgather",
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=given.device == "cpu",
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(num_experts=given.experts, moe_grouped_gemm=False)
    model = GPTModel(config, spec, 256, 16).cuda()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=given.distributed_optimizer)
    chunk = DistributedDataParallel(config, ddp, model)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(1e-3)
    return [chunk]


def watch_engine(clock: Clock, engine: measure.SpectrumEngine) -> None:
    """Take a measurement's time apart."""
    clock.watch(measure, "eigenvalues_of", "eigensolver")
    clock.watch(measure, "records_from_eigenvalues", "fits")
    clock.watch(measure, "send_to_owners", "exchange of weights")
    clock.watch(engine, "_share_records", "exchange of records")
    clock.watch(engine, "_share_singular_values", "exchange of spectra")


def time_measurement(clock: Clock, engine: measure.SpectrumEngine) -> None:
    """Print the seconds of a measurement and what they went into."""
    watch_engine(clock, engine)
    # As with --llr-log-dir.
    engine.readers = (0,)
    dist.barrier()
    with clock.timed("measurement"):
        engine.measure()
    whole = clock.total("measurement")
    line = f"measurement: {whole:.2f} s, {1e3 * whole / len(engine.owners):.2f} ms per matrix"
    names = [name for name in clock.seconds if name in _PHASES]
    shares = [f"{name} {100 * clock.total(name) / whole:.1f} %" for name in names]
    rest = whole - sum(clock.total(name) for name in names)
    print_on_rank_0(f"{line}; {', '.join(shares)}, rest {100 * rest / whole:.1f} %")


_PHASES = (
    "eigensolver",
    "fits",
    "exchange of weights",
    "exchange of records",
    "exchange of spectra",
)


def print_on_rank_0(line: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def time_steps(
    controller: LayerwiseController, optimizer: Any, device: str
) -> dict[str, dict[str, float]]:
    """Median seconds of steps with layer groups and plain ones, in a ramp and after it.

    Args:
        controller: after `prepare()`.
        optimizer: of the controller.
        device: cpu, timed in processor time, or cuda, in wall time.

    Returns:
        "in a ramp" and "after the ramp" -> "plain", "layer groups" and "after_update".
    """
    inner = optimizer.llr.layer_groups._inner
    ramp = controller.config.ramp_iters
    spent: dict[str, dict[str, list[float]]] = {}

    def timed(work: Callable[[], object]) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        torch.cuda.synchronize()
        begun = clock()
        work()
        torch.cuda.synchronize()
        return clock() - begun

    for count in range(2 * ramp):
        phase = spent.setdefault("in a ramp" if count < ramp else "after the ramp", {})
        for kind in ("plain", "layer groups"):
            kept = [each.multipliers for each in inner]
            for each in inner if kind == "plain" else []:
                each.multipliers = {}
            phase.setdefault(kind, []).append(timed(optimizer.step))
            for each, multipliers in zip(inner, kept, strict=True):
                each.multipliers = multipliers
        phase.setdefault("after_update", []).append(timed(controller.after_update))
    return {
        phase: {kind: statistics.median(each[2:]) for kind, each in kinds.items()}
        for phase, kinds in spent.items()
    }


def print_steps(seconds: dict[str, dict[str, float]]) -> None:
    """Print what `time_steps` returned, and the ratio."""
    for phase, median in seconds.items():
        ours, after, plain = (median[kind] for kind in ("layer groups", "after_update", "plain"))
        print_on_rank_0(
            f"step {phase}: {1e3 * ours:.1f} ms and {1e3 * after:.1f} ms after it, "
            f"plain {1e3 * plain:.1f} ms, ratio {(ours + after) / plain:.3f}"
        )


def time_logs(controller: LayerwiseController, clock: Clock) -> None:
    """Print seconds and bytes of what one measurement and one step log, with either choice."""
    from torch.utils.tensorboard import SummaryWriter

    measured = controller._engine.measure()
    targets = controller.multipliers
    for choice in ("all", "roles"):
        by_role = choice == "roles"
        with tempfile.TemporaryDirectory() as made:
            folder, writer = Path(made), None
            csv_log = CsvLog(folder, by_role=by_role)
            csv_log.open(measured_up_to=0, rates_up_to=0)
            if dist.get_rank() == 0:
                writer = SummaryWriter(str(folder / "tensorboard"))
            controller._observer = observer = Observer(
                say=print_on_rank_0,
                csv_log=csv_log if dist.get_rank() == 0 else None,
                tensorboard=writer,
                by_role=by_role,
            )
            controller._ask_who_reads()
            with clock.timed(f"measured {choice}"):
                if dist.get_rank() == 0:
                    observer.measured(
                        1, measured.table, targets, controller.matrix_index, measured.spectra
                    )
            with clock.timed(f"stepped {choice}"):
                controller._observe_rates(1)
            if writer is not None:
                writer.close()
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sizes = [f"{path.name[:22]} {path.stat().st_size / 1e3:.0f} kB" for path in files]
            print_on_rank_0(
                f"logs, {choice}: measurement {clock.total(f'measured {choice}'):.2f} s, "
                f"step {clock.total(f'stepped {choice}'):.2f} s; {', '.join(sizes)}"
            )


def parse() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = (("blocks", 11), ("experts", 128), ("hidden", 64), ("ffn", 96))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layout", choices=("expert", "tensor", "replica"), default="expert")
    parser.add_argument("--distributed-optimizer", action="store_true")
    return parser.parse_args()


def build(given: argparse.Namespace, clock: Clock, observer: Observer) -> tuple[Any, Any]:
    """Optimizer and controller of the model; prints what their parts took to build."""
    from megatron.core.optimizer import OptimizerConfig

    from megatron_llr import get_megatron_optimizer, make_controller
    from megatron_llr.megatron import assembly, library

    chunks = build_model(given)
    clock.watch(assembly, "build_catalog", "catalog")
    clock.watch(assembly, "LayerGroups", "layer groups")
    clock.watch(assembly, "build_matrix_index", "matrix_index")
    clock.watch(library, "SpectrumEngine", "engine")
    config = LLRConfig(interval=100, ramp_iters=20, active_fraction=1.0)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=given.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, chunks, llr=config, vocab_size=256)
    controller = make_controller(optimizer, total_updates=1000, iteration=1, observer=observer)
    names = tuple(clock.seconds)
    print_on_rank_0(
        f"{len(controller.matrix_index)} matrices, {dist.get_world_size()} ranks, "
        f"layout {given.layout}; built: "
        + ", ".join(f"{name} {clock.total(name):.3f} s" for name in names)
    )
    return optimizer, controller


def main() -> None:
    """Build, measure, save, step and log; print what each took."""
    given = parse()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 29533)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    launch.prepare_device(["--llr-device", given.device])
    if given.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl")
    clock = Clock()
    # No log: what one costs is asked at the end.
    observer = Observer(say=lambda line: None, log_interval=10**6)
    optimizer, controller = build(given, clock, observer)
    controller.prepare()
    time_measurement(clock, controller._engine)
    with clock.timed("state"):
        text = state.encode(controller.state_dict())
    print_on_rank_0(
        f"state document in a ramp: {len(text) / 1e3:.0f} kB, "
        f"{len(text) / len(controller.matrix_index):.0f} bytes per matrix, "
        f"{clock.total('state'):.3f} s"
    )
    print_steps(time_steps(controller, optimizer, given.device))
    time_logs(controller, clock)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
