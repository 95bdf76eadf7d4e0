"""From the outcomes of the cases to one Markdown table."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.gpu.plan import OTHER_RECIPES, SHAPES
from benchmarks.gpu.runner import Outcome

Row = tuple[str, str, str]
"""What was asked, the figure, and what has to be known with it."""

# Iterations that load kernels and fill caches.
_WARM_UP = 4
_INTERVAL = 100
# The paper's batch of 512 sequences of 1024 over 8 GPUs.
_PAPER_TOKENS = 64 * 1024

_PAIRS = (
    ("bf16, local layers", "bf16-plain", "bf16-uniform"),
    ("bf16, Transformer Engine", "te-bf16-plain", "te-bf16-uniform"),
    ("FP8, Transformer Engine", "te-fp8-plain", "te-fp8-uniform"),
    ("experts, Transformer Engine", "te-moe-plain", "te-moe-uniform"),
    ("latent attention, Transformer Engine", "te-mla-plain", "te-mla-uniform"),
    *((f"FP8 {name}", f"te-fp8-{name}-plain", f"te-fp8-{name}-uniform") for name in OTHER_RECIPES),
    ("overlapped gather and reduce", "bf16-plain", "overlap-uniform"),
    ("bf16, with relative updates", "bf16-plain", "updates-uniform"),
)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _missing(*outcomes: Outcome | None) -> str:
    """Why a row has no figure, by the first case that has none."""
    for outcome in outcomes:
        if outcome is None:
            return "not chosen"
        if outcome.status != "ok":
            return f"{outcome.name} {outcome.status}: {outcome.reason}"
    return ""


def _loss_rows(outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
    for title, plain_name, ours_name in _PAIRS:
        question = f"same losses at multiplier 1: {title}"
        plain, ours = outcomes.get(plain_name), outcomes.get(ours_name)
        if plain is None or ours is None or _missing(plain, ours):
            yield question, "-", _missing(plain, ours)
            continue
        a, b = plain.result["losses"], ours.result["losses"]
        same = sum(x == y for x, y in zip(a, b, strict=False))
        whole = len(a) == len(b) == same and len(a) > 0
        worst = max((abs(x - y) for x, y in zip(a, b, strict=False)), default=0.0)
        note = f"{same} of {max(len(a), len(b))} bitwise; largest difference {worst:.3g}"
        yield question, "yes" if whole else "NO", note
        peaks = plain.result["peak_bytes"], ours.result["peak_bytes"]
        if min(peaks) > 0:
            figure = f"{_gigabytes(peaks[1])} / {_gigabytes(peaks[0])}"
            yield f"peak memory with / without: {title}", figure, f"{peaks[1] / peaks[0]:.4f}"


def _medians(outcome: Outcome) -> dict[str, float]:
    return {
        name: statistics.median(spent[_WARM_UP // 2 :] or spent)
        for name, spent in outcome.result["seconds"].items()
    }


def _step_rows(outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
    for size in SHAPES:
        outcome = outcomes.get(f"in-turn-{size}")
        question = f"step of {size} with / without"
        if outcome is None or _missing(outcome):
            yield question, "-", _missing(outcome)
            continue
        medians, tokens = _medians(outcome), outcome.result["tokens"]
        added = medians["optimizer with"] - medians["optimizer without"]
        figure = f"{1e3 * medians['with']:.2f} / {1e3 * medians['without']:.2f} ms"
        note = (
            f"optimizer's step {1e3 * medians['optimizer with']:.2f} / "
            f"{1e3 * medians['optimizer without']:.2f} ms: {added / medians['without']:+.2%} of a "
            f"step; {tokens} tokens a step; {', '.join(outcome.result['stepping'])}"
        )
        yield question, figure, note
        for matrices, seconds in outcome.result["measured"]:
            note = "one measurement of the real model, its first: libraries are loaded in it"
            yield f"measurement of {size}, {matrices} matrices", f"{seconds:.2f} s", note


def _share(seconds: float, step: float) -> str:
    return f"{seconds / (_INTERVAL * step + seconds):.2%}"


def _measurement_rows(outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
    for size in SHAPES:
        outcome, steps = outcomes.get(f"measure-{size}"), outcomes.get(f"in-turn-{size}")
        question = f"measurement of {size}, all blocks"
        if outcome is None or _missing(outcome):
            yield question, "-", _missing(outcome)
            continue
        result = outcome.result
        seconds = result["block_seconds"] * result["blocks"]
        note = (
            f"{result['measured_blocks']} of {result['blocks']} blocks measured, times blocks; "
            f"{', '.join(result['methods'])}; were all to need fp64 "
            f"({', '.join(result['fp64_methods'])}): "
            f"{result['fp64_block_seconds'] * result['blocks']:.2f} s"
        )
        yield question, f"{seconds:.2f} s", note
        question = f"share of time of {size} at interval {_INTERVAL}"
        if steps is None or _missing(steps):
            yield question, "-", _missing(steps)
            continue
        step, tokens = _medians(steps)["without"], steps.result["tokens"]
        note = (
            f"at {tokens} tokens a step, as measured; scaled to {_PAPER_TOKENS} tokens a GPU and "
            f"step: {_share(seconds, step * _PAPER_TOKENS / tokens)}; on one GPU, which owns all"
        )
        yield question, _share(seconds, step), note


def _optimizer_rows(outcome: Outcome | None) -> Iterator[Row]:
    if outcome is None or _missing(outcome):
        yield "views that optimizers take", "-", _missing(outcome)
        return
    for name, answer in outcome.result.items():
        if "skipped" in answer:
            yield f"views that {name} takes", "-", answer["skipped"]
            continue
        note = "only one rate per parameter"
        if "seconds" in answer:
            each, whole = answer["seconds"]["projection"], answer["seconds"]["parameter"]
            note = f"projection / parameter: {1e3 * each:.2f} / {1e3 * whole:.2f} ms"
            note += f", ratio {each / whole:.3f}"
        yield f"views that {name} takes", answer["takes"], note


def _expert_rows(outcome: Outcome | None) -> Iterator[Row]:
    question = "optimizer's step of many experts with / without"
    if outcome is None or _missing(outcome):
        yield question, "-", _missing(outcome)
        return
    for name, answer in outcome.result["optimizers"].items():
        if "skipped" in answer:
            yield f"{question}, {name}", "-", answer["skipped"]
            continue
        ours, plain = answer["with"], answer["without"]
        note = f"{outcome.result['matrices']} matrices, ratio {ours / plain:.3f}"
        yield f"{question}, {name}", f"{1e3 * ours:.2f} / {1e3 * plain:.2f} ms", note


def _sharded_rows(outcome: Outcome | None) -> Iterator[Row]:
    if outcome is None or _missing(outcome):
        yield "sharded against exact", "-", _missing(outcome)
        return
    result = outcome.result
    size = "x".join(str(side) for side in result["sides"])
    exact = f"exact: {result['alpha']:.3f} in {1e3 * result['seconds']:.1f} ms"
    for cut in result["cuts"]:
        figure = f"{cut['alpha']:.3f} in {1e3 * cut['seconds']:.1f} ms"
        question = f"sharded, {size}, {cut['cut']}: alpha_hill_median, a rank's time"
        yield question, figure, exact


def _self_test_row(outcome: Outcome | None) -> Row:
    question = "tools/self_test.py on one rank"
    if outcome is None or _missing(outcome):
        return question, "-", _missing(outcome)
    return question, outcome.result["result"], outcome.result["note"]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Every question with its figure, or with the reason why it has none."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    rows = [*_loss_rows(by_name), *_step_rows(by_name), *_measurement_rows(by_name)]
    rows += [
        *_optimizer_rows(by_name.get("optimizers")),
        *_expert_rows(by_name.get("many-experts")),
    ]
    rows += _sharded_rows(by_name.get("sharded"))
    rows.append(_self_test_row(by_name.get("self-test")))
    gather = by_name.get("te-fp8-gather")
    trained = "trains" if gather is not None and gather.status == "ok" else "-"
    rows.append(("FP8 parameter gather", trained, _missing(gather)))
    return [row for row in rows if row[2] != "not chosen"]


def table_of(outcomes: Sequence[Outcome], header: Sequence[str]) -> str:
    """Markdown: a line per fact about the machine, then the table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [*header, "", "| question | figure | note |", "|---|---|---|"]
    lines += [f"| {' | '.join(cell(text) for text in row)} |" for row in rows_of(outcomes)]
    return "\n".join(lines) + "\n"
