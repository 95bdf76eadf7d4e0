"""README, examples and docs say what is true: code runs, flags exist, files are there."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from megatron_llr.convert import command as conversion
from megatron_llr.data import command as preprocessing

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def known_flags() -> frozenset[str]:
    """Every flag of the real parser: Megatron's and ours."""
    program = (
        "from megatron_llr.runtime import launch; launch.prepare_device(['--llr-device', 'cpu'])\n"
        "import argparse\n"
        "from megatron.training.arguments import add_megatron_arguments\n"
        "from megatron_llr.training.arguments import add_llr_arguments\n"
        "parser = add_llr_arguments(add_megatron_arguments(argparse.ArgumentParser()))\n"
        "print('FLAGS', *parser._option_string_actions)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FLAGS "))
    return frozenset(line.split()[1:])


def test_python_with_output_prints_that_output() -> None:
    """A python block followed by a text block is run and compared."""
    pairs = re.findall(r"```python\n((?:(?!```).)*?)```\n\n```text\n(.*?)```", README, re.S)
    assert len(pairs) == 1
    for code, expected in pairs:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == expected


def tool_flags() -> set[str]:
    return set(preprocessing.build_parser()._option_string_actions) | set(
        conversion.parser()._option_string_actions
    )


LAUNCHER = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", page.read_text()))
    # `--llr-*` stands for all of ours; the last is a benchmark's own.
    others = {"--help", "--llr", "--steps"}
    assert named - known_flags() - tool_flags() - LAUNCHER - others == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)) | set(
        re.findall(r"\]\((?!http)([^)#]+)\)", text)
    )
    for path in named - {"runs/demo/"}:
        places = (ROOT / path, ROOT / "megatron_llr" / path, page.parent / path)
        assert any(place.exists() for place in places), path


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.s*")), ids=lambda p: p.name)
def test_the_flags_of_every_example_are_parsed_by_the_real_parser(script: Path) -> None:
    """The launcher is replaced by one that prints what it was given."""
    stub = 'stub() { printf "ARG %s\\n" "$@"; }; srun() { stub "$@"; }; scontrol() { echo h; }\n'
    stub += "rm() { :; }; mkdir() { :; }; tee() { cat; }; grep() { cat; }; sed() { cat; }\n"
    stub += "export -f stub srun scontrol rm mkdir tee grep sed\n"
    environment = {"PATH": "/usr/bin:/bin", "DATA": "d", "TOKENIZER": "t", "PYTHON": "stub"}
    done = subprocess.run(
        ["bash", "-c", f'{stub} exec bash "{script}"'],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    given = [line.removeprefix("ARG ") for line in done.stdout.splitlines() if "ARG " in line]
    assert "pretrain_gpt_llr.py" in given, done.stderr
    job = given[given.index("pretrain_gpt_llr.py") + 1 :]
    if "ARG tools/report_run.py" in done.stdout:
        job = job[: job.index("tools/report_run.py")]
    flags = {word for word in job if word.startswith("--")}
    assert len(flags) > 20
    assert flags - known_flags() == set()


def test_only_one_module_imports_megatron() -> None:
    """`host.py`, and the CPU substitutions, which replace the names themselves."""
    importing = {
        path.relative_to(ROOT / "megatron_llr").as_posix()
        for path in (ROOT / "megatron_llr").rglob("*.py")
        if re.search(r"^\s*(from|import) megatron[. ]", path.read_text(), re.M)
    }
    assert importing == {"host.py", "runtime/cpu.py"}


def test_modules_are_small() -> None:
    for path in (ROOT / "megatron_llr").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    program = (
        "import sys, megatron_llr\n"
        "config = megatron_llr.LLRConfig()\n"
        "megatron_llr.MultiplierSchedule(config, 100)\n"
        "megatron_llr.assign_multipliers({}, config)\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
