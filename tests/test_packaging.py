"""The wheel, installed into an empty environment that shares nothing with the repository but torch."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("wtacrs_fx-*-py3-none-any.whl")
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
