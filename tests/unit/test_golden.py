"""Reference figures of the official code (Layer-wise-Learning-Rate at bbd0dcf)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_llr import LLRConfig, MultiplierSchedule, analyze_matrix, assign_multipliers
from tests.reference.matrix_ids import from_hugging_face
from tests.reference.parity import OfficialRamps


def rebuild(row: dict[str, Any]) -> torch.Tensor:
    """The matrix of a row of spectra.json, from its kind, shape and seed."""
    rows, cols, random = row["rows"], row["cols"], np.random.default_rng(row["seed"])
    gaussian, small = random.standard_normal((rows, cols)), min(rows, cols)

    def low_rank(rank: int) -> np.ndarray:
        left = random.standard_normal((rows, rank))
        return left @ random.standard_normal((rank, cols)) / np.sqrt(rank)

    match row["kind"]:
        case "gaussian":
            matrix = 0.02 * gaussian
        case "heavy":
            matrix = 0.02 * random.standard_t(2.5, size=(rows, cols))
        case "spiked":
            matrix = 0.02 * gaussian + 0.05 * low_rank(max(1, small // 16))
        case "lowrank":
            matrix = 0.02 * low_rank(max(2, int(0.75 * small))) + 1e-4 * gaussian
        case "powerlaw":
            left, _ = np.linalg.qr(random.standard_normal((rows, small)))
            right, _ = np.linalg.qr(random.standard_normal((cols, small)))
            exponent = -(0.3 + 0.1 * (row["seed"] % 7))
            matrix = left @ np.diag(np.arange(1, small + 1.0) ** exponent) @ right.T
        case kind:
            raise AssertionError(kind)
    return torch.from_numpy(matrix.astype(np.float32))


def test_spectra(golden: Path) -> None:
    """Three fits and every metric of the file."""
    rows = json.loads((golden / "spectra.json").read_text())
    assert len(rows) > 10
    for row in rows:
        matrix = rebuild(row)
        full = analyze_matrix(matrix, ("hill_median", "ks", "fix_finger"))
        for record in (full, analyze_matrix(matrix)):
            metrics = {
                "alpha_median": record.alpha_hill_median,
                "alphahat": record.alpha_hat,
                "fnorm": record.frobenius_norm**2,
                "spectral_norm": record.spectral_norm**2,
                "stable_rank": record.stable_rank,
                "entropy": record.entropy,
            }
            for name, value in metrics.items():
                assert value == pytest.approx(row[name], rel=1e-4), (row, name)
        assert full.num_eigenvalues == min(row["rows"], row["cols"])
        # Where KS distances tie within float32 the search may pick a neighbouring tail start.
        assert full.alpha_ks == pytest.approx(row["alpha_goodness-of-fit"], rel=5e-2), row
        assert full.alpha_fix_finger == pytest.approx(row["alpha_fix-finger"], rel=5e-2), row


MAPPINGS = {
    "tb_linear_map": "linear",
    "tb_sqrt": "sqrt",
    "tb_log2": "log2",
    "sigmoid": "sigmoid",
    "tb_step": "rank",
    "layer_linear_map": "block-linear",
    "layer_sqrt": "block-sqrt",
    "layer_log2": "block-log2",
    "layerwise_sigmoid": "block-sigmoid",
}


def test_assignment(golden: Path) -> None:
    """Every mapping, within blocks and inverted: linear to 1e-9, the others (float32) to 1e-6."""
    document = json.loads((golden / "assignment.json").read_text())
    names = [from_hugging_face(name) for name in document["names"]]
    alphas = dict(zip(names, document["alphas"], strict=True))
    for case in document["cases"]:
        name = case["assign_func"]
        config = LLRConfig(
            mapping=MAPPINGS[name],
            inverse=not case["positive"],
            min_multiplier=case["lo"],
            max_multiplier=case["hi"],
        )
        multipliers = assign_multipliers(alphas, config)
        # The official inverse log2 multiplies by n where it should divide.
        official_slip = len(alphas) ** 2 if name == "tb_log2" and config.inverse else 1
        tolerance = 1e-9 if name.endswith("linear_map") else 1e-6
        for matrix, ratio in zip(names, case["ratios"], strict=True):
            assert multipliers[matrix] == pytest.approx(ratio / official_slip, rel=tolerance), case


def test_traces(golden: Path) -> None:
    """Learning rates up to the window's end, with the ramps of the official code, to 1e-9."""
    for trace in json.loads((golden / "lr_trace.json").read_text()):
        warmup, total = trace["warmup_steps"], trace["total_steps"]
        peak, floor = trace["peak_lr"], trace["final_lr_fraction"]

        def base(
            s: int, w: int = warmup, t: int = total, p: float = peak, f: float = floor
        ) -> float:
            if s <= w:
                return p * s / w
            return p * (f + (1 - f) * 0.5 * (1 + math.cos(math.pi * (s - w) / (t - w))))

        config = LLRConfig(
            interval=trace["interval"],
            ramp_iters=trace["ramp_steps"],
            active_fraction=trace["window_fraction"],
        )
        schedule = MultiplierSchedule(config, total)
        official_ramps = OfficialRamps(config.ramp_iters)
        for s in range(1, schedule.window_end + 1):
            assert schedule.due(s) == (str(s) in trace["recomputed_at"])
            if schedule.due(s):
                targets = trace["recomputed_at"][str(s)]
                measured = dict(zip(trace["groups"], targets, strict=True))
                schedule.observe(s, measured)
                official_ramps.observe(s, measured)
            rates = official_ramps.learning_rates(s, base)
            official = dict(zip(trace["groups"], trace["lr_by_update"][s - 1], strict=True))
            assert rates == pytest.approx(official, rel=1e-9), s
