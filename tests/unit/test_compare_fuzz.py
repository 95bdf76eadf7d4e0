"""Arbitrary grids and result files of the comparison: a valid result or one clear error."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.tools.compare import cli
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.grid_file import read_grid
from megatron_llr.tools.compare.jobs import command, pending
from megatron_llr.tools.compare.results import read_done, read_result
from tests.unit.plain_values import plain_values

MEMORY = 100 * 2**20
VALID: dict[str, Any] = {
    "out": "runs",
    "learning_rates": [1e-3, 3e-3],
    "seeds": [1, 2],
    "flags": "--seq-length 16 --global-batch-size 4 --train-iters 100 --eval-iters 2",
    "policies": {"uniform": "--llr-policy uniform", "esd": "--llr-policy esd"},
}
KEYS = (
    "out flags policies learning_rates iterations tokens seeds control counterparts extend "
    "sensitivity min_lr_ratio launch script gpus_per_run jobs_per_gpu unknown"
).split()
VALUES = plain_values(
    st.dates(),
    st.sampled_from(
        [0, 1, 5e-324, 10**400, "1e-3", "--a 'b", "~nobody/x", "../x", "a\0b", "\ud800", "esd"]
    ),
    keys=st.text(max_size=6) | st.integers(),
)
# What PyYAML's constructors stumble over, and documents that are small only as files.
SNIPPETS = [
    *("!!int x", "!!int ''", "!!bool x", "!!timestamp x", "!!float _", "2001-99-99", "1:1:1"),
    *("0x" + "f" * 5000, "1" * 5000, "9999-12-31 23:59:59-23:59", "!!python/name:os.system"),
    *("&a [*a]", "*unknown", "[" * 30, "{? [a] : b}", ".inf", ".nan", "~", "'", '"\\0"'),
    *('"\\ud800"', "? [x]", "- -", "%YAML 9.9", "<<: {}", "\t", "!!binary x", "!!set {a, b}"),
]


def merges(levels: int) -> str:
    """A file of one line per level with ten times as many pairs in each as in the one before."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def aliases(levels: int) -> str:
    """A list of ten lists of ten lists..., as a learning rate."""
    lines = ["b0: &b0 [1]"]
    lines += [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"learning_rates: *b{levels - 1}"])


