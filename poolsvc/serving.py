"""The listening process: which services there are, what each shows and for whom, and what runs beside them."""

import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from poolsvc.config import Settings
from poolsvc.gate import Gate
from poolsvc.listener import Listeners, Server, Service
from poolsvc.metrics import Metrics
from poolsvc.web_tls import AcmeCertificate, CertificateFiles, PlainHttp, WebCertificate

Duty = Callable[[], Coroutine[Any, Any, None]]

# Requests whose callers have gone still have to end: as many as there can be connections, of both services.
_REQUESTS = 2000


def create_server(
    settings: Settings,
    app: FastAPI,
    listening: Sequence[socket.socket],
    plain: Sequence[socket.socket],
    beside: Sequence[Duty] = (),
) -> Server:
    """The API on the sockets `listening`; with a certificate by ACME also the CA's questions on `plain`. `beside` runs
    as long.

    Raises OSError or ChainError when the certificate's files cannot be used.
    """
    metrics = app.state.metrics
    assert isinstance(metrics, Metrics)
    health = metrics.health
    certificate = WebCertificate(health)
    has_tls = settings.certificate_file is not None
    config = _config(app, lifespan="on")
    api = Listeners(
        config,
        tls=(lambda: certificate.context) if has_tls else None,
        trusted_proxies=settings.trusted_proxies,
    )
    metrics.add_listeners("api", api)
    services = [Service(api, listening, certificate.ready if has_tls else None)]
    duties = list(beside)
    if settings.web_tls.acme:
        acme = AcmeCertificate(settings, certificate, health)
        duties.append(acme.run)
        questions = Gate(PlainHttp(acme.challenges, settings.public_url), metrics, ())
        http = Listeners(_config(questions, lifespan="off"))
        metrics.add_listeners("http", http)
        services.append(Service(http, plain))
    elif settings.tls_certificate is not None and settings.tls_key is not None:
        duties.append(CertificateFiles(certificate, settings.tls_certificate, settings.tls_key).follow)
    return Server(config, services, stopping=health.stopping, stop_delay=settings.stop_delay, duties=duties)


def _config(app: ASGIApp, *, lifespan: Any) -> uvicorn.Config:
    # What uvicorn would warn of is what strangers do wrong, one line for each; the listeners count it.
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan=lifespan,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_REQUESTS,
        timeout_graceful_shutdown=5,
    )
