"""``python -m tests.bench``: every case of the engine's table, measured beside what it must reach.

With words, only the cases whose names contain one of them: ``python -m tests.bench headers slots``. What is printed is
a table in markdown. It wants the machine for itself; all cases together take about ten minutes.
"""

from __future__ import annotations

import argparse
import os

from tests.bench.cases import CASES


def main() -> int:
    """Run the cases, and say whether all of them reached what they must."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="words of the cases to run (default: all)")
    parser.add_argument("--rows", type=float, default=1.0, help="times the rows of each case (default 1)")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    chosen = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "sk-bench")
    wanted = [case for case in CASES if not chosen.names or any(word in case.name for word in chosen.names)]
    if chosen.list:
        print(*(case.name for case in wanted), sep="\n")
        return 0
    print("| case | figure | required | measured | reached |\n| --- | --- | --- | --- | --- |", flush=True)
    missed = 0
    for case in wanted:
        for figure in case.figures(max(1, int(case.rows * chosen.rows))):
            missed += not figure.reached
            print(figure.row(case.name), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