def read(path: Path, content: bytes) -> Grid | None:
    """The grid; None after a clear error."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        grid = read_grid(path)
    except ValueError as error:
        text = str(error)
        assert text.startswith("megatron_llr: "), text
        assert str(path) in text
        assert len(text) < 3500
        assert "\n" not in text
        return None
    finally:
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        tracemalloc.stop()
    for run in grid.base_runs()[:50]:
        assert run.folder.is_relative_to(grid.out)
        assert ".." not in run.folder.relative_to(grid.out).parts
        assert all("\0" not in word for word in command(grid, run))
        " ".join(command(grid, run)).encode()
    return grid


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "grid.yaml"


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_values_in_a_grid(changes: dict[str, Any], path: Path) -> None:
    try:
        text = yaml.safe_dump({**VALID, **changes})
    except ValueError:
        # Integers that Python does not print.
        return
    read(path, text.encode(errors="surrogatepass"))


@given(key=st.sampled_from(KEYS), snippet=st.sampled_from(SNIPPETS))
def test_any_yaml_of_a_value(key: str, snippet: str, path: Path) -> None:
    rest = {name: value for name, value in VALID.items() if name != key}
    read(path, f"{yaml.safe_dump(rest)}{key}: {snippet}\n".encode())


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_a_grid(content: bytes, path: Path) -> None:
    assert read(path, content) is None


@given(
    place=st.integers(0, 300), snippet=st.sampled_from([*SNIPPETS, "", ":", "\n", "#", "[", ","])
)
def test_a_grid_with_something_inserted(place: int, snippet: str, path: Path) -> None:
    text = yaml.safe_dump(VALID)
    read(path, (text[:place] + snippet + text[place:]).encode())


def test_documents_that_grow_while_they_are_read(path: Path) -> None:
    for text in (merges(9), aliases(9), "a: " + "x" * 2**19, "[\n" * 2**16):
        assert read(path, text.encode()) is None
    with pytest.raises(ValueError, match="not a regular file"):
        read_grid(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"seeds": [1.5]}, "seeds: [1.5]"),
        ({"seeds": "12"}, "seeds: '12'"),
        ({"seeds": [True]}, "seeds: [True]"),
        ({"learning_rates": [1e-3, float("nan")]}, "learning_rates: "),
        ({"learning_rates": [float("inf")]}, "learning_rates: "),
        ({"out": None}, "out: None"),
        ({"flags": VALID["flags"] + " --data-path 'a"}, "No closing quotation"),
        ({"flags": VALID["flags"].replace("16", "x")}, "--seq-length: ['x']"),
        ({"flags": VALID["flags"].replace("16", "0")}, "--seq-length: ['0']"),
        ({"counterparts": "false"}, "counterparts: 'false'"),
        ({"policies": {**VALID["policies"], 1: "", "1": ""}}, "distinct names"),
        ({"gpus_per_run": 5e-324}, "jobs on a GPU"),
        ({"sensitivity": {"factors": [2], "roles": ["../../q"]}}, "../../q"),
        ({"seeds": list(range(400)), "learning_rates": list(range(1, 300))}, "at most 100000"),
    ],
)
def test_values_that_would_be_misread_are_refused(
    more: dict[str, Any], named: str, path: Path
) -> None:
    path.write_text(yaml.safe_dump({**VALID, **more}))
    with pytest.raises(ValueError, match=r"^megatron_llr: The grid ") as caught:
        read_grid(path)
    assert named in str(caught.value)


RECORD: dict[str, Any] = {
    "version": 1,
    "digest": "",
    "settings": ["--lr", "1"],
    "died_of_nan": False,
    "seconds": 1.0,
    "environment": {"torch": "2"},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)


@given(
    content=st.binary(max_size=100)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(list(RECORD)), JSON).map(
        lambda changes: json.dumps({**RECORD, **changes}).encode()
    )
    | st.just(b"[" * 100_000)
)
def test_any_record_of_a_finished_run(content: bytes, path: Path) -> None:
    """A record that cannot be read is none: the run is repeated."""
    path.write_text(yaml.safe_dump({**VALID, "out": str(path.parent / "runs")}))
    grid = read_grid(path)
    run = grid.base_runs()[0]
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "done.json").write_bytes(content)
    result = read_result(run)
    if read_done(run) is None:
        assert result is None
        assert run in pending(grid)
    elif result is None:
        with pytest.raises(ValueError, match="has a finished run with different settings"):
            pending(grid)
    else:
        assert run not in pending(grid)


def test_a_folder_that_cannot_be_written_is_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path.parent / "file").write_text("")
    path.write_text(yaml.safe_dump({**VALID, "out": str(path.parent / "file" / "runs")}))
    assert cli.main([str(path)]) == 1
    assert cli.main([str(path), "--report-only"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "Not a directory" not in line] == []


def test_a_policy_that_is_given_twice_is_refused(path: Path) -> None:
    policies = "{uniform: --llr-policy uniform, esd: --llr-policy esd, esd: --llr-policy fixed}"
    path.write_text(f"out: runs\npolicies: {policies}\n")
    with pytest.raises(ValueError, match=r"Cannot read the grid .*line 2: the key 'esd' is given"):
        read_grid(path)


def test_a_key_overrides_a_merged_one(path: Path) -> None:
    shared = "{uniform: --llr-policy uniform, esd: --llr-policy esd}"
    path.write_text(
        yaml.safe_dump({**VALID, "policies": None}).replace(
            "policies: null", f"policies: {{<<: {shared}, esd: --llr-policy esd --llr-inverse}}"
        )
    )
    assert read_grid(path).policies["esd"] == ("--llr-policy", "esd", "--llr-inverse")
