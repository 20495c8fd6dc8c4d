"""Octets that nobody sane would send, for everything that reads octets; see CONTRIBUTING.md.

`targets` has the table of what is fuzzed, `target` what a target is. `python -m fuzz` runs them with atheris
(libFuzzer's engine, guided by coverage) or replays the corpus without it.
"""
