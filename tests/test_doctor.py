"""scripts/doctor.sh names what a machine lacks, and the command that installs it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCTOR = Path(__file__).resolve().parents[1] / "scripts" / "doctor.sh"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: what the doctor calls, without compiler, make and python."""
    for tool in ("sh", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    return tmp_path


def give(machine: Path, name: str, script: str) -> Path:
    tool = machine / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


def give_all(machine: Path) -> None:
    give(machine, "g++", "exit 0")
    give(machine, "make", "exit 0")
    give_python(machine)


def give_python(machine: Path, lacking: str = "", answer: str = "exit 1") -> None:
    """This very python, but a question that mentions `lacking` gets `answer` instead."""
    case = f'case "$*" in *{shlex.quote(lacking)}*) {answer} ;; esac\n' if lacking else ""
    headers = machine / "include"
    headers.mkdir(exist_ok=True)
    (headers / "Python.h").touch()
    # Whether this machine has the headers is not the test's business: the fake one has them.
    include = f'case "$*" in *get_paths*) echo {headers}; exit 0 ;; esac\n'
    give(machine, "python3", f'{case}{include}exec "{sys.executable}" "$@"')


def doctor(machine: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "sh", DOCTOR, *args],
        env={"PATH": str(machine), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def installs(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The Debian packages that it tells to install."""
    lines = [x for x in done.stderr.splitlines() if x.strip().startswith("sudo apt-get install ")]
    assert len(lines) == 1, done.stderr
    return set(lines[0].split()[3:])


def test_silent_where_nothing_is_lacking(machine: Path) -> None:
    give_all(machine)
    for mode in ([], ["--venv"]):
        done = doctor(machine, *mode)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_everything_is_lacking(machine: Path) -> None:
    done = doctor(machine, "--venv")
    assert done.returncode == 1
    assert installs(done) == {"python3", "python3-venv", "python3-dev", "g++", "make"}


@pytest.mark.parametrize(("tool", "package"), [("g++", "g++"), ("make", "make")])
def test_a_tool_is_lacking(machine: Path, tool: str, package: str) -> None:
    give_all(machine)
    (machine / tool).unlink()
    done = doctor(machine)
    assert done.returncode == 1
    assert f"no '{tool}' on PATH" in done.stderr
    assert installs(done) == {package}


def test_compiler_from_the_environment(machine: Path) -> None:
    give_all(machine)
    assert "no 'nonesuch++' on PATH" in doctor(machine, CXX="nonesuch++").stderr


def test_compiler_too_old(machine: Path) -> None:
    give_all(machine)
    give(machine, "g++", 'case "$*" in *c++20*) exit 1 ;; esac')
    done = doctor(machine)
    assert done.returncode == 1
    assert "does not compile C++20" in done.stderr


def debian(part: str) -> str:
    """python3-PART, or pythonX.Y-PART where this python is not Debian's own."""
    try:
        own = subprocess.check_output(
            ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            text=True,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        own = ""
    here = "{}.{}".format(*sys.version_info[:2])
    return f"python3-{part}" if own == here else f"python{here}-{part}"


def test_no_venv(machine: Path) -> None:
    give_all(machine)
    give_python(machine, lacking="ensurepip")
    done = doctor(machine, "--venv")
    assert done.returncode == 1
    assert "no venv" in done.stderr
    assert installs(done) == {debian("venv")}
    assert doctor(machine).returncode == 0, "only making the environment needs it"


def test_no_headers(machine: Path) -> None:
    give_all(machine)
    give_python(machine, lacking="get_paths", answer="echo /nowhere; exit 0")
    done = doctor(machine)
    assert done.returncode == 1
    assert "Python.h" in done.stderr
    assert installs(done) == {debian("dev")}


def test_python_too_old(machine: Path) -> None:
    give_all(machine)
    give_python(machine, lacking="(3, 10)", answer="echo False; exit 0")
    done = doctor(machine)
    assert done.returncode == 1
    assert "3.10 or newer is needed" in done.stderr


def test_given_environment_lacks_packages(machine: Path) -> None:
    give_all(machine)
    give_python(machine, lacking="'ninja'")
    done = doctor(machine, "--given")
    assert done.returncode == 1
    assert "no package ninja" in done.stderr
    assert "-m pip install ninja" in done.stderr
    assert "apt-get" not in done.stderr


@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [("torch", "2.10.1+cpu", "2.11"), ("setuptools", "75.8.0", "77")],
)
def test_a_given_package_too_old(machine: Path, package: str, found: str, needed: str) -> None:
    give_all(machine)
    give_python(machine, lacking=f'print(m.version("{package}"))', answer=f"echo {found}; exit 0")
    done = doctor(machine, "--given")
    assert done.returncode == 1
    assert f"{package} {found}; {needed} or newer is needed" in done.stderr
    assert f"-m pip install '{package}>={needed}'" in done.stderr
