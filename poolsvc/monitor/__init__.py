"""A vantage point: probes servers for a registry that may be far away, and tells it what it found (ADR 52).

It needs no database and opens no port but that of its metrics. It pulls work and pushes results; what it says counts only
while its own clock and network are good by independent references.
"""
