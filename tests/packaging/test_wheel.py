"""The sdist and the wheel: what is in them, and that the wheel works in an environment of its own.

Nothing is downloaded. The environment has only the wheel, and sees the libraries of the one that
runs the tests through a `.pth` file. Such a file is not read for the `.pth` files of that folder,
so an editable install of the package stays invisible.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPES = {"demo", "gpt2", "llama3_1_8b", "mistral_7b", "qwen3_0_6b", "qwen3_8b"}
NOT_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__"),
    *("*.egg-info", "build", "dist", "runs", "shared"),
)
BUILD_SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel, and an empty folder to work in."""

    folder: Path
    work: Path

    def run(self, program: str, *arguments: str) -> str:
        """Output of a program of this environment, which has no other program on its path."""
        bin_folder = self.folder / "bin"
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        result = subprocess.run(
            [str(bin_folder / program), *arguments],
            cwd=self.work,
            env={"PATH": str(bin_folder), "HOME": str(home), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


def _run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the sources, and the wheel of that sdist."""
    source = tmp_path_factory.mktemp("source") / "qlora-lite"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCES)
    out = tmp_path_factory.mktemp("built")
    _run(sys.executable, "-c", BUILD_SDIST, out, cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    _run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=out)
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    work = tmp_path_factory.mktemp("work")
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=work)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    # before the .pth file: pip would see, and replace, the package of the other environment
    _run(*pip, "install", "--no-deps", "--no-index", built.wheel, cwd=work)
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work)
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site.strip()) / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    return Environment(folder, work)


def test_the_sdist_has_what_tests_and_readers_need(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for file in (
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "tests/packaging/test_wheel.py",
    ):
        assert file in names
    for file in ("docs/methods.md", "tools/merge_and_export.py", "CHANGELOG.md", "LICENSE"):
        assert file in names
    assert {f"recipes/{name}.py" for name in RECIPES} <= names
    tests = {f"tests/{file.relative_to(ROOT / 'tests')}" for file in ROOT.glob("tests/**/*.py")}
    assert tests <= names


def test_the_wheel_has_the_package_its_recipes_and_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "qlora_lite"
    modules = {f"qlora_lite/{file.relative_to(package)}" for file in package.glob("**/*.py")}
    assert modules <= names
    assert {f"qlora_lite/recipes/{name}.py" for name in RECIPES} <= names
    for file in ("py.typed", "demo/base/model.safetensors", "demo/data/train.jsonl"):
        assert f"qlora_lite/{file}" in names
    assert "qlora_lite/memory/known/llama3_1_8b.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qlora_lite"}


def test_the_wheel_is_what_is_imported(environment):
    where = environment.run("python", "-c", "import qlora_lite; print(qlora_lite.__file__)")
    assert Path(where.strip()).is_relative_to(environment.folder)


def test_its_recipes_are_found_by_name(environment):
    listed = environment.run("qlora-lite", "init", "--list")
    assert {line.split()[0] for line in listed.splitlines()} >= RECIPES
    assert "Llama 3.1 8B Instruct on one 24 GB card." in listed
    planned = environment.run("qlora-lite", "plan", "llama3_1_8b", "device=cuda", "budget=22GiB")
    assert "has 22.0 GiB" in planned
    # qwen3_8b builds on qwen3_0_6b
    code = "import qlora_lite; print(qlora_lite.load_recipe('qwen3_8b').base.model)"
    assert environment.run("python", "-c", code).strip() == "Qwen/Qwen3-8B"
    assert "tokens" in environment.run("qlora-lite", "preview", "demo")


def test_its_demo_runs_where_there_is_neither_a_checkout_nor_a_compiler(environment):
    assert "every check passed" in environment.run("qlora-lite", "demo")
    assert (environment.work / "runs" / "story" / "merged" / "model.safetensors").is_file()
