#!/usr/bin/env python3
"""Check in about two minutes that this machine does what the pipeline relies on.

Runs the whole chain on a tiny random Granite, on MLX's default device, in a temporary folder. Exits
1 when a check fails; put the output into your bug report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.process import signals
from dpo_mlx.process.last_resort import run_and_exit

# Says which machine was tested and when; train_dpo_run1.sh looks for this file.
MARK = Path(__file__).resolve().parents[2] / "data" / ".selftest.json"


def main() -> int:
    cli.Parser(description=__doc__).parse_args()
    from dpo_mlx.stages import selftest

    cli.require_private_libraries()
    cli.warn_without_blas()
    with signals.deferred():
        return 0 if selftest.run(MARK) else 1


if __name__ == "__main__":
    run_and_exit(main)
