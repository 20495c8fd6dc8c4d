"""The embedded authoritative DNS server: one signed zone, changed by RFC 2136 updates, transferred to secondaries.

It knows nothing of pools. The publisher treats it like any other primary.
"""
