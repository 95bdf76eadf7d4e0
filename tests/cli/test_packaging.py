"""The wheel and the sdist: built from what git has, installed, and used without the repository."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from megatron_llr.tools.commands import COMMANDS
from tests.cli.test_script import ROOT, environment

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
GRID = """\
out: runs
flags: --mock-data --train-iters 4 --global-batch-size 2 --seq-length 16 --eval-iters 0
policies: {uniform: --llr-policy uniform}
learning_rates: [1e-3]
seeds: [1]
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name.startswith(("megatron_llr/", "README", "LICENSE", "pyproject", "setup.py")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    build += f"; b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def programs(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and below it the packages of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (wheel,) = archives.glob("*.whl")
    install = [*PIP, "--python", str(folder / "bin/python"), "install", "--no-index", "--no-deps"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # After the installation, which must not see them.
    (site / "base.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(programs: Path, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    outside = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    program, *rest = command
    return subprocess.run(
        [str(programs / program), *rest],
        cwd=folder,
        env={**outside, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_the_archives_hold_the_package_and_its_metadata(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    (sdist,) = archives.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Metadata.from_email(archive.read(metadata), validate=True)
    sources = [*(ROOT / "megatron_llr").rglob("*.py"), *(ROOT / "megatron_llr").rglob("*.yaml")]
    modules = {str(path.relative_to(ROOT)) for path in sources}
    assert modules <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "megatron_llr",
        metadata.split("/")[0],
    }
    assert described.description_content_type == "text/markdown"
    assert {"te", "muon", "hf", "compare", "dev"} <= set(described.provides_extra or ())
    with tarfile.open(sdist) as packed:
        packed_names = {name.split("/", 1)[-1] for name in packed.getnames()}
    assert modules | {"pyproject.toml", "README.md", "LICENSE"} <= packed_names


def test_every_command_has_its_help(programs: Path, tmp_path: Path) -> None:
    done = run(programs, tmp_path, "megatron-llr", "--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  ([a-z][a-z-]*)  ", done.stdout, re.M)) == set(COMMANDS)
    for name in COMMANDS:
        done = run(programs, tmp_path, "megatron-llr", name, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: megatron-llr {name} ")
    assert run(programs, tmp_path, "megatron-llr", "--version").stdout == "megatron-llr 0.1.0\n"
    wrong = run(programs, tmp_path, "megatron-llr", "train")
    assert wrong.returncode == 2
    assert "train is not a command. It must be one of convert, preprocess" in wrong.stderr


def test_commands_run_without_the_repository(programs: Path, tmp_path: Path) -> None:
    find = "from importlib.util import find_spec as f; print(f('megatron_llr.megatron.pretrain'))"
    assert str(programs.parent) in run(programs, tmp_path, "python", "-c", find).stdout
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    flags = "text.txt --output data --workers 2 --documents line".split()
    done = run(programs, tmp_path, "megatron-llr", "preprocess", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data.bin").is_file()
    (tmp_path / "grid.yaml").write_text(GRID)
    done = run(programs, tmp_path, "megatron-llr", "compare", "grid.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert " -m megatron_llr.megatron.pretrain --mock-data" in done.stdout
    done = run(programs, tmp_path, "megatron-llr", "convert", "nowhere", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(programs, tmp_path, "megatron-llr", "self-test", "--list")
    assert done.returncode == 0, done.stderr
    done = run(programs, tmp_path, "megatron-llr", "report", "nowhere")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
