"""The systemd unit of a monitor."""

import re
from pathlib import Path
from string import Template

from poolsvc.config import ConfigError
from poolsvc.sandbox import SANDBOX

_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+-]+")
_UNIT = """\
# For /etc/systemd/system/pool-monitor.service. The user pool-monitor reads $config and the token beside it.
[Unit]
Description=Monitor of an NTS pool
After=network-online.target time-sync.target
Wants=network-online.target

[Service]
Type=notify
ExecStart=$program monitor --config $config
User=pool-monitor
UMask=0077
WatchdogSec=60
Restart=on-failure
RestartSec=10
# A wrong command line or setting does not get better by itself.
RestartPreventExitStatus=2 3
LimitNOFILE=65536
MemoryMax=2G
TasksMax=256
CapabilityBoundingSet=
ProtectHome=yes
${sandbox}SystemCallFilter=~@privileged @keyring @memlock
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def render(config: Path, program: Path) -> str:
    """The unit that runs `program`, a poolsvc. Raises ConfigError for paths that a unit would read in another way."""
    for path in (config, program):
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise ConfigError(f"{str(path)!r}: give a path of letters, digits and . _ - +")
    return Template(_UNIT).substitute(config=config, program=program, sandbox=SANDBOX)
