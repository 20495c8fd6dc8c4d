"""A provider of OpenID Connect on loopback: npm's `oidc-provider`, which is certified for it."""

import json
import secrets
import shutil
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx

from lab.certificates import Authority
from lab.processes import LabError, Process, free_port

_HERE = Path(__file__).parent / "oidc"
_TIMEOUT = 10
_MAX_STEPS = 10


def has_node() -> bool:
    return shutil.which("node") is not None


class OidcProvider:
    """A provider with one client, which is `client_id` and `client_secret`.

    `accounts` are the claims of the people whom it knows, by their subjects. It keeps no state over restarts.
    """

    def __init__(
        self, directory: Path, *, redirect_uri: str, accounts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        if not (_HERE / "node_modules").is_dir():
            raise LabError("oidc-provider is not installed; run `make setup`")
        authority = Authority(directory)
        pair = authority.issue("localhost")
        port = free_port()
        self.issuer = f"https://localhost:{port}"
        self.client_id, self.client_secret = "truechimer", secrets.token_urlsafe(24)
        self.ca_file = authority.root
        self._tls = ssl.create_default_context(cafile=str(authority.root))
        self._redirect_uri = redirect_uri
        settings = {
            "issuer": self.issuer,
            "port": port,
            "certificate": str(pair.cert),
            "key": str(pair.key),
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "redirect_uri": redirect_uri,
            "accounts": accounts,
        }
        config = directory / "provider.json"
        config.write_text(json.dumps(settings))
        self.process = Process("oidc-provider", ["node", str(_HERE / "provider.mjs"), str(config)], directory)

    def visit(self, url: str, account: str) -> dict[str, str]:
        """Be `account`'s browser: from the authorization URL to what comes back in the redirect to the client."""
        with httpx.Client(verify=self._tls, timeout=_TIMEOUT, trust_env=False) as browser:
            for _ in range(_MAX_STEPS):
                answer = browser.get(url)
                if not answer.has_redirect_location:
                    break
                url = str(answer.url.join(answer.headers["location"]))
                if url.startswith(self._redirect_uri):
                    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
                if urlsplit(url).path.startswith("/interaction/"):
                    url = f"{url}?account={account}"
        raise LabError(f"the provider did not send {account} back: {answer.status_code} {answer.text[:500]}")

    def start(self) -> Self:
        self.process.start(self._answers)
        return self

    def stop(self) -> None:
        self.process.stop()

    def _answers(self) -> bool:
        try:
            httpx.get(
                f"{self.issuer}/.well-known/openid-configuration",
                verify=self._tls,
                timeout=_TIMEOUT,
                trust_env=False,
            ).raise_for_status()
        except httpx.TransportError:
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
