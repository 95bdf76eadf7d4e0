"""Arbitrary CSV files for the extrapolation: a table or one clear error."""

import contextlib
import io
import tracemalloc
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llr.tools.extrapolate_lr import analysis, report_files
from megatron_llr.tools.extrapolate_lr.cli import main
from megatron_llr.tools.extrapolate_lr.observations import read_series

MEMORY = 50 * 2**20
HEADER = "lr,tokens,loss,params,batch,effective_lr,seed,policy"
NUMBERS = st.one_of(
    st.sampled_from(
        "1e-30 1e30 1e-29 1 2 4 8 1e9 2e9 4e9 1e-3 2e-3 4e-3 1e31 0 -1 nan inf".split()
    ),
    st.floats(1e-30, 1e30).map(repr),
)
LOSSES = st.one_of(
    st.sampled_from("2 2.5 3 0 -1e30 1e30 1e31 nan inf -inf".split()), st.floats().map(repr)
)
LABELS = st.sampled_from(["", "a", "$x$", "1", "_b"]) | st.text(max_size=4)
ROWS = st.lists(
    st.tuples(NUMBERS, NUMBERS, LOSSES, *[st.just("") | NUMBERS] * 3, LABELS, LABELS).map(",".join),
    min_size=1,
    max_size=20,
)
# Three rates around a minimum at two or three numbers of tokens, of any scale.
SCALES = st.lists(st.floats(-29, 29), min_size=3, max_size=3)
TOKENS = st.lists(
    st.floats(-29.9, 29.9) | st.sampled_from([9.0, 9.0001, 9.0002, 29.0]),
    min_size=2,
    max_size=3,
    unique=True,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "runs.csv"


def extrapolate(path: Path, content: bytes, target: float | None = None) -> None:
    """All of the tool but its files and figure."""
    path.write_bytes(content)
    message = "megatron_llr: "
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            series = read_series([path], {})
            for chosen in (series, analysis.best_batches(series)):
                results = [analysis.extrapolate(each, 3.0, target) for each in chosen]
                analysis.require_fits(results)
                report_files.report_text(results, target)
    except ValueError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    assert message.startswith("megatron_llr: ")
    assert "\n" not in message
    assert len(message) < 8000


@given(rows=ROWS)
def test_any_rows(rows: list[str], path: Path) -> None:
    extrapolate(path, "\n".join([HEADER, *rows]).encode())


@given(
    content=st.binary(max_size=200) | st.text("lrtokens,\"'\r\n1é\0", max_size=100).map(str.encode),
    with_header=st.booleans(),
)
def test_any_bytes(content: bytes, with_header: bool, path: Path) -> None:
    extrapolate(path, (HEADER.encode() + b"\n" if with_header else b"") + content)


def bowls(centers: list[float], tokens: list[float], losses: list[float], effective: str) -> bytes:
    rows = [
        f"{10 ** (center + step)},{10**count},{loss},,,{effective},,"
        for center, count in zip(centers, tokens, strict=False)
        for step, loss in zip((-0.5, 0, 0.25, 0.5), losses, strict=True)
    ]
    return "\n".join([HEADER, *rows]).encode()


@given(
    centers=SCALES,
    tokens=TOKENS,
    bottom=st.floats(-1e30, 1e30),
    height=st.floats(1e-12, 1e30),
    target=st.none() | st.floats(1e-300, 1e300),
    effective=st.sampled_from(["", "1e-30", "1", "1e30"]),
)
def test_optima_of_any_scale(
    centers: list[float],
    tokens: list[float],
    bottom: float,
    height: float,
    target: float | None,
    effective: str,
    path: Path,
) -> None:
    losses = [bottom + height, bottom, bottom + height / 4, bottom + height]
    extrapolate(path, bowls(centers, tokens, losses, effective), target)


@given(
    tokens=TOKENS,
    bottom=st.sampled_from([-1e30, 0, 2, 1e29]),
    height=st.sampled_from([1e-12, 1, 1e29]),
)
@settings(max_examples=5)
def test_figures_of_any_scale(
    tokens: list[float], bottom: float, height: float, path: Path
) -> None:
    losses = [bottom + height, bottom, bottom + height / 4, bottom + height]
    path.write_bytes(bowls([-3, 3, 29], tokens, losses, ""))
    errors = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        warnings.simplefilter("ignore")
        code = main([str(path), "--out", str(path.parent / "out"), "--tokens", "1e300"])
    assert (code == 0) is (errors.getvalue() == "")
    assert errors.getvalue().count("\n") <= 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr,lr,tokens,loss\n1,2,3,4\n", "two columns 'lr'"),
        (f"{HEADER}\n1e31,1,2,,,,,\n", "line 2, has lr: '1e31'"),
        (f"{HEADER}\n1,1,2,,,,,{'x' * 101}\n", "line 2, has policy: "),
        (f"{HEADER}\n1,1,2,,,,\a,\n", "line 2, has seed: '\\x07'"),
    ],
)
def test_the_error_names_the_line(text: str, named: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^megatron_llr: ") as caught:
        read_series([path], {})
    assert named in str(caught.value)
