"""The two virtual environments that are compared: `OURS` and `PEER`, kept in the checkout between runs.

Both hold Synapse, in the same version, and every package that they share is of the same version too.
Standard library only: this module also runs before there is any environment.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PEER_PACKAGE = "synapse-s3-storage-provider"

_INSTALLED = """
import importlib.metadata, json, platform
names = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version(), **names}))
"""


class InstallationFailed(Exception):
    """pip or venv did not do its work; the reason stands above on stderr."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, whether or not it is there yet."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def versions(self) -> dict[str, str]:
        """The versions of all that is installed, by name in lower case, and of `python` itself."""
        done = subprocess.run([self.python, "-I", "-c", _INSTALLED], check=True, capture_output=True, text=True)
        versions: dict[str, str] = json.loads(done.stdout)
        return versions


OURS = Environment(ROOT / ".venv-bench")
"""What this package and its tests require, but not the package itself: its sources come from the checkout."""

PEER = Environment(ROOT / ".venv-bench-peer")
"""synapse-s3-storage-provider from PyPI."""


def set_up() -> None:
    """Make both environments, unless they are there with what is required now. Raises `InstallationFailed`."""
    requirements = _own_requirements()
    _set_up(OURS, requirements)
    shared = {name: version for name, version in OURS.versions().items() if name not in ("python", "pip", "setuptools")}
    # psycopg2-binary stands in for psycopg2, which has to be compiled, so nobody may look at what they depend on.
    theirs = [
        line for line in requirements if line.startswith(("boto3", "humanize", "matrix-synapse", "psycopg2", "tqdm"))
    ]
    _set_up(PEER, theirs, [f"{name}=={version}" for name, version in sorted(shared.items())], [PEER_PACKAGE])


def run(environment: Environment, module: str, arguments: Sequence[str]) -> int:
    """Run one of the checkout's modules; its exit code."""
    command = [str(environment.python), "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode


def _own_requirements() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + "\n" + setup["options.extras_require"]["test"]
    return [line.strip() for line in lines.splitlines() if line.strip()]


def _set_up(
    environment: Environment,
    requirements: Sequence[str],
    constraints: Sequence[str] = (),
    without_dependencies: Sequence[str] = (),
) -> None:
    asked = [f"# Python {sys.version}", *requirements, "# constraints", *constraints, "# alone", *without_dependencies]
    wanted = "\n".join(line.replace("\n", " ") for line in asked) + "\n"
    stamp = environment.directory / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing into {environment.directory.name} (a minute or two) …", file=sys.stderr)
    shutil.rmtree(environment.directory, ignore_errors=True)
    _call(sys.executable, "-m", "venv", environment.directory)
    listed, limits = environment.directory / "requirements.txt", environment.directory / "constraints.txt"
    listed.write_text("\n".join(requirements) + "\n")
    limits.write_text("\n".join(constraints) + "\n")
    install = (environment.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _call(*install, "-r", listed, "-c", limits)
    if without_dependencies:
        _call(*install, "--no-deps", *without_dependencies)
    stamp.write_text(wanted)


def _call(*command: str | Path) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise InstallationFailed("The installation failed; the reason is above.")
