"""What a client has of a server of this host, which has to show one certificate and no other."""

import secrets

from member_agent.sockets import Endpoint
from nts_core.association import Association, Sample
from nts_core.client import STARTING, ClientError, Failure, establish, exchange, ntp_address
from nts_core.errors import KissOfDeath
from nts_core.tls import Pin


async def ask(domain: str, fingerprint: str, ke: Endpoint) -> Sample | None:
    """Key establishment and one exchange; None from a server that has just begun, does not know the time yet, and says
    so by its keys. Raises ClientError.
    """
    address = ke.address
    if ke.is_wildcard:
        address = "::1" if ":" in address else "127.0.0.1"
    established = await establish(domain, address, ke.port, Pin(fingerprint))
    association = Association(established.result, secrets.token_bytes)
    try:
        return await exchange(association, await ntp_address(established), established.ntp_port)
    except KissOfDeath as kiss:
        if kiss.authentic and kiss.code in STARTING:
            return None
        raise ClientError(Failure.KISS, str(kiss)) from None
