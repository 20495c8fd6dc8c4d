"""What can go wrong in the protocol, as exceptions that carry the protocol's own words.

Rules: parsing and verification raise; what becomes of a single datagram on a server is a value (`server.Drop`),
because bad packets are normal there. The strategy is h11's: a caller can tell whose fault it was.
"""

DETAIL_LIMIT = 1000  # characters of a peer's own words that are kept


def printable(text: str, limit: int | None = DETAIL_LIMIT) -> str:
    """Words of somebody else, fit for one line of a log or a terminal: bounded, without control characters."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])


class NtsError(Exception):
    """Root of everything that `nts_core` raises on purpose."""


class WireError(NtsError):
    """Octets that do not have the form their format requires."""


class TlsError(NtsError):
    """The TLS session failed or broke off (RFC 8915 section 3)."""


class CertificateError(NtsError):
    """The peer's certificate is not acceptable for the name at the time given (RFC 8915 section 3)."""


class KeError(NtsError):
    """Key establishment failed (RFC 8915 section 4).

    `code` is the code of the Error or Warning record that the peer sent, None when it sent none.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class NoOverlap(KeError):
    """The server speaks NTS-KE but shares no protocol or AEAD algorithm with us (sections 4.1.2, 4.1.5)."""


class NotAuthentic(NtsError):
    """A datagram that is not the authentic answer to our request; to be ignored (section 5.7)."""


class KissOfDeath(NtsError):
    """The server answered with a kiss code (RFC 5905 section 7.4).

    `authentic` is False for NTSN, which no key protects: a hint at most.
    """

    def __init__(self, code: str, *, authentic: bool) -> None:
        super().__init__(f"the server answered with the kiss code {code}")
        self.code = code
        self.authentic = authentic


class OutOfCookies(NtsError):
    """Every cookie was used; key establishment has to run again (section 5.7)."""
