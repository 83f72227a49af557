"""Builds sdist and wheel, installs the wheel into an empty environment, and looks at what came out.

`python -m tests.check_packaging DIRECTORY`; it needs `build` and `twine` and works in that directory.
"""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backends", "storage_provider")

INSTALLED_CHECK = """
import importlib, importlib.metadata, importlib.util, pkgutil, sys
distribution = importlib.metadata.distribution("enhanced-s3-storage-provider")
assert distribution.version == "2.0.0.dev0", distribution.version
assert importlib.util.find_spec("s3_storage_provider"), "s3_storage_provider is not there"
assert importlib.util.find_spec("storage_provider"), "storage_provider is not there"
assert not importlib.util.find_spec("psycopg2"), "a driver would be written over that of Synapse"
import backends
for module in pkgutil.walk_packages(backends.__path__, "backends."):
    importlib.import_module(module.name)
above = {"twisted", "synapse", "click", "storage_provider"} & {name.partition(".")[0] for name in sys.modules}
assert not above, f"backends imports {above}"
"""


def main() -> None:
    directory = Path(sys.argv[1])
    distributions = directory / "dist"
    # The wheel is built from the sdist, so whatever the sdist lacks is missed here.
    run(sys.executable, "-m", "build", "--outdir", distributions, ROOT)
    [sdist], [wheel] = distributions.glob("*.tar.gz"), distributions.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)

    name, version = wheel.name.split("-")[:2]
    expected = {"s3_storage_provider.py", f"{name}-{version}.data/scripts/s3_media_upload"}
    for package in PACKAGES:
        files = (path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        report("wheel", expected, {name for name in archive.namelist() if ".dist-info/" not in name})
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    sources = {path.replace(f"{name}-{version}.data/", "") for path in expected}
    report("sdist", sources | tests | {"LICENSE", "tox.ini", "docs/local-cache.md"}, members, exactly=False)

    environment = directory / "venv"
    venv.create(environment, clear=True, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    run(python, "-m", "pip", "check")
    # Isolated and elsewhere, so that the checkout cannot stand in for what is not installed.
    run(python, "-I", "-W", "error", "-c", INSTALLED_CHECK, cwd=directory)
    run(environment / "bin" / "s3_media_upload", "sync", "--help", cwd=directory)
    print(f"{wheel.name}: built, checked, installed and imported")


def report(what: str, expected: set[str], found: set[str], *, exactly: bool = True) -> None:
    complaints = [f"lacks {name}" for name in sorted(expected - found)]
    if exactly:
        complaints += [f"should not have {name}" for name in sorted(found - expected)]
    if complaints:
        sys.exit(f"the {what} " + ", ".join(complaints))


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main()
