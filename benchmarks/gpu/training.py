"""One training run on Megatron's own loop: losses, step times, measurements, peak memory."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_llr.megatron import launch
from megatron_llr.spectrum import record_from_eigenvalues


class _Watch:
    """Figures of the run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: dict[str, list[float]] = {}
        self.measured: list[tuple[int, float]] = []

    def timed(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and record its time, up to the end of its work on the device."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)
        return result


def _keep_losses(training: Any, watch: _Watch) -> None:
    original = training.training_log

    @functools.wraps(original)
    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "lm loss" in loss_dict:
            value = loss_dict["lm loss"]
            watch.losses.append(float(value if value.ndim == 0 else value[0] / value[1]))
        return original(loss_dict, *args, **kwargs)

    training.training_log = training_log


def _time_steps(training: Any, watch: _Watch, *, in_turn: bool) -> None:
    """Time every iteration, and the optimizer's step in it; with every second one plain."""
    train_step = training.train_step
    state = {"kind": "with"}

    def timed_train_step(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[3]
        assembly = getattr(optimizer, "llr", None)
        inner = assembly.layer_groups._inner if assembly is not None and in_turn else []
        kept = [one.multipliers for one in inner]
        plain = len(watch.seconds.get("with", [])) > len(watch.seconds.get("without", []))
        state["kind"] = "without" if in_turn and plain else "with"
        for one in inner:
            one.multipliers = {} if state["kind"] == "without" else one.multipliers
        if "step" not in vars(optimizer):
            step = optimizer.step
            optimizer.step = lambda: watch.timed(f"optimizer {state['kind']}", step)
        try:
            return watch.timed(state["kind"], train_step, *args, **kwargs)
        finally:
            for one, multipliers in zip(inner, kept, strict=True):
                one.multipliers = multipliers

    training.train_step = timed_train_step


def _watch_measurements(watch: _Watch, *, measured: bool) -> None:
    from megatron_llr.measurement import measure

    original = measure.SpectrumEngine.measure

    def invented(engine: Any) -> measure.Measurement:
        """Records without a decomposition, so that every matrix gets a multiplier of its own."""
        table = {}
        for index, matrix in enumerate(engine.owners):
            values = torch.linspace(0, 1, 64, dtype=torch.float64).mul(1 + index / 100).exp()
            table[matrix] = record_from_eigenvalues(values, method="invented")
        spectra = dict.fromkeys(table, torch.zeros(1, dtype=torch.float64))
        return measure.Measurement(table, spectra, 0.0)

    def measure_and_keep(engine: Any) -> Any:
        measurement = original(engine) if measured else invented(engine)
        if measured:
            watch.measured.append((len(measurement.table), measurement.seconds))
        return measurement

    measure.SpectrumEngine.measure = measure_and_keep  # type: ignore[method-assign]


def train(
    device: str,
    flags: list[str],
    *,
    extension: bool = True,
    in_turn: bool = False,
    measured: bool = True,
) -> dict[str, Any]:
    """Train once.

    Args:
        device: cuda or cpu.
        flags: Megatron's and the extension's.
        extension: whether the job uses it; otherwise plain Megatron.
        in_turn: layer groups in every second iteration only.
        measured: whether spectra are computed; otherwise exponents are invented.

    Returns:
        losses; seconds of iterations and optimizer steps, with and without layer groups;
        (matrices, seconds) of every measurement; peak bytes; what the optimizers take.
    """
    sys.argv[1:] = launch.prepare_device(["--llr-device", device, *flags])
    import megatron.training.training as training_module
    from megatron.training import get_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_llr.megatron import job

    watch = _Watch()
    training = training_module
    kept: list[Any] = []
    setup = training.setup_model_and_optimizer

    @functools.wraps(setup)
    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        kept.append(built[1])
        return built

    training.setup_model_and_optimizer = setup_and_keep
    _keep_losses(training, watch)
    _time_steps(training, watch, in_turn=in_turn)
    _watch_measurements(watch, measured=measured)
    if extension:
        job.pretrain()
    else:
        job.use_prebuilt_dataset_helpers()
        job.run_loop(parse_and_validate_args(extra_args_provider=job.add_llr_arguments))
    args = get_args()
    assembly = getattr(kept[0], "llr", None)
    inner = assembly.layer_groups._inner if assembly is not None else []
    return {
        "losses": watch.losses,
        "seconds": watch.seconds,
        "measured": watch.measured,
        "peak_bytes": int(torch.cuda.max_memory_allocated()),
        "tokens": args.global_batch_size * args.seq_length,
        "stepping": sorted({f"{type(i.optimizer).__name__}: {i.stepping}" for i in inner}),
    }
