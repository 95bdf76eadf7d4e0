"""Peak memory of a conversion, next to the size of the model.

Usage: python benchmarks/convert_memory.py [--gigabytes 4] [--folder DIR]

Writes a LLaMA of random bf16 weights, converts it to Megatron and back with the command-line tool,
and samples the process's own memory (RssAnon: without mapped files, which the system can drop).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.hugging_face import Shards
from megatron_llr.tools.convert.links import links_of
from megatron_llr.tools.convert.model_families import family_named

ROOT = Path(__file__).resolve().parents[1]
# LLaMA 2 7B's proportions, with fewer layers.
SHAPE = {"hidden": 4096, "ffn": 11008, "heads": 32, "groups": 8, "channels": 128, "vocab": 32000}


def write_model(folder: Path, layers: int) -> int:
    """Random weights in files of 1 GB; returns their bytes."""
    family = family_named("llama")
    model = Architecture(
        layers=layers, positions=4096, norm_epsilon=1e-5, rope_theta=10000.0, **SHAPE
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings.to_config(family, model, "bfloat16")))
    shards = Shards(folder, 10**9)
    for link in links_of(family, model, model.vocab):
        shards.add((part.name, torch.randn(part.shape).bfloat16()) for part in link.parts)
    shards.close()
    return folder_size(folder)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_memory(status: Iterable[str]) -> int:
    """Bytes of RssAnon in /proc/PID/status."""
    return next((int(line.split()[1]) * 1024 for line in status if "RssAnon" in line), 0)


def run_converter(*arguments: object) -> tuple[float, int]:
    """Run the tool; returns its seconds and its peak memory in bytes."""
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), *map(str, arguments)]
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status") as status:
                peak = max(peak, anonymous_memory(status))
            time.sleep(0.01)
    assert process.returncode == 0, command
    return time.perf_counter() - begin, peak


def idle_memory() -> int:
    """Bytes that the tool takes after its imports, before any work."""
    code = (
        "import megatron_llr.tools.convert.to_hugging_face, megatron_llr.megatron.model_chunks\n"
        "import transformers, tqdm\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if 'RssAnon' in l))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout.split()[-1]) * 1024


def main() -> None:
    """Print one line for each direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the model")
    parser.add_argument("--folder", type=Path, default=None, help="where to write")
    parser.add_argument("--shard-size", default="500MB", help="files of the way back")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        layer = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 11008)
        layers = max(1, round((args.gigabytes * 1e9 - 4 * 32000 * 4096) / layer))
        size = write_model(work / "hf", layers)
        imports = idle_memory()
        print(f"model {size / 1e9:.2f} GB, {layers} layers; imports {imports / 1e6:.0f} MB")
        ways = (("hf", "megatron"), ("megatron", "back"))
        for source, target in ways:
            more = ("--shard-size", args.shard_size) if target == "back" else ()
            seconds, peak = run_converter(work / source, work / target, *more)
            print(
                f"{source:>8} -> {target:8} {seconds:6.1f} s  peak {peak / 1e6:6.0f} MB "
                f"({(peak - imports) / size:.1%} of the model, without imports)"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
