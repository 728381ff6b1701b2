"""A program with this library's operations: python -m apd_kernels.drop_in [--only NAME]… [--report] [-m] PROGRAM …"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from apd_kernels import drop_in


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m apd_kernels.drop_in",
        description="Run a program of TransReID, CLIP-ReID, strong-baseline, torchreid, fast-reid, cluster-contrast, "
        "BAU or SpCL as it is, with operations of apd_kernels in the place of its own.",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="replace only this function, class or switch")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave this one as it is")
    parser.add_argument("--allow-unknown", action="store_true", help="replace also code that is not known")
    parser.add_argument("--report", action="store_true", help="say at the end what was replaced, and how often called")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    given = parser.parse_args(arguments)
    if not given.module and not os.path.isfile(given.program):
        parser.error(f"no such script: {given.program}")
    sys.path[0] = os.getcwd() if given.module else os.path.dirname(os.path.abspath(given.program))
    sys.argv = [given.program, *given.arguments]
    drop_in.apply(only=given.only, without=given.without, allow_unknown=given.allow_unknown)
    try:
        if given.module:
            runpy.run_module(given.program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(given.program, run_name="__main__")
    finally:
        if given.report:
            print(drop_in.report(), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
