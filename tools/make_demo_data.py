"""Make the demo's dataset: the sources of Python's standard library, one token per byte.

Usage: python tools/make_demo_data.py PREFIX     (writes PREFIX.bin and PREFIX.idx)
"""

import argparse

from megatron_llr.runtime import launch


def main() -> None:
    """Write the dataset, unless it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="path of the dataset without suffix")
    prefix = parser.parse_args().prefix
    launch.prepare_device(["--llr-device", "cpu"])
    from megatron_llr.data import byte_level

    tokens = byte_level.write_dataset(byte_level.standard_library_sources(), prefix)
    print(f"{prefix}: {tokens:,} tokens")


if __name__ == "__main__":
    main()
