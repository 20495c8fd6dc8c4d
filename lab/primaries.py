"""The kinds of primaries and of secondaries, by name: what holds for one must hold for all."""

from collections.abc import Mapping
from types import MappingProxyType

from lab.bind import Bind, BindSecondary
from lab.embedded import Embedded
from lab.knot import Knot, KnotSecondary
from lab.nameservers import Primary, Secondary
from lab.nsd import Nsd
from lab.powerdns import PowerDns

PRIMARIES: Mapping[str, type[Primary]] = MappingProxyType(
    {"knot": Knot, "bind": Bind, "powerdns": PowerDns, "embedded": Embedded}
)
SECONDARIES: Mapping[str, type[Secondary]] = MappingProxyType(
    {"knot": KnotSecondary, "bind": BindSecondary, "nsd": Nsd}
)
