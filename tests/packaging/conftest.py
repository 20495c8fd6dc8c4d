"""The Debian package, built once for all tests."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
BUILD_DEADLINE = 170.0


def build(directory, source=SOURCE, **env):
    """The package as `make deb` makes it."""
    pip = Path(sys.executable).with_name("pip")
    argv = ["sh", source / "packaging" / "build-deb", pip, directory]
    subprocess.run(argv, check=True, timeout=BUILD_DEADLINE, env={**os.environ, **env})
    (package,) = directory.glob("pool-agent_*.deb")
    return package


@dataclass(frozen=True)
class Unpacked:
    """The package, and what is in it as if / were `tree`."""

    package: Path
    tree: Path

    @property
    def home(self):
        return self.tree / "usr" / "lib" / "pool-agent"

    def program(self, name):
        return [self.home / "bin" / "python3", "-I", self.home / "bin" / name]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    directory = tmp_path_factory.mktemp("package")
    # Packing takes as long as all the rest.
    package = build(directory / "dist", DPKG_DEB_COMPRESSOR_TYPE="none")
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "--extract", package, tree], check=True, timeout=60)
    (tree / "usr" / "bin" / "python3").symlink_to("/usr/bin/python3")
    yield Unpacked(package, tree)
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The package as members get it."""
    return build(tmp_path_factory.mktemp("whole"))
