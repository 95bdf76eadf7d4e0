"""Continue a text with a converted checkpoint in `transformers`.

Usage: python examples/generate_text.py FOLDER PROMPT [TOKENS]

Without a tokenizer in the folder one byte is one token, as in the demo. Needs no network.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_llr.errors import input_error
from megatron_llr.tools.entry_point import run_tool

# A model of bytes has one more token, the end of a document.
_BYTES = 256


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """The prompt and its greedy continuation.

    Raises:
        ValueError: if the folder is not a model with a fitting tokenizer, or the prompt is empty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "config.json").is_file():
        raise input_error(
            f"There is no model in {folder}. FOLDER must have config.json and safetensors, as "
            "tools/convert_checkpoint.py writes them. Check the path."
        )
    # A folder from elsewhere must neither run code nor be completed from the network.
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **local)
        tokenizer = None
        # AutoTokenizer replaces the class of a tokenizer.json for some model types.
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **local)
        elif any(folder.glob("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as broken:
        reason = " ".join(str(broken).split())[:300]
        raise input_error(
            f"transformers cannot load {folder}: {type(broken).__name__}: {reason}. It must be a "
            "complete folder with safetensors. Convert the checkpoint again."
        ) from broken
    ids = tokenizer.encode(prompt) if tokenizer else list(os.fsencode(prompt))
    rows = model.config.vocab_size
    if not ids or max(ids) >= rows:
        given = f"a token {max(ids)}, but the model has {rows}" if ids else "no token"
        raise input_error(
            f"The prompt {prompt[:40]!r} has {given}. It must have at least one, of the model's "
            "own. Add the model's tokenizer with --files of tools/convert_checkpoint.py."
        )
    generated = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    whole = generated[0].tolist()
    if tokenizer:
        return str(tokenizer.decode(whole))
    return bytes(i for i in whole if i < _BYTES).decode(errors="replace")


def main() -> int:
    """Print a greedy continuation; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("prompt", help="the text to continue, such as 'def main'")
    parser.add_argument("tokens", nargs="?", type=int, default=80, help="tokens to add (80)")
    given = parser.parse_args()
    if given.tokens < 1:
        parser.error(f"TOKENS {given.tokens} is not at least 1")
    try:
        print(continuation(given.folder, given.prompt, given.tokens))
    except ValueError as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
