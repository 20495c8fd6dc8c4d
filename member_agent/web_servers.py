"""What a web server that holds port 80 has to say so that the CA finds the registry: a block of its own for one name.

Other names and the rest of the configuration are not touched, and nothing but the challenge is redirected.
"""

from enum import StrEnum
from string import Template

from nts_core.control import ACME_PATH


class WebServer(StrEnum):
    """Those whose configuration we know."""

    NGINX = "nginx"
    CADDY = "caddy"
    APACHE = "apache"


_NGINX = """\
# nginx: a file of its own in /etc/nginx/conf.d, then `nginx -t && systemctl reload nginx`
server {
    listen $port;
    listen [::]:$port;
    server_name $domain;
    location $path {
        return 302 $registry$$request_uri;
    }
    location / {
        return 404;
    }
}
"""

_CADDY = """\
# Caddy: at the end of /etc/caddy/Caddyfile, then `systemctl reload caddy`
http://$domain:$port {
\tredir $path* $registry{uri} 302
\trespond 404
}
"""

_APACHE = """\
# Apache: a file of its own in /etc/apache2/sites-enabled, then `apachectl configtest && systemctl reload apache2`
<VirtualHost *:$port>
    ServerName $domain
    RedirectMatch 302 "^$path(.*)$$" "$registry$path$$1"
    RedirectMatch 404 "^/(?!.well-known/acme-challenge/)"
</VirtualHost>
"""

_BLOCKS = {WebServer.NGINX: _NGINX, WebServer.CADDY: _CADDY, WebServer.APACHE: _APACHE}


def block(server: WebServer, domain: str, registry: str, port: int = 80) -> str:
    """The lines for a domain; `registry` is the address that was joined."""
    return Template(_BLOCKS[server]).substitute(domain=domain, registry=registry, port=port, path=ACME_PATH)
