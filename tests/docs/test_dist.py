"""What is handed out: the wheel holds the package and nothing else, the sdist all that is tracked, and both install."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ckavg

ROOT = Path(__file__).parents[2]
INFO = f"ckavg-{ckavg.__version__}.dist-info"
pytest.importorskip("build")
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, as `make dist` makes them."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_wheel_holds_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    sources = (path for path in (ROOT / "ckavg").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    about = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == {str(path.relative_to(ROOT)) for path in sources} | about
    data = {name for name in names - about if not name.endswith(".py")}
    assert data == {"ckavg/output/report.html", "ckavg/py.typed"}


def test_sdist_holds_what_builds_and_tests_it(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [ROOT / folder for folder in ("ckavg", "tests", "docs", "benchmarks")]
    needed = {path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".md", ".csv", ".png"}}
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Makefile",
        "mkdocs.yml",
    } <= names


def test_wheel_runs_where_it_is_installed(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees the libraries of this one, but not its ckavg."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([str(each) for each in install], check=True)
    libraries = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    (site / "libraries.pth").write_text(libraries, encoding="utf-8")
    command = [str(tmp_path / "venv" / "bin" / "python"), "-I", "-m", "ckavg", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"ckavg {ckavg.__version__}\n"
    where = [command[0], "-I", "-c", "import ckavg; print(ckavg.__file__)"]
    assert subprocess.run(where, capture_output=True, text=True, check=True).stdout.startswith(str(site))
    assert "ckavg = ckavg.cli:main" in (site / INFO / "entry_points.txt").read_text(encoding="utf-8")


def test_places_that_name_the_version_agree() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {ckavg.__version__}" in lines
    assert f"## [{ckavg.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
