"""The laboratory: real peers (Pebble, Knot, BIND, PowerDNS, NSD, unbound, PostgreSQL, chrony, NTPsec,
ntpd-rs) and our own programs,
started on loopback for the demo, the tests and the benches. Not part of the installed distribution.

Each peer lives in a directory of its own, runs in the foreground as a child of this process, and is ended
by its process id. Nothing here sends traffic anywhere but to loopback.
"""
