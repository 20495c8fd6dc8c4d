"""What the API refuses, as exceptions: a status, a stable code, a sentence, and a remedy (RFC 9457)."""

import math
from collections.abc import Mapping
from datetime import timedelta
from http import HTTPStatus
from types import MappingProxyType


class PoolError(Exception):
    """A request that cannot be fulfilled. `field` names the offending part of the input, if one does."""

    status = HTTPStatus.BAD_REQUEST
    code = "bad-request"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str, *, remedy: str = "", field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy
        self.field = field


class Unauthenticated(PoolError):
    status = HTTPStatus.UNAUTHORIZED
    code = "unauthenticated"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class TokenExpired(Unauthenticated):
    code = "token-expired"


class TokenUsed(Unauthenticated):
    code = "token-used"


class SignInInvalid(Unauthenticated):
    """A link or a way back from a provider that proves nothing; why is not told apart."""

    code = "sign-in-invalid"


class Forbidden(PoolError):
    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class MemberBlocked(Forbidden):
    code = "member-blocked"


class InvitationNeeded(Forbidden):
    code = "invitation-needed"


class SignUpNeeded(Forbidden):
    """Somebody who proved who they are, and has no account."""

    code = "sign-up-needed"


class TermsNotAccepted(Forbidden):
    code = "terms-not-accepted"


class NotFound(PoolError):
    status = HTTPStatus.NOT_FOUND
    code = "not-found"


class Gone(PoolError):
    """The server has left the pool; an agent that reads this stops."""

    status = HTTPStatus.GONE
    code = "removed"


class InvalidName(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-name"


class ReservedName(InvalidName):
    code = "reserved-name"


class ConfusableName(InvalidName):
    """People would take the name for another one."""

    code = "confusable-name"


class InvalidEmail(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-email"


class InvalidRegion(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-region"


class NameTaken(PoolError):
    status = HTTPStatus.CONFLICT
    code = "name-taken"


class IdentityTaken(PoolError):
    status = HTTPStatus.CONFLICT
    code = "identity-taken"


class ProviderFailed(PoolError):
    """An OpenID provider is away, or says what cannot be believed."""

    status = HTTPStatus.BAD_GATEWAY
    code = "provider-failed"


class InvalidAddress(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-address"


class AddressRefused(InvalidAddress):
    """The address is of a network that wants nothing from this pool."""

    code = "address-refused"


class AddressTaken(PoolError):
    status = HTTPStatus.CONFLICT
    code = "address-taken"


class AddressMismatch(PoolError):
    """A proof was called for from another address than the one it is about."""

    status = HTTPStatus.CONFLICT
    code = "address-mismatch"


class PreconditionFailed(PoolError):
    """What was to be changed is not any more what the caller has read."""

    status = HTTPStatus.PRECONDITION_FAILED
    code = "precondition-failed"


class TooManyRequests(PoolError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too-many-requests"

    def __init__(
        self, detail: str, *, remedy: str = "", field: str | None = None, retry_after: timedelta | None = None
    ) -> None:
        super().__init__(detail, remedy=remedy, field=field)
        if retry_after is not None:
            self.headers = {"Retry-After": str(max(1, math.ceil(retry_after.total_seconds())))}


class RateLimited(TooManyRequests):
    code = "rate-limited"
    headers = MappingProxyType({"Retry-After": "1"})


class InvalidIdempotencyKey(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-idempotency-key"


class IdempotencyMismatch(PoolError):
    status = HTTPStatus.CONFLICT
    code = "idempotency-mismatch"


class InvalidCsr(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-csr"


class InvalidDocument(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-document"


class WrongState(PoolError):
    """The state of what the request is about does not allow it."""

    status = HTTPStatus.CONFLICT
    code = "wrong-state"


class LastOwner(PoolError):
    """A member would be left without an owner, or the pool without an operator."""

    status = HTTPStatus.CONFLICT
    code = "last-owner"


class LimitReached(PoolError):
    """As many as the pool's policy allows are there already."""

    status = HTTPStatus.CONFLICT
    code = "limit-reached"


class OfferOver(PoolError):
    """An invitation or the offer of a server that was accepted, taken back or has expired."""

    status = HTTPStatus.GONE
    code = "offer-over"


class InvalidCursor(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-cursor"


class InvalidUrl(PoolError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid-url"
