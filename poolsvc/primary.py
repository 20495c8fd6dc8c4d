"""The primary as everybody knows it who talks to it: where it is, and what goes wrong there, in words."""

import base64
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dns.exception
import dns.message
import dns.rcode
import dns.tsig

_SECRET_OCTETS = 32
NO_DRAW = "-"
"""What a nameserver's marker says (`poolsvc.subsets`) that answers from the zone alone."""
UNMET = frozenset(
    {dns.rcode.NXRRSET, dns.rcode.YXRRSET, dns.rcode.NXDOMAIN, dns.rcode.YXDOMAIN}
)  # prerequisites


class PublishError(Exception):
    """The zone is not as wanted; `code` is stable, the text is for the operator and holds no secret."""

    code = "publish"


class Fenced(PublishError):
    """Another leader with another epoch writes the zone; this one must stop."""

    code = "fenced"


class Conflict(PublishError):
    """The zone was not as observed; observe again."""

    code = "conflict"


class Rejected(PublishError):
    """The primary will not do this however often it is asked: key, clock, rights or content."""

    code = "rejected"


class Unreachable(PublishError):
    """No usable answer in time; asking later may help."""

    code = "unreachable"


@dataclass(frozen=True, slots=True)
class Nameserver:
    """An authoritative server as clients reach it."""

    address: str
    port: int = 53

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryConfig:
    """Where updates go and which servers must then show them; `tsig_secret` is base64.

    `timeout` bounds the exchange of one question and one answer, `transfer_timeout` a whole AXFR (seconds). With
    `notify` the nameservers are told of each change beside the primary, which may take its time (Knot: a second).
    """

    address: str
    port: int
    tsig_name: str
    tsig_secret: str = field(repr=False)
    tsig_algorithm: str = "hmac-sha256"
    nameservers: tuple[Nameserver, ...]
    timeout: float = 5.0
    transfer_timeout: float = 120.0
    notify: bool = False


_REASONS = {
    dns.rcode.REFUSED: ": it does not grant the TSIG key this",
    dns.rcode.NOTAUTH: ": it does not know the TSIG key, the secrets or the clocks differ, or it has no such zone",
}


def refusal(rcode: dns.rcode.Rcode) -> PublishError:
    """The error for an answer of the primary: a prerequisite that failed, a passing fault, or a refusal."""
    text = f"the primary answers {dns.rcode.to_text(rcode)}{_REASONS.get(rcode, '')}"
    if rcode in UNMET:
        return Conflict(text)
    if rcode == dns.rcode.SERVFAIL:
        return Unreachable(text)
    return Rejected(text)


def new_secret() -> str:
    """For a TSIG key: 256 random bits in base64."""
    return base64.b64encode(secrets.token_bytes(_SECRET_OCTETS)).decode("ascii")


def read_secret(file: Path, least: int = 1) -> str:
    """A TSIG secret, base64 as the file has it. Raises OSError, and ValueError that names the file."""
    text = file.read_text().strip()
    try:
        secret = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"{file} holds no base64") from None
    if len(secret) < least:
        raise ValueError(f"there is no secret in {file}, or one of less than {least} octets")
    return text


@contextmanager
def primary_errors() -> Iterator[None]:
    """What dnspython and the system raise, in this module's words."""
    try:
        yield
    except dns.tsig.PeerBadKey:
        # Knot answers BADKEY to a known key that its acl does not allow the name or type as well.
        raise Rejected("the primary does not know the TSIG key, or does not grant it this") from None
    except dns.tsig.PeerBadSignature:
        raise Rejected("the primary refuses the TSIG signature: the secrets differ") from None
    except dns.tsig.PeerBadTime:
        raise Rejected("the primary refuses the TSIG time: one of the two clocks is wrong") from None
    except (
        dns.tsig.PeerError,
        dns.tsig.BadSignature,
        dns.tsig.BadTime,
        dns.tsig.BadKey,
        dns.tsig.BadAlgorithm,
        dns.message.UnknownTSIGKey,
    ) as error:
        raise Rejected(f"TSIG with the primary failed: {error}") from None
    except OSError as error:
        # Without the peer's address: alarms are public, and a primary may be hidden.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise Unreachable(reason) from error
    except (EOFError, dns.exception.Timeout) as error:
        raise Unreachable(str(error) or type(error).__name__) from error
    except dns.exception.DNSException as error:
        raise Unreachable(f"not a usable answer: {error}") from error
