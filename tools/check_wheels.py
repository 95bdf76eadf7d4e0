"""Check that a folder of wheels is complete: every package that is named, and what they require.

Usage: python tools/check_wheels.py FOLDER NAME==VERSION...

Reads only the wheels; needs no network. What PyTorch brings is expected on the GPU machine.
"""

import argparse
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a Python that has only pip
    from pip._vendor.packaging.requirements import Requirement

# The machines that tools/gpu_wheels.sh downloads for.
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "extra": "",
}
# PyTorch and what it requires, and two packages that nvidia-cudnn-frontend imports only for kernels
# that Transformer Engine does not use.
ELSEWHERE = {
    "torch",
    "typing-extensions",
    "sympy",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
}


def plain(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def contents(folder: Path) -> tuple[dict[str, tuple[str, list[Requirement]]], list[str]]:
    """Version and requirements of every package in a folder, and a line for each broken wheel."""
    packages, problems = {}, []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
                metadata = Parser().parsestr(archive.read(names[0]).decode())
        except (zipfile.BadZipFile, IndexError, OSError):
            problems.append(f"{wheel.name} is not a whole wheel; delete it and download it again")
            continue
        needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
        needs = [each for each in needs if each.marker is None or each.marker.evaluate(TARGET)]
        packages[plain(metadata["Name"])] = (metadata["Version"], needs)
    return packages, problems


def check(folder: Path, wanted: list[Requirement]) -> list[str]:
    """What is missing or broken, a line each.

    Args:
        folder: of the wheels.
        wanted: packages that must be there.
    """
    packages, problems = contents(folder)
    required = [(each, "") for each in wanted]
    for name, (_, needs) in packages.items():
        required += [(each, f", which {name} requires,") for each in needs]
    for each, reason in required:
        if reason and plain(each.name) in ELSEWHERE:
            continue
        version = packages.get(plain(each.name), (None, []))[0]
        if version is None:
            problems.append(f"{each.name}{each.specifier}{reason} has no wheel")
        elif not each.specifier.contains(version, prereleases=True):
            problems.append(f"{each.name} {version} is not {each.specifier}{reason.rstrip(',')}")
    return problems


def main() -> int:
    """Print what is missing; returns 1 if anything is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of wheels")
    parser.add_argument("wanted", nargs="*", type=Requirement, help="packages with their versions")
    given = parser.parse_args()
    problems = check(given.folder, given.wanted)
    for line in problems:
        print(f"{given.folder}: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
