"""README, examples and docs say what is true: code runs, flags exist, files are there."""

import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from megatron_llr.tools.compare.grid_file import read_grid
from megatron_llr.tools.self_test import cli as self_test

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_with_output_prints_that_output() -> None:
    """A python block followed by a text block is run and compared."""
    pairs = re.findall(r"```python\n((?:(?!```).)*?)```\n\n```text\n(.*?)```", README, re.S)
    assert len(pairs) == 1
    for code, expected in pairs:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)) | set(
        re.findall(r"\]\((?!http)([^)#]+)\)", text)
    )
    for path in named - {"runs/demo/"}:
        places = (ROOT / path, ROOT / "megatron_llr" / path, page.parent / path)
        assert any(place.exists() for place in places), path


# The others are those that train.
SELF_TEST = ROOT / "examples" / "self_test.sbatch"
ZERO_SHOT = ROOT / "examples" / "zero_shot.sh"
CONTAINER = ROOT / "examples" / "container" / "llama_1b.sbatch"
SCRIPTS = sorted({*(ROOT / "examples").glob("*.s*"), CONTAINER} - {SELF_TEST, ZERO_SHOT})
GRIDS = sorted((ROOT / "examples").rglob("*.yaml"))
# Sizes, steps and rates of arXiv 2605.22297: (blocks, hidden, ffn, heads, steps, lr, min lr).
LLAMA = {
    "60m": (6, 768, 1512, 12, 3200, 1e-3, 1e-4),
    "130m": (12, 768, 2048, 12, 5200, 1e-3, 1e-4),
    "350m": (24, 1024, 2736, 16, 13600, 1e-3, 1e-4),
    "1b": (24, 2048, 5461, 32, 40000, 5e-4, 5e-5),
    "3b": (32, 2560, 6848, 32, 60000, 3e-4, 3e-5),
}


