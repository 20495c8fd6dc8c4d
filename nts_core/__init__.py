"""Network Time Security for NTP (RFC 8915) and the words that Truechimer's parts share.

Everything here but `client`, `resolve`, `shell` and `cli` is pure: bytes, times and randomness are arguments.
"""
