"""Let `transformers` continue a text with a converted checkpoint.

Usage: python examples/generate_text.py FOLDER "def main" [TOKENS]

Without a tokenizer in the folder every byte is a token, as in the demo.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Greedy continuation, printed."""
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 80
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if any(folder.glob("tokenizer*")) else None
    ids = tokenizer.encode(prompt) if tokenizer else list(prompt.encode())
    whole = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0].tolist()
    text = tokenizer.decode(whole) if tokenizer else bytes(i for i in whole if i < 256)
    print(text if isinstance(text, str) else text.decode(errors="replace"))


if __name__ == "__main__":
    main()
