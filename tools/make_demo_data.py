"""Make the demo's dataset: the sources of Python's standard library, one token per byte.

Usage: python tools/make_demo_data.py PREFIX     (writes PREFIX.bin and PREFIX.idx)
"""

import argparse
import sys

from megatron_llr.tools.entry_point import run_tool


def main() -> int:
    """Write the dataset, replacing an existing one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path of the dataset without suffix")
    prefix = parser.parse_args().prefix
    import numpy as np

    from megatron_llr.megatron import launch

    launch.prepare_device(["--llr-device", "cpu"])
    from megatron_llr.tools.preprocess import byte_level
    from megatron_llr.tools.preprocess.pair import PairWriter

    with PairWriter(prefix, byte_level.VOCAB_SIZE, overwrite=True) as pair:
        for text in byte_level.standard_library_sources():
            if text:
                ids = np.append(np.frombuffer(text, np.uint8), [byte_level.END_OF_DOCUMENT])
                pair.add(ids, [len(ids)])
    print(f"{prefix}: {pair.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
