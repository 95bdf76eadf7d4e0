"""Invariant 7: every member of a group enters the same collectives in the same order."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import train
from layouts import LAYOUTS

from megatron_llr.controller import LayerwiseController
from megatron_llr.ranks import gather_objects

# Methods of a process group that wait for others; whatever is called in torch.distributed, under
# whatever name a module keeps it, ends in one of them. Releases of torch name them differently.
_COLLECTIVES = [
    name
    for name in dir(dist.ProcessGroup)
    if re.search("^_?(all|barrier|broadcast|gather|monitored|re(duce|cv)|s(catter|end))", name)
]
_ALL_TO_ALL = {"alltoall_base", "all_to_all_single"}
_OVERLAPPED_GATHER = {"allgather_into_tensor_coalesced", "all_gather_single_coalesced"}


@dataclass(frozen=True)
class Call:
    """One collective as one rank saw it.

    Attributes:
        operation: name of the process group's method.
        ranks: global ranks of the group.
        tensor: dtype and shape of what goes in; of an uneven all-to-all the dtype alone.
        splits: what it sends to and gets from every rank, where parts are uneven.
    """

    operation: str
    ranks: tuple[int, ...]
    tensor: str
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None


class Recorder:
    """Notes the collectives that this rank issues while it is on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.on = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap the methods of all process groups, and those of the controller that ranks enter."""
        for name in _COLLECTIVES:
            patch.setattr(
                dist.ProcessGroup, name, self._wrap(name, getattr(dist.ProcessGroup, name))
            )
        for name in ("prepare", "after_update"):
            patch.setattr(
                LayerwiseController, name, self._during(getattr(LayerwiseController, name))
            )

    def _during(self, method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def recorded(*args: Any, **kwargs: Any) -> None:
            self.on = True
            try:
                method(*args, **kwargs)
            finally:
                self.on = False

        return recorded

    def _wrap(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def noted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.calls.append(_call(name, group, args))
            return collective(group, *args, **kwargs)

        return noted


def _call(name: str, group: dist.ProcessGroup, args: Sequence[Any]) -> Call:
    ranks = tuple(dist.get_process_group_ranks(group))
    tensors = list(_tensors(args))
    dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
    if name in _ALL_TO_ALL:
        received, sent = args[2:4]
        return Call(name, ranks, dtypes, (tuple(sent), tuple(received)))
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    return Call(name, ranks, f"{dtypes} {shapes}")


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def disagreements(told: Sequence[Sequence[Call]]) -> list[str]:
    """What of the ranks' calls does not fit together; empty where all can be carried out.

    Every rank waits in its first call until all members of that group stand at the same one.
    """
    queues = [list(calls) for calls in told]
    while any(queues):
        ready = next(
            (
                queue[0].ranks
                for queue in queues
                if queue and all(_same(queue[0], queues[rank][:1]) for rank in queue[0].ranks)
            ),
            None,
        )
        if ready is None:
            return [f"rank {rank} waits in {queue[:1]}" for rank, queue in enumerate(queues)]
        calls = [queues[rank].pop(0) for rank in ready]
        for here, call in enumerate(calls):
            for there, other in enumerate(calls):
                if call.splits and other.splits and call.splits[0][there] != other.splits[1][here]:
                    return [f"rank {ready[here]} sends other sizes than {ready[there]} expects"]
    return []


def _same(call: Call, waiting: Sequence[Call]) -> bool:
    return any(
        (call.operation, call.ranks, call.tensor, call.splits is None)
        == (other.operation, other.ranks, other.tensor, other.splits is None)
        for other in waiting
    )


_TP2, _PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
_OVERLAP = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
_MEASURED, _MASTER = "--llr-embedding measured", "--llr-spectrum-source master"
_FLAGS = {layout.name: layout.flags for layout in LAYOUTS}
# (world size, flags, collectives that are issued beside those that all have)
_RUNS: dict[str, tuple[int, str, list[set[str]]]] = {
    "tp2": (2, _TP2, [_ALL_TO_ALL]),
    "tp2-sharded": (2, f"{_TP2} --llr-spectrum sharded", []),
    "pp2": (2, _PP2, []),
    "vpp2-tied": (2, f"{_PP2} --num-virtual-stages-per-pipeline-rank 2 {_MEASURED}", []),
    "dp2": (2, "", []),
    "dp2-overlap": (2, f"{_OVERLAP} {_MASTER}", [_ALL_TO_ALL, _OVERLAPPED_GATHER]),
    "tp2-ep2-moe": (2, f"{_FLAGS['tp2-ep2-moe']} --llr-router policy", [_ALL_TO_ALL]),
    "ep2-moe": (2, f"{_FLAGS['ep2-moe-distopt-bf16']} {_MASTER}", [_ALL_TO_ALL]),
    "tp2-ep2-etp2-moe": (4, _FLAGS["tp2-ep2-etp2-moe"], [_ALL_TO_ALL]),
    "tp2-pp2": (4, f"{_TP2} {_PP2} {_MEASURED}", [_ALL_TO_ALL]),
    "tp2-dp2-overlap": (4, f"{_TP2} {_OVERLAP} {_MASTER}", [_ALL_TO_ALL, _OVERLAPPED_GATHER]),
}


@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize("name", _RUNS)
def test_every_member_enters_the_same_collectives_in_the_same_order(
    name: str, monkeypatch: pytest.MonkeyPatch, shared_dir: Path
) -> None:
    """Two measurements and four steps with a log, as the real loop issues them."""
    world_size, flags, own = _RUNS[name]
    if world_size != dist.get_world_size():
        pytest.skip(f"needs world size {world_size}")
    recorder = Recorder()
    recorder.install(monkeypatch)
    log = f"--llr-log-relative-update --llr-log-dir {shared_dir}"
    run = train(flags, f"--exit-interval 4 {log}", tied="tied" in name)
    monkeypatch.undo()
    assert run.controller.alphas
    told: list[list[Call]] = gather_objects(recorder.calls)
    assert disagreements(told) == []
    counts = Counter(call.operation for call in told[0])
    assert all(names & set(counts) for names in own), counts
    # Per logged update one sum over all ranks, as docs/design_notes.md says, and no other.
    assert counts["allreduce"] == 4
    assert counts["allgather"] >= 4


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("the order in one group", "rank 0 waits in"),
        ("the order over groups", "rank 0 waits in"),
        ("a call left out", "rank 0 waits in"),
        ("a dtype", "rank 0 waits in"),
        ("a size", "rank 0 sends other sizes than 1 expects"),
    ],
)
def test_the_check_itself_finds_what_would_hang(changed: str, told: str) -> None:
    world, pair = (0, 1, 2), (0, 1)
    gather, total = Call("all_gather", world, "float64"), Call("all_reduce", world, "float64")
    send = Call("alltoall_base", pair, "uint8", ((1, 2), (1, 3)))
    answer = Call("alltoall_base", pair, "uint8", ((3, 0), (2, 0)))
    ranks = [[send, gather, total], [answer, gather, total], [gather, total]]
    assert disagreements(ranks) == []
    ranks[1] = {
        "the order in one group": [answer, total, gather],
        "the order over groups": [gather, answer, total],
        "a call left out": [answer, gather],
        "a dtype": [answer, gather, Call("all_reduce", world, "float32")],
        "a size": [Call("alltoall_base", pair, "uint8", ((3, 0), (1, 0))), gather, total],
    }[changed]
    assert disagreements(ranks)[0].startswith(told)


@pytest.mark.world_size(2)
def test_all_groups_share_one_network_thread() -> None:
    """Each gloo device has a thread that wakes up 100 times a second."""

    def threads() -> int:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return names.count("gloo_tcp_loop\n")

    before = threads()
    groups = [dist.new_group([0, 1], backend="gloo") for _ in range(3)]
    for number, group in enumerate(groups):
        value = torch.tensor([float(number)])
        dist.all_reduce(value, group=group)
        assert value.item() == 2 * number
    assert threads() == before == 1
    for group in groups:
        dist.destroy_process_group(group)
