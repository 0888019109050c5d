"""Names the GPU and ends with status 0, or says what is missing and ends with status 1."""

from __future__ import annotations

import shutil
import subprocess
import sys


def main() -> int:
    if shutil.which("nvidia-smi") is None:
        print("No GPU: this machine has no nvidia-smi. Nothing was run on a GPU.")
        return 1
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listing.returncode != 0 or "GPU" not in listing.stdout:
        print(f"No GPU: nvidia-smi lists none ({(listing.stdout + listing.stderr).strip()}). Nothing was run on a GPU.")
        return 1
    print(listing.stdout.strip())
    if "--torch" not in sys.argv:
        return 0

    import torch

    if not torch.cuda.is_available():
        print(
            f"There is a GPU, but torch {torch.__version__} here cannot use it. Run again with\n"
            "PYTHON=<a Python whose torch sees the GPU>. Nothing was run on a GPU."
        )
        return 1
    print(f"torch {torch.__version__} uses {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
