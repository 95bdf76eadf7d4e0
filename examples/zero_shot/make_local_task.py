"""Make a task for lm-eval that needs no network: which line of Python's library comes next?

Usage: python examples/zero_shot/make_local_task.py FOLDER [QUESTIONS]

A question shows four lines of a module of the standard library. The choices are the beginning of
the line that follows and of three lines from elsewhere in the module; chance is 25 %. They are
short, so that they fit a model of any length. Writes FOLDER/next_line.yaml and .jsonl.
"""

import argparse
import ast
import json
import random
import sys
from pathlib import Path

from megatron_llr.tools.entry_point import run_tool

_SHOWN, _CHOICES, _CHARACTERS, _SEED = 4, 4, 12, 0
# Modules that all supported versions of Python have.
_MODULES = "argparse ast calendar csv dataclasses difflib enum fractions functools heapq inspect"


def questions(count: int) -> list[dict[str, object]]:
    """`count` questions: query, choices, and the position of the right choice."""
    choose = random.Random(_SEED)
    modules = [Path(ast.__file__).with_name(f"{name}.py") for name in _MODULES.split()]
    texts = [
        [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in modules
    ]
    made: list[dict[str, object]] = []
    while len(made) < count:
        lines = choose.choice(texts)
        first = choose.randrange(len(lines) - _SHOWN)
        right = lines[first + _SHOWN].strip()[:_CHARACTERS]
        others = {line.strip()[:_CHARACTERS] for line in lines} - {right}
        wrong = choose.sample(sorted(others), _CHOICES - 1)
        choices = sorted([right, *wrong])
        query = "\n".join(lines[first : first + _SHOWN]) + "\n"
        made.append({"query": query, "choices": choices, "gold": choices.index(right)})
    return made


def task(data: Path) -> str:
    """The task in lm-eval's format, which is YAML; JSON strings are YAML strings."""
    return f"""\
task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""


def main() -> int:
    """Write the task and its data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("questions", nargs="?", type=int, default=200, help="number (200)")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "next_line.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions(given.questions)))
    (folder / "next_line.yaml").write_text(task(data))
    print(f"{given.questions} questions in {data}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
