"""The tables of docs/layouts.md, from what the tests run: `python -m tests.docs.support_matrix`.

`--write` puts them into the page, `--check` fails if they are not there. What the letters in the
cells mean is said on the page.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"
_BEGIN, _END = "<!-- from the tests: {} -->", "<!-- end -->"


def _number(flags: str, name: str, otherwise: int = 1) -> int:
    words = flags.split()
    return int(words[words.index(name) + 1]) if name in words else otherwise


_TP, _PP, _CP, _EP, _ETP = (
    f"--{kind}-parallel-size"
    for kind in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor")
)


def _replicas(flags: str, ranks: int) -> int:
    return ranks // (_number(flags, _TP) * _number(flags, _PP) * _number(flags, _CP))


def _virtual(flags: str) -> bool:
    words = flags.split()
    name = "--pipeline-model-parallel-layout"
    stages = words[words.index(name) + 1].count("|") + 1 if name in words else 0
    return "--num-virtual-stages" in flags or stages > _number(flags, _PP)


_UNEVEN = ("--decoder-first-", "--account-for-", "--pipeline-model-parallel-layout")

# Row of the table -> whether a layout (its flags and number of ranks) is one of that kind.
KINDS: Mapping[str, Callable[[str, int], bool]] = {
    "one rank": lambda flags, ranks: ranks == 1,
    "data parallel": lambda flags, ranks: _replicas(flags, ranks) > 1,
    "tensor parallel": lambda flags, _: _number(flags, _TP) > 1,
    "sequence parallel": lambda flags, _: "--sequence-parallel" in flags,
    "pipeline parallel": lambda flags, _: _number(flags, _PP) > 1,
    "uneven or custom pipeline": lambda flags, _: any(name in flags for name in _UNEVEN),
    "virtual pipeline": lambda flags, _: _virtual(flags),
    "context parallel": lambda flags, _: _number(flags, _CP) > 1,
    "expert parallel": lambda flags, _: _number(flags, _EP) > 1,
    "expert tensor parallel": lambda flags, _: _number(flags, _ETP, _number(flags, _TP)) > 1,
    "alltoall dispatcher": lambda flags, _: "alltoall" in flags,
    "distributed optimizer": lambda flags, _: "--use-distributed-optimizer" in flags,
    "bf16": lambda flags, _: "--bf16" in flags,
}
_OF_EXPERTS = ("expert parallel", "expert tensor parallel", "alltoall dispatcher")


def _runs() -> Iterable[tuple[str, str, int, str]]:
    """(model, flags, ranks, letters of the tests) of all that the tests run."""
    from tests.dist import layouts, models

    for name, model in models.MODELS.items():
        for layout in model.layouts:
            chosen = models.LAYOUTS[layout]
            yield name, chosen.flags, chosen.world_size, "a"
    by_flags = sorted(models.MODELS.items(), key=lambda item: -len(item[1].flags))
    for run in layouts.LAYOUTS:
        found = (name for name, model in by_flags if model.flags in run.flags)
        yield next(found, "dense"), run.flags, run.world_size, "ir"


def _has_experts(model: str) -> bool:
    from tests.dist import models

    return "--num-experts" in models.MODELS[model].flags


def support() -> dict[str, dict[str, str]]:
    """Kind of layout -> model -> letters of the tests that run the two together."""
    from tests.dist import models

    found: dict[str, dict[str, set[str]]] = {kind: defaultdict(set) for kind in KINDS}
    for model, flags, ranks, letters in _runs():
        for kind, holds in KINDS.items():
            # Expert tensor parallelism follows --tensor-model-parallel-size where it is not given.
            if holds(flags, ranks) and (kind not in _OF_EXPERTS or _has_experts(model)):
                found[kind][model].update(letters)
    return {
        kind: {model: "".join(sorted(by_model[model])) for model in models.MODELS}
        for kind, by_model in found.items()
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layouts_table() -> str:
    """Kinds of layouts by models."""
    cells = support()
    models = list(next(iter(cells.values())))

    def cell(kind: str, model: str) -> str:
        letters = cells[kind][model]
        if letters:
            return f"Yes {letters}"
        return "" if kind in _OF_EXPERTS and not _has_experts(model) else "not run"

    rows = [[kind, *(cell(kind, model) for model in models)] for kind in cells]
    return _table(["", *models], rows)


def refused_table() -> str:
    """Flags that are refused, with the reason, from the table that refuses them."""
    from megatron_llr.megatron import flags

    reasons = flags._REASONS
    absent = ((False,), (None,), (None, ""), (1,))
    rows = [
        [
            f"`{flag}`",
            "No" if fine in absent else f"but {', '.join(str(value) for value in fine)}: No",
            reasons.get(flag, "untested"),
        ]
        for _, fine, flag in flags._UNSUPPORTED
    ]
    return _table(["flag", "", "because"], rows)


TABLES = {"layouts": layouts_table, "refused": refused_table}


def with_tables(page: str) -> str:
    """The page with its tables as the tests have them now."""
    for name, table in TABLES.items():
        begin = _BEGIN.format(name)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{table()}\n\n{_END}{rest.split(_END, 1)[1]}"
    return page


def main() -> int:
    """Write the page, or compare it."""
    from megatron_llr.megatron import launch

    launch.prepare_device(["--llr-device", "cpu"])
    before = PAGE.read_text()
    after = with_tables(before)
    if "--write" in sys.argv:
        PAGE.write_text(after)
        return 0
    if before != after:
        print("docs/layouts.md: tables are not those of the tests; --write updates them")
    return int(before != after)


if __name__ == "__main__":
    raise SystemExit(main())
