"""What is released: the sdist, and the wheel made from it, installed into an environment of its own."""

import configparser
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as for a release: the sdist, then the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("wtacrs_fx-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("wtacrs_fx-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    # torch and the rest come from here. The .pth files in a folder that a .pth file names are ignored,
    # which keeps an editable installation of the repository out.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(environment: Path, folder: Path, code: str) -> str:
    command = [str(environment / "bin" / "python"), "-I", "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"wtacrs_fx", "wtacrs_passes", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    for name in (
        "wtacrs_fx/py.typed",
        "wtacrs_passes/py.typed",
        "wtacrs_fx/cli.py",
        "wtacrs_passes/policy.py",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("dist-info/entry_points.txt"))
    found = configparser.ConfigParser()
    found.read_string(archive.read(name).decode())
    assert {section: dict(found[section]) for section in found.sections()} == {
        "console_scripts": {"wtacrs": "wtacrs_fx.cli:app"},
        "torch_dynamo_backends": {"wtacrs": "wtacrs_fx.backend:wtacrs"},
    }


def test_sdist_contents(sdist: Path) -> None:
    base = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.removeprefix(f"{base}/") for name in archive.getnames()}
    included = [
        path.lstrip("/") for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    ]
    tops = {name.partition("/")[0] for name in files}
    always = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert tops == {*included, *always}
    tracked = subprocess.run(
        ["git", "ls-files", "--", *included], cwd=ROOT, capture_output=True, text=True, check=False
    )
    missing = {name for name in tracked.stdout.split() if (ROOT / name).exists()} - files
    assert not missing
    assert {"docs/estimators.md", "docs/examples/plain_loop.py"} < files
    assert not [name for name in files if "__pycache__" in name]


def test_metadata_is_accepted_by_an_index(wheel: Path, sdist: Path) -> None:
    check = pytest.importorskip("twine.commands.check")
    assert not check.check([str(wheel), str(sdist)], strict=True)  # returns whether it failed


def test_the_version_is_one(environment: Path, wheel: Path, sdist: Path, tmp_path: Path) -> None:
    version = PROJECT["version"]
    assert wheel.name.split("-")[1] == version
    assert sdist.name == f"wtacrs_fx-{version}.tar.gz"
    assert run(environment, tmp_path, "import wtacrs_fx; print(wtacrs_fx.__version__)").strip() == version
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()


def test_backend_is_listed_without_an_import(environment: Path, tmp_path: Path) -> None:
    listed = run(
        environment,
        tmp_path,
        "import sys, torch._dynamo\n"
        "assert 'wtacrs' in torch._dynamo.list_backends(exclude_tags=())\n"
        "assert 'wtacrs_fx' not in sys.modules\n"
        "print(torch._dynamo.lookup_backend('wtacrs').__module__)\n",
    )
    assert listed.startswith("wtacrs_fx")


def test_packages_come_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    files = run(
        environment, tmp_path, "import wtacrs_fx, wtacrs_passes as p; print(wtacrs_fx.__file__, p.__file__)"
    )
    assert all(Path(file).is_relative_to(environment) for file in files.split())


@pytest.mark.parametrize("name", ["passes", "tests", "bench"])
def test_nothing_else_is_installed(environment: Path, tmp_path: Path, name: str) -> None:
    spec = run(environment, tmp_path, f"from importlib.util import find_spec; print(find_spec({name!r}))")
    assert spec.strip() == "None"


def test_console_script(environment: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(environment / "bin" / "wtacrs"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "demo" in result.stdout