# In place of Python: prints what it would launch, runs what chooses the flags, ignores the rest.
INTERPRETER = """#!/bin/bash
case "$*" in
    "-m torch.distributed.run"*) printf 'ARG %s\\n' "$@" ;;
    "-m megatron_llr.megatron.launcher_flags"*) exec "$REAL" "$@" ;;
esac
"""
# Packages that a GPU machine may have, as empty modules.
ENGINE = ("transformer_engine", "transformer_engine_torch")
APEX = (
    "apex",
    "fused_weight_gradient_mlp_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)

PACKAGES = {"none": (), "apex": APEX, "engine": ENGINE, "all": (*ENGINE, *APEX)}


def launched(
    script: Path, *flags: str, packages: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would, with a stand-in for the job that it launches."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "python"
        python.write_text(INTERPRETER)
        python.chmod(0o755)
        for name in packages:
            (Path(folder) / f"{name}.py").write_text("")
        stub = 'torchrun() { printf "ARG %s\\n" torchrun "$@"; }\n'
        stub += 'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }\n'
        stub += "scontrol() { echo h; }; export -f torchrun srun scontrol\n"
        environment = {"PATH": "/usr/bin:/bin", "REAL": sys.executable, "PYTHON": str(python)}
        environment |= {"PYTHONPATH": f"{ROOT}:{folder}", "DATA": "d", "TOKENIZER": "t"}
        environment |= {"RUN": f"{folder}/run"}
        if script.suffix == ".sbatch":
            nodes = re.search(r"^#SBATCH --nodes=(\d+)$", script.read_text(), re.M)
            assert nodes
            environment |= {"SLURM_NNODES": nodes[1], "SLURM_JOB_NODELIST": "h[1-9]"}
        return subprocess.run(
            ["bash", "-c", f'{stub} bash "{script}" {shlex.join(flags)}'],
            cwd=ROOT,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )


def printed_words(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What an example gave its launcher; demo.sh keeps it in its log."""
    assert "running: " in done.stderr, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("running: "))
    words = shlex.split(line.removeprefix("running: "))
    given = [line.removeprefix("ARG ") for line in done.stdout.splitlines() if "ARG " in line]
    # The command that is printed is the one that runs.
    assert not given or words[-len(given) :] == given
    return words


def words_of(script: Path, program: str = "pretrain_gpt_llr.py", *flags: str) -> list[str]:
    """The command that an example prints, with packages for everything it uses."""
    last = flags or ("--llr-log-dir", "last")
    words = printed_words(launched(script, *last, packages=(*ENGINE, *APEX)))
    assert program in words
    return words


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.fixture(scope="module")
def parsed_examples() -> dict[str, dict[str, object]]:
    """Every example's flags, parsed and checked by Megatron's own code for its number of ranks."""
    program = (
        "import json, os, sys\n"
        "from megatron_llr.megatron import launch\n"
        "launch.prepare_device(['--llr-device', 'cpu'])\n"
        "from megatron.training import arguments\n"
        "from megatron_llr.megatron.flags import *\n"
        "from megatron_llr.megatron.fp8_widths import check_fp8_widths\n"
        "from megatron_llr.megatron.package_needs import require_packages\n"
        "found = {}\n"
        "for name, (ranks, words, there) in json.loads(sys.stdin.read()).items():\n"
        "    os.environ.update(WORLD_SIZE=str(ranks), RANK='0')\n"
        "    sys.argv = ['pretrain_gpt_llr.py', *words]\n"
        # What parse_and_validate_args does before it builds a tokenizer.
        "    args = arguments.parse_args(add_llr_arguments)\n"
        "    if there is not None:\n"
        "        require_packages(args, gpu=True, has=[*there, 'transformers'].__contains__)\n"
        "    args = arguments.validate_args(args)\n"
        "    refuse_unsupported(args)\n"
        "    check_fp8_widths(args)\n"
        "    configs_from_args(args)\n"
        "    plain = (int, float, str)\n"
        "    found[name] = {k: v for k, v in vars(args).items() if isinstance(v, plain)}\n"
        "print('PARSED', json.dumps(found))\n"
    )
    jobs: dict[str, tuple[int, Sequence[str], Sequence[str] | None]] = {}
    for script in SCRIPTS:
        for name, packages in PACKAGES.items():
            # All scripts of the paper's models call the same one.
            if name != "all" and script.name not in ("llama_60m.sh", "llama_3b.sh"):
                continue
            fp8 = "0" if "engine" not in name and name != "all" else ""
            done = launched(script, "--llr-log-dir", "last", packages=packages, FP8=fp8)
            words = printed_words(done)
            nodes = int(after(words, "--nnodes")) if "--nnodes" in words else 1
            ranks = nodes * int(after(words, "--nproc-per-node"))
            there = packages if script.stem.startswith("llama_") else None
            flags = words[words.index("pretrain_gpt_llr.py") + 1 :]
            jobs[f"{script.relative_to(ROOT)} {name}"] = (ranks, flags, there)
    for name in ("llama_60m.sh", "llama_1b.sh"):
        done = launched(ROOT / "examples" / name, packages=PACKAGES["engine"], FP8="1")
        flags = printed_words(done)
        flags = flags[flags.index("pretrain_gpt_llr.py") + 1 :]
        jobs[f"{name} FP8"] = (8, flags, PACKAGES["engine"])
    for path in GRIDS:
        for run in read_grid(path).base_runs():
            jobs.setdefault(
                f"{path.parent.name}/{path.name}: {run.policy}", (1, run.settings, None)
            )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    line = next((text for text in done.stdout.splitlines() if text.startswith("PARSED")), None)
    assert line is not None, done.stderr[-3000:]
    found: dict[str, dict[str, object]] = json.loads(line.removeprefix("PARSED"))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_example_is_accepted_by_the_real_parser(
    script: Path, parsed_examples: dict[str, dict[str, object]]
) -> None:
    args = parsed_examples[f"{script.relative_to(ROOT)} all"]
    assert args["llr_log_dir"] == "last"
    if script.stem.startswith("llama_"):
        names = "num_layers hidden_size ffn_hidden_size num_attention_heads train_iters lr min_lr"
        size = script.stem.removeprefix("llama_")
        assert tuple(args[name] for name in names.split()) == LLAMA[size]
        assert args["lr_warmup_iters"] == LLAMA[size][4] // 10
        assert (args["global_batch_size"], args["seq_length"]) == (512, 1024)
        assert (args["llr_interval"], args["llr_ramp_iters"]) == (100, 50)
        assert args.get("fp8") == ("hybrid" if size == "3b" else None)


@pytest.mark.parametrize("name", ["llama_60m.sh", "llama_3b.sh"])
def test_examples_turn_off_what_the_installed_packages_cannot_run(
    name: str, parsed_examples: dict[str, dict[str, object]]
) -> None:
    """The checks of a job on a GPU have accepted these already."""
    fusions = "gradient_accumulation_fusion apply_rope_fusion masked_softmax_fusion".split()
    settings = ("transformer_impl", "no_persist_layer_norm", *fusions)
    chosen = {
        packages: tuple(
            parsed_examples[f"examples/{name} {packages}"][setting] for setting in settings
        )
        for packages in PACKAGES
    }
    assert chosen["all"] == ("transformer_engine", False, True, True, True)
    assert chosen["engine"] == ("transformer_engine", False, False, True, True)
    assert chosen["apex"] == ("local", True, True, False, True)
    assert chosen["none"] == ("local", True, False, False, False)


def test_fp8_rounds_the_widths_of_the_paper(parsed_examples: dict[str, dict[str, object]]) -> None:
    widths = [
        parsed_examples[f"{name} FP8"]["ffn_hidden_size"]
        for name in ("llama_60m.sh", "llama_1b.sh")
    ]
    assert widths == [1520, 5472]


def test_examples_say_once_what_they_change() -> None:
    script = ROOT / "examples" / "llama_60m.sh"
    first, second = (
        launched(script, packages=ENGINE, FP8="1", SLURM_NODEID=node).stderr for node in "01"
    )
    assert "--ffn-hidden-size 1512 is rounded up to 1520" in first
    assert first.count("is not installed: added --no-gradient-accumulation-fusion") == 1
    assert second == ""
    without = launched(script).stderr
    assert without.count("so the layers are Megatron's local ones, which are slower") == 1


@pytest.mark.parametrize("script", [*SCRIPTS, SELF_TEST, ZERO_SHOT], ids=lambda path: path.name)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_example_prints_its_usage(script: Path, flag: str) -> None:
    done = launched(script, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(script.relative_to(ROOT)) in done.stdout
    assert "ARG" not in done.stdout
    if script.suffix == ".sh":
        assert "Usage: " in done.stdout
        assert "Environment variables:" in done.stdout


def test_an_example_without_data_says_what_is_missing() -> None:
    done = launched(ROOT / "examples" / "llama_60m.sh", DATA="")
    assert done.returncode != 0
    assert "DATA: must be the path prefix of the .bin/.idx pair, see --help" in done.stderr


def test_every_run_of_the_grids_is_accepted_by_the_real_parser(
    parsed_examples: dict[str, dict[str, object]],
) -> None:
    grids = {name: args for name, args in parsed_examples.items() if ".yaml" in name}
    assert len(grids) == 8 + 2 + 6 + 11 + 8
    assert all(args["llr_same_start"] and args["llr_fixed_validation"] for args in grids.values())
    real = grids["shakespeare_char/gpu.yaml: depth-cosine"]
    assert (real["train_iters"], real["lr"], real["min_lr"]) == (5000, 1e-3, 1e-4)
    assert (real["num_layers"], real["hidden_size"], real["hidden_dropout"]) == (6, 384, 0.2)
    # 7 batches of 64 x 256 hold all of the last tenth of the text.
    assert int(str(real["eval_iters"])) * 64 * 256 >= 111_540


def test_every_model_of_the_paper_has_both_scripts() -> None:
    names = {path.name for path in SCRIPTS}
    assert {f"llama_{size}{end}" for size in LLAMA for end in (".sh", ".sbatch")} <= names
    words = words_of(ROOT / "examples" / "llama_1b.sbatch")
    assert (after(words, "--nnodes"), after(words, "--rdzv-endpoint")) == ("4", "h:29500")
    alone = words_of(ROOT / "examples" / "llama_1b.sh")
    assert (after(alone, "--nnodes"), after(alone, "--rdzv-endpoint")) == ("1", "localhost:0")


def test_the_self_test_starts_on_every_node_of_a_slurm_job() -> None:
    words = words_of(SELF_TEST, "tools/self_test.py", "--only", "dp", "--timeout", "9")
    assert (after(words, "--nnodes"), after(words, "--rdzv-endpoint")) == ("2", "h:29500")
    at = words.index("tools/self_test.py")
    given = self_test.build_parser().parse_args(words[at + 1 :])
    assert (given.only, given.timeout, str(given.out)) == ("dp", 9, "self_test-0.json")


MEGATRON_NAMES = re.compile(
    r"shard_fp32_from_float16_groups|_get_model_param_range_map|float16_groups|chained_optimizers|"
    r"is_stub_optimizer|tensor_model_parallel(?!_size)|partition_dim|partition_sizes|pg_collection|"
    r"ddp_config|main_grad|split_qkv|is_qkv_fn|overlap_param_gather|hybrid_layer_pattern|layer_number|model_fp32_groups"
)


def test_megatron_is_known_in_one_folder() -> None:
    """Only `megatron/` and `cpu/` use Megatron's attribute names; the tools, its public classes."""
    for path in (ROOT / "megatron_llr").rglob("*.py"):
        room, text = path.relative_to(ROOT / "megatron_llr").parts[0], path.read_text()
        if room in ("megatron", "cpu"):
            continue
        assert not MEGATRON_NAMES.search(text) or room == "tools", path
        imports_megatron = re.search(r"^\s*(from|import) megatron[. ]", text, re.M)
        assert not imports_megatron or room == "tools", path


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


def test_the_support_matrix_is_what_the_tests_run() -> None:
    """`python -m tests.docs.support_matrix --write` brings it up to date."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.docs.support_matrix", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_letter_of_the_support_matrix_is_a_test() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    named = dict(re.findall(r"`([air])`,\s+`(tests/\S+\.py)`", page))
    assert set(named) == set("air")
    assert all((ROOT / path).is_file() for path in named.values())
