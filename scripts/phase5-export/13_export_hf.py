#!/usr/bin/env python3
"""Write the fused model in Hugging Face's layout, for transformers and llama.cpp."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.export import llama_cpp
    from dpo_mlx.stages.export import export_model, export_peft

    if options.peft:
        export_peft(config)
    else:
        llama_cpp.report(export_model(config))


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--peft", action="store_true", help="write the adapters for PEFT instead of the fused model"
    )
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
