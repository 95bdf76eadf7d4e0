"""`tools/gpu_wheels.sh` without a network: what it asks pip for, and its check of the folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.test_script import ROOT

# In place of Python: records what pip is asked for and makes wheels without content.
INTERPRETER = """#!{python}
import os, pathlib, re, shutil, sys, zipfile
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*words, file=log)
if words[:2] == ["-m", "venv"]:
    own = pathlib.Path(words[2], "bin")
    own.mkdir(parents=True)
    shutil.copy(__file__, own / "python")
elif words[:2] == ["-m", "pip"]:
    flag = "--dest" if "download" in words else "--wheel-dir"
    if flag in words:
        folder = pathlib.Path(words[words.index(flag) + 1])
        for word in words:
            named = re.fullmatch(r"([\\w.-]+)==([\\d.]+)", word)
            if named and named[1] != os.environ.get("ABSENT"):
                name, version = named.groups()
                plain = name.replace("-", "_")
                path = folder / f"{{plain}}-{{version}}-py3-none-any.whl"
                with zipfile.ZipFile(path, "w") as wheel:
                    text = f"Name: {{name}}\\nVersion: {{version}}\\n"
                    if name == "pydantic":
                        text += "Requires-Dist: pydantic-core==2.50.5\\nRequires-Dist: torch\\n"
                    wheel.writestr(f"{{plain}}-{{version}}.dist-info/METADATA", text)
else:
    os.execv({python!r}, [{python!r}, *words])
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    program = tmp_path / "python"
    program.write_text(INTERPRETER.format(python=sys.executable, log=str(tmp_path / "log")))
    program.chmod(0o755)
    return program


def gpu_wheels(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "tools/gpu_wheels.sh", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
    )


def test_everything_is_downloaded_by_name_without_dependencies(
    python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wheels"
    done = gpu_wheels("--te", str(folder), PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "log").read_text().splitlines()
    downloads = [line for line in asked if " download " in line]
    assert len(downloads) == 1
    assert " --no-deps " in downloads[0]
    listed = gpu_wheels("--list", "--te").stdout.splitlines()
    assert all(f" {name}" in downloads[0] for name in listed[:-1])
    assert listed[-1] == "transformer_engine_torch==2.20.2 (built against torch 2.11.0)"
    # The one package that is built, also without its dependencies.
    (built,) = (line for line in asked if " wheel " in line and "transformer_engine_torch" in line)
    assert "--no-deps --no-build-isolation" in built
    assert len(list(folder.glob("*.whl"))) == len(listed)
    # A second run does not build again.
    (tmp_path / "log").unlink()
    assert gpu_wheels("--te", str(folder), PYTHON=str(python)).returncode == 0
    assert " --wheel-dir " not in (tmp_path / "log").read_text()


def test_an_incomplete_folder_is_an_error_that_names_the_wheels(
    python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wheels"
    done = gpu_wheels("--te", str(folder), PYTHON=str(python), ABSENT="pydantic-core")
    assert done.returncode == 1
    assert f"{folder}: pydantic-core==2.50.5 has no wheel" in done.stderr
    assert "pydantic-core==2.50.5, which pydantic requires, has no wheel" in done.stderr
    assert gpu_wheels("--te", str(folder), PYTHON=str(python)).returncode == 0
    assert gpu_wheels("--check", "--te", str(folder)).returncode == 0
    for wheel in folder.glob("einops-*.whl"):
        wheel.write_bytes(wheel.read_bytes()[:-40])
    (folder / "protobuf-7.36.2-py3-none-any.whl").unlink()
    with zipfile.ZipFile(folder / "protobuf-1.0-py3-none-any.whl", "w") as old:
        old.writestr("protobuf-1.0.dist-info/METADATA", "Name: protobuf\nVersion: 1.0\n")
    done = gpu_wheels("--check", "--te", str(folder))
    assert done.returncode == 1
    assert "einops-0.8.2-py3-none-any.whl is not a whole wheel" in done.stderr
    assert "protobuf 1.0 is not ==7.36.2" in done.stderr


def test_flags() -> None:
    assert "--te     adds Transformer Engine" in gpu_wheels("--help").stdout
    wrong = gpu_wheels("--tee")
    assert wrong.returncode == 2
    assert "got --tee; allowed: --list, --check, --te, FOLDER" in wrong.stderr
    assert "transformer_engine" not in gpu_wheels("--list").stdout
