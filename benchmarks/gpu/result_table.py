"""The Markdown table of the cases' outcomes."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.gpu.fp8_recipes import RECIPES
from benchmarks.gpu.plan import SHAPES
from benchmarks.gpu.run_cases import Outcome

TableRow = tuple[str, str, str]
"""Question, figure, note."""

# Iterations that load kernels and fill caches.
_WARM_UP = 4
_INTERVAL = 100
# The paper's batch of 512 sequences of 1024 over 8 GPUs.
_PAPER_TOKENS = 64 * 1024

_PAIRS = (
    ("bf16, local layers", "bf16-plain", "bf16-uniform"),
    ("bf16, Transformer Engine", "te-bf16-plain", "te-bf16-uniform"),
    ("experts, Transformer Engine", "te-moe-plain", "te-moe-uniform"),
    ("latent attention, Transformer Engine", "te-mla-plain", "te-mla-uniform"),
    *((f"FP8 {name}", f"te-fp8-{name}-plain", f"te-fp8-{name}-uniform") for name in RECIPES),
    ("overlapped gather and reduce", "bf16-plain", "overlap-uniform"),
    ("bf16, with relative updates", "bf16-plain", "updates-uniform"),
)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _missing(*outcomes: Outcome | None) -> str:
    """Why a row has no figure: the reason of the first case without one."""
    for outcome in outcomes:
        if outcome is None:
            return "not chosen"
        if outcome.status != "ok":
            return f"{outcome.name} {outcome.status}: {outcome.reason}"
    return ""


def _loss_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
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


def _step_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
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


def _measurement_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
    for size in SHAPES:
        outcome, steps = outcomes.get(f"measure-{size}"), outcomes.get(f"in-turn-{size}")
        question = f"measurement of {size}, all blocks"
        if outcome is None or _missing(outcome):
            yield question, "-", _missing(outcome)
            continue
        result = outcome.result
        seconds = result["batched_s"]
        note = (
            f"{result['matrices']} matrices in batches of {result['batch']}; "
            f"{', '.join(result['methods'])}; if all needed fp64 "
            f"({', '.join(result['fp64_methods'])}), one by one: {result['all_fp64_s']:.2f} s"
        )
        yield question, f"{seconds:.2f} s", note
        timed = f"{result['blocks_timed_one_by_one']} of {result['blocks']} blocks timed"
        for way, name in (("one_by_one_s", "one by one"), ("svdvals_s", "svdvals in fp32")):
            ratio = f"{result[way] / seconds:.2f}"
            question = f"measurement of {size}: {name} over batched"
            yield question, ratio, f"{result[way]:.2f} s, {timed}"
        question = f"share of time of {size} at interval {_INTERVAL}"
        if steps is None or _missing(steps):
            yield question, "-", _missing(steps)
            continue
        step, tokens = _medians(steps)["without"], steps.result["tokens"]
        note = (
            f"at {tokens} tokens a step, as measured; scaled to {_PAPER_TOKENS} tokens a GPU and "
            f"step: {_share(seconds, step * _PAPER_TOKENS / tokens)}; one GPU owns all matrices"
        )
        yield question, _share(seconds, step), note


def _inner_step_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
    for size in ("60M", "350M"):
        outcome = outcomes.get(f"inner-step-{size}")
        question = f"inner step() of {size}, a rate per matrix / one rate"
        if outcome is None or _missing(outcome):
            yield question, "-", _missing(outcome)
            continue
        for result in outcome.result.values():
            times = result["milliseconds"]
            fused = times["fused, CUDA events"]
            plain = times[f"{result['optimizer']}, CUDA events"]
            note = (
                f"ratio {fused / plain:.3f}; {fused / times['floor']:.3f} of the time to copy 28 "
                f"bytes an element; {result['matrices']} matrices"
            )
            figure = f"{fused:.2f} / {plain:.2f} ms"
            yield f"{question}, {result['optimizer']}", figure, note


def _hyperball_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
    for size in ("60M", "350M"):
        outcome = outcomes.get(f"hyperball-step-{size}")
        question = f"inner step() of {size}, hyperball / plain AdamW"
        if outcome is None or _missing(outcome):
            yield question, "-", _missing(outcome)
            continue
        result, times = outcome.result, outcome.result["milliseconds"]
        note = (
            f"ratio {result['hyperball over plain AdamW']:.3f}; "
            f"{result['hyperball over floor']:.3f} of the time to copy "
            f"{result['bytes an element']} bytes an element; {result['matrices']} matrices; "
            f"--llr-step grouped {times['hyperball, grouped']:.2f} ms"
        )
        yield question, f"{times['hyperball']:.2f} / {times['plain AdamW']:.2f} ms", note


def _logged_step_rows(outcomes: Mapping[str, Outcome]) -> Iterator[TableRow]:
    outcome, steps = outcomes.get("logged-step-350M"), outcomes.get("in-turn-350M")
    question = "logged step of 350M over an unlogged one"
    if outcome is None or _missing(outcome):
        yield question, "-", _missing(outcome)
        return
    for logged in ("norms and rates", "with updates"):
        added = outcome.result["milliseconds"][f"{logged}, batched"]
        launches = outcome.result["launches"][f"{logged}, batched"]
        ratio = "-" if steps is None else _missing(steps)
        if steps is not None and not _missing(steps):
            ratio = f"{1 + added / (1e3 * _medians(steps)['without']):.4f}"
        yield f"{question}, {logged}", ratio, f"{added:.2f} ms, {launches} launches"


def _optimizer_rows(outcome: Outcome | None) -> Iterator[TableRow]:
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


def _expert_rows(outcome: Outcome | None) -> Iterator[TableRow]:
    question = "optimizer's step of many experts with / without layer groups"
    if outcome is None or _missing(outcome):
        yield question, "-", _missing(outcome)
        return
    for phase, median in outcome.result["seconds"].items():
        ours, plain = median["layer groups"] + median["after_update"], median["plain"]
        note = (
            f"{outcome.result['matrices']} matrices on one rank, {outcome.result['optimizer']}, "
            f"ratio {ours / plain:.3f}"
        )
        yield f"{question}, {phase}", f"{1e3 * ours:.2f} / {1e3 * plain:.2f} ms", note


def _sharded_rows(outcome: Outcome | None) -> Iterator[TableRow]:
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


def _self_test_row(outcome: Outcome | None) -> TableRow:
    question = "tools/self_test.py on one rank"
    if outcome is None or _missing(outcome):
        return question, "-", _missing(outcome)
    return question, outcome.result["result"], outcome.result["note"]


def rows_of(outcomes: Sequence[Outcome]) -> list[TableRow]:
    """Every question with its figure, or with the reason why it has none.

    Questions none of whose cases was chosen are left out.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    rows = [*_loss_rows(by_name), *_step_rows(by_name)]
    rows += [*_inner_step_rows(by_name), *_expert_rows(by_name.get("many-experts"))]
    rows += [*_hyperball_rows(by_name), *_logged_step_rows(by_name)]
    rows += _measurement_rows(by_name)
    rows += _optimizer_rows(by_name.get("optimizers"))
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
