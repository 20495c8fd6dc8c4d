"""What tests of running servers share: an authority, a certificate of it, and trust in it."""

import os
from datetime import UTC, datetime

import pytest
import structlog
from cryptography import x509

from lab.certificates import Authority
from nts_core.tls import Trust


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command that was run in this process has set it up for a standard error that is closed by now."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue("ntp.example", "127.0.0.1", "::1")


@pytest.fixture(scope="module")
def trust(authority):
    return Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))


@pytest.fixture
def open_path(tmp_path):
    """A directory that other users may pass on the way to it."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o011)
    return tmp_path
