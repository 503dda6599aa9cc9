"""The library behind the numbered scripts: DPO with LoRA on MLX, one room per job."""

import os
import sys

# macOS stops GPU commands that keep the display waiting, as LoRA training does. An MLX maintainer
# suggests this variable (ml-explore/mlx issue 3267). The driver reads it when the GPU is opened, so
# it is set before any module imports MLX. A value that the user has set wins.
if sys.platform == "darwin":
    os.environ.setdefault("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")
