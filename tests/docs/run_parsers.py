"""Run programs up to the parsing of their command lines, all in one process.

Reads a JSON list of command lines (a script, then its arguments) from stdin, and prints a JSON list
of [exit code, output]. A command line that parses has code 0, and so has --help.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from typing import Any, NoReturn


class _Parsed(BaseException):
    """Raised in place of what a program does after parsing."""


def _stop_after(method: Any) -> Any:
    def parse(*args: Any, **kwargs: Any) -> NoReturn:
        method(*args, **kwargs)
        raise _Parsed

    return parse


def run(script: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of one program."""
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except _Parsed:
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            code = 1
    return code, output.getvalue()


if __name__ == "__main__":
    argparse.ArgumentParser.parse_args = _stop_after(argparse.ArgumentParser.parse_args)
    print(json.dumps([run(script, arguments) for script, *arguments in json.load(sys.stdin)]))
