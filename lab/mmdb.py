"""Small files in MaxMind's format, as vendors of networks and countries publish large ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdb_writer import MMDBWriter
from netaddr import IPSet


def write(path: Path, records: Mapping[str, Any], *, ip_version: int = 6) -> Path:
    """A file with a record for each network, put in the place of the one that is there."""
    writer = MMDBWriter(ip_version=ip_version, ipv4_compatible=ip_version == 6, database_type="Laboratory")
    for network, record in records.items():
        writer.insert_network(IPSet([network]), record)
    new = path.with_suffix(".new")
    writer.to_db_file(str(new))
    return new.replace(path)
