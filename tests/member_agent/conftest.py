"""What tests of running servers share: an authority, a certificate of it, and trust in it."""

from datetime import UTC, datetime

import pytest
from cryptography import x509

from lab.certificates import Authority
from nts_core.tls import Trust


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue("ntp.example", "127.0.0.1", "::1")


@pytest.fixture(scope="module")
def trust(authority):
    return Trust.of(x509.load_pem_x509_certificates(authority.root.read_bytes()), datetime.now(UTC))
