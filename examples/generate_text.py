"""Continue a text with a converted checkpoint in `transformers`.

Usage: python examples/generate_text.py FOLDER PROMPT [TOKENS]

Without a tokenizer in the folder one byte is one token, as in the demo.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print a greedy continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("prompt", help="the text to continue, such as 'def main'")
    parser.add_argument("tokens", nargs="?", type=int, default=80, help="tokens to add (80)")
    given = parser.parse_args()
    folder, prompt, tokens = given.folder, given.prompt, given.tokens
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if any(folder.glob("tokenizer*")) else None
    ids = tokenizer.encode(prompt) if tokenizer else list(prompt.encode())
    whole = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0].tolist()
    text = tokenizer.decode(whole) if tokenizer else bytes(i for i in whole if i < 256)
    print(text if isinstance(text, str) else text.decode(errors="replace"))


if __name__ == "__main__":
    main()
