"""Every command, flag and remedy in pages, help texts and error messages exists and parses."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from megatron_llr.config import LLRConfig, flag
from megatron_llr.script_config import ScriptConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = [
    *sorted((ROOT / "megatron_llr").rglob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")),
    ROOT / "pretrain_gpt_llr.py",
]
SCRIPT = "pretrain_gpt_llr.py"
PROGRAMS = [
    SCRIPT,
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").glob("*.py"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").rglob("*.py"))),
]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
# Flags of pip, git, sbatch and nvidia-smi; torchrun takes a prefix of --nproc-per-node.
OTHER_PROGRAMS = {
    *("--no-build-isolation", "--short", "--depth", "--nodes", "--query-gpu", "--nproc"),
}


def run_parsers(commands: list[list[str]]) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.docs.run_parsers"],
        cwd=ROOT,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    results: list[tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return results


@cache
def help_texts() -> dict[str, tuple[int, str]]:
    """Exit code and output of every program with --help."""
    return dict(zip(PROGRAMS, run_parsers([[name, "--help"] for name in PROGRAMS]), strict=True))


@cache
def known_flags() -> frozenset[str]:
    """Flags of this package's programs, its benchmarks and torchrun."""
    from torch.distributed.run import get_args_parser

    known = {name for _, text in help_texts().values() for name in FLAG.findall(text)}
    known |= {name.replace("_", "-") for name in get_args_parser()._option_string_actions}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', path.read_text()))
    # many_matrices.py and fused_step.py make these from the fields of a dictionary.
    known |= {"--blocks", "--experts", "--hidden", "--ffn", "--llr"}
    # The command megatron-llr, and the module that prints flags for the launchers.
    return frozenset({*known, "--version", "--round-ffn"})


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed(program: str) -> None:
    code, text = help_texts()[program]
    assert code == 0, text[-2000:]
    assert "usage: " in text
    assert "-h, --help" in text


def test_the_help_of_the_script_lists_every_setting() -> None:
    text = help_texts()[SCRIPT][1]
    for config in (LLRConfig, ScriptConfig):
        for each in fields(config):
            assert f"{flag(each.name)} " in text.replace("\n", " "), each.name
    # A percent sign in one of Megatron's own help texts.
    assert "%%" not in text


def strings_of(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_string_of_the_code_exists(source: Path) -> None:
    named = {name for text in strings_of(source) for name in FLAG.findall(text)}
    assert named - known_flags() - OTHER_PROGRAMS == set()


def test_every_flag_that_the_code_names_by_its_setting_exists() -> None:
    names = {each.name for config in (LLRConfig, ScriptConfig) for each in fields(config)}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("flag", "_invalid") and isinstance(node.args[0], ast.Constant):
                assert node.args[0].value in names, source


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    named = set(FLAG.findall(page.read_text()))
    # --write is that of tests/docs/support_matrix.py.
    assert named - known_flags() - OTHER_PROGRAMS - {"--write"} == set()


def commands_of(text: str) -> Iterator[list[str]]:
    """Command lines in the shell blocks of a page, without comments, pipes and substitutions."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            plain = re.sub(r"\$\([^)]*\)", "", line).split(" | ")[0]
            words = [word for word in shlex.split(plain, comments=True) if word != "..."]
            # Settings of the environment come first.
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words


COMMANDS = [words for page in PAGES for words in commands_of(page.read_text())]


def test_every_program_in_a_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for program, *arguments in COMMANDS:
        if program == "make":
            for target in (word for word in arguments if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.M), target
        elif program == "pip":
            named = ",".join(re.findall(r"\[([\w,-]+)\]", " ".join(arguments)))
            assert set(filter(None, named.split(","))) <= set(extras)
        elif program == "python":
            path = arguments[1].replace(".", "/") if arguments[0] == "-m" else arguments[0]
            assert (ROOT / path).exists(), path
        else:
            others = ("torchrun", "git", "sbatch")
            assert program in others or (ROOT / program).is_file(), program
    for source in SOURCES:
        for text in strings_of(source):
            assert set(re.findall(r"megatron-llr\[(\w+)\]", text)) <= set(extras), source


def test_every_documented_command_line_parses() -> None:
    from torch.distributed.run import get_args_parser

    commands = []
    for program, *arguments in COMMANDS:
        if program == "torchrun":
            launch = get_args_parser().parse_args(arguments)
            script = launch.training_script
            if launch.module:
                # A module of the installed package has a script of the same name.
                script = f"tools/{script.rsplit('.', 1)[-1]}.py"
            commands.append([script, *launch.training_script_args])
        elif program == "python" and arguments[0] in PROGRAMS:
            commands.append(arguments)
    # The examples in the help texts.
    for _, text in help_texts().values():
        for line in text.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] == ["python"] and "PREFIX" not in line:
                commands.append(shlex.split(line, comments=True)[1:])
    assert len(commands) > 15
    for command, (code, text) in zip(commands, run_parsers(commands), strict=True):
        assert code == 0, (command, text[-1000:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_that_a_page_gives_a_setting_is_one_of_its_values(page: Path) -> None:
    """For settings with named values: `--llr-spectrum farms`."""
    choices = {
        flag(each.name): get_args(each.type)
        for config in (LLRConfig, ScriptConfig)
        for each in fields(config)
        if get_origin(each.type) is Literal
    }
    for name, value in re.findall(r"(--llr-[a-z-]+)[ =]([a-z_-]+)`", page.read_text()):
        if name in choices:
            assert value in choices[name], (name, value)
