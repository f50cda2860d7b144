"""Binder's configuration matches the tested versions."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
BINDER = ROOT / "binder"
_NOTEBOOKS_NEED = {"jupyterlab", "scikit-learn"}  # beside what nbdist itself needs


def read(path: Path) -> list[Requirement]:
    """The requirements in a file, without comments and options of pip."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def pin(requirement: Requirement) -> Version:
    """The one version that a requirement allows, without its local suffix."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return Version(Version(specifier.version).public)


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """Versions in binder/requirements.txt by name."""
    return {canonicalize_name(requirement.name): pin(requirement) for requirement in read(BINDER / "requirements.txt")}


@pytest.fixture(scope="module")
def python() -> str:
    """Binder's version of Python, such as 3.11."""
    return (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")


def test_repo2docker_accepts_the_repository(python):
    """Without building anything, it prints the Dockerfile that it would build, with all of ours in it."""
    done = subprocess.run(
        [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"environment for python={python}" in done.stderr
    assert 'pip install --no-cache-dir -r "binder/requirements.txt"' in done.stdout
    assert "RUN ./binder/postBuild" in done.stdout
    assert 'ENTRYPOINT="${REPO_DIR}/binder/start"' in done.stdout


def test_python_build_pack(monkeypatch):
    """Of its build packs, repo2docker takes the one that reads requirements.txt."""
    from repo2docker.app import Repo2Docker

    monkeypatch.chdir(ROOT)
    app = Repo2Docker()
    taken = next(pack for pack in app.buildpacks if pack(app.base_image).detect())
    assert taken.__name__ == "PythonBuildPack"


def test_kernel_knows_the_cell_of_a_background_thread(pins):
    """Binder's default kernel, 7.0, loses it."""
    assert Version("7.1") <= pins["ipykernel"]


def test_pins_are_those_of_constraints(pins, python):
    """Binder runs the versions that are tested."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    tested = {
        canonicalize_name(requirement.name): pin(requirement)
        for requirement in read(ROOT / "constraints.txt")
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    assert {name: tested[name] for name in pins} == pins


def test_everything_needed_is_pinned(pins):
    """postBuild installs nbdist without its dependencies, so requirements.txt must list all of them."""
    needed = [Requirement(line) for line in requires("nbdist") or []]
    own = {canonicalize_name(requirement.name) for requirement in needed if requirement.marker is None}
    assert own | _NOTEBOOKS_NEED == set(pins)


def test_torch_is_the_cpu_build():
    """The CUDA build is too large."""
    text = (BINDER / "requirements.txt").read_text()
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in text
    assert "+cpu" in next(line for line in text.splitlines() if line.startswith("torch=="))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bit")
@pytest.mark.parametrize("script", ["postBuild", "start"])
def test_scripts_are_executable(script):
    """Binder runs them as they are."""
    assert os.access(BINDER / script, os.X_OK)
    assert (BINDER / script).read_text().startswith("#!/usr/bin/env bash")
