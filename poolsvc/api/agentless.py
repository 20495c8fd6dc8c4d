"""What members without our agent do by hand, or by a program of their own: prove addresses, name an ACME account."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field

from nts_core.control import PROOF_PATH
from poolsvc import own_account, proofs
from poolsvc.api.idempotent import idempotent
from poolsvc.api.lookup import server_for
from poolsvc.api.request import (
    AddressPath,
    Document,
    Line,
    NamePath,
    NowDep,
    PrincipalDep,
    ServicesDep,
    SessionDep,
    SourceDep,
)
from poolsvc.api.servers import AddressView, ServerView, address_view, changed_view
from poolsvc.auth import Operation

router = APIRouter(prefix="/v1")


class ProofWish(Document):
    address: Line = Field(max_length=45, description="the address that the request comes from")


class ProofFile(Document):
    """What has to be served on the address, over HTTP on the pool's HTTP port."""

    address: str
    path: str
    content: str = Field(description="the whole body of the answer")
    looked_for_at: datetime = Field(
        description="when the registry looks, unless told earlier that it is there"
    )


class AccountWish(Document):
    account_uri: Line = Field(max_length=1000, description="the account at the pool's CA that is to order")


@router.post("/servers/{name}/proofs", status_code=201)
@idempotent
async def begin_proof(
    name: NamePath,
    body: ProofWish,
    source: SourceDep,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ProofFile:
    """Prove an address, from that address: the registry then connects to it and expects the content at the path."""
    server = await server_for(session, principal, name, Operation.PROVE_ADDRESS, staying=True)
    own_account.require_agentless(server)
    nonce = await proofs.call(session, services.settings, server, body.address, source, now)
    name_of_file, content = proofs.file_of(nonce)
    return ProofFile(
        address=body.address,
        path=PROOF_PATH + name_of_file,
        content=content,
        looked_for_at=proofs.look_at(services.settings, now),
    )


@router.post("/servers/{name}/proofs/{address}/ready", status_code=202)
async def end_proof(
    name: NamePath,
    address: AddressPath,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> AddressView:
    """The content is there: the registry looks at once."""
    server = await server_for(session, principal, name, Operation.PROVE_ADDRESS, staying=True)
    own_account.require_agentless(server)
    return address_view(services.settings, proofs.ready(server, address, now))


@router.put("/servers/{name}/acme-account")
async def name_account(
    name: NamePath,
    body: AccountWish,
    principal: PrincipalDep,
    services: ServicesDep,
    session: SessionDep,
    now: NowDep,
) -> ServerView:
    """The account at the CA that may order for the server's name; `may_order_at` then says from when on."""
    server = await server_for(session, principal, name, Operation.CHANGE_SERVER, staying=True)
    own_account.require_agentless(server)
    own_account.choose(services.settings, server, body.account_uri)
    return await changed_view(session, services, server, now)
