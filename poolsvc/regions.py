"""Regions of a pool: the world, continents and countries, as labels in DNS. Pure.

The label of a country is its ISO 3166-1 code in lower case. Continents are those by which people name them; a country that
lies on two is counted where most of it is or most of its people are.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

WORLD = ""
"""The label of the pool itself, which every server belongs to."""

_COUNTRIES = {
    "africa": (
        "ao bf bi bj bw cd cf cg ci cm cv dj dz eg eh er et ga gh gm gn gq gw io ke km lr ls ly ma mg ml mr mu mw mz"
        " na ne ng re rw sc sd sh sl sn so ss st sz td tf tg tn tz ug yt za zm zw"
    ),
    "antarctica": "aq bv gs hm",
    "asia": (
        "ae af am az bd bh bn bt cc cn cx cy ge hk id il in iq ir jo jp kg kh kp kr kw kz la lb lk mm mn mo mv my np om"
        " ph pk ps qa sa sg sy th tj tl tm tr tw uz vn ye"
    ),
    "europe": (
        "ad al at ax ba be bg by ch cz de dk ee es fi fo fr gb gg gi gr hr hu ie im is it je li lt lu lv mc md me mk mt"
        " nl no pl pt ro rs ru se si sj sk sm ua va xk"
    ),
    "north-america": (
        "ag ai aw bb bl bm bq bs bz ca cr cu cw dm do gd gl gp gt hn ht jm kn ky lc mf mq ms mx ni pa pm pr sv sx tc tt"
        " us vc vg vi"
    ),
    "oceania": "as au ck fj fm gu ki mh mp nc nf nr nu nz pf pg pn pw sb tk to tv um vu wf ws",
    "south-america": "ar bo br cl co ec fk gf gy pe py sr uy ve",
}
CONTINENTS = frozenset(_COUNTRIES)
CONTINENT_OF: Mapping[str, str] = MappingProxyType(
    {country: continent for continent, countries in _COUNTRIES.items() for country in countries.split()}
)
"""By the label of a country that of its continent."""
REGIONS = CONTINENTS | CONTINENT_OF.keys()
"""All that a pool may have a name for, the world aside."""


def wider(label: str) -> str:
    """The region around one: of a country its continent, of a continent the world."""
    return CONTINENT_OF.get(label, WORLD)


def regions_of(countries: Iterable[str]) -> frozenset[str]:
    """All regions of a server in these countries (ISO 3166-1, in capitals), the world aside."""
    labels = {country.lower() for country in countries} & CONTINENT_OF.keys()
    return frozenset(labels | {CONTINENT_OF[label] for label in labels})
