"""The process that atheris takes over: `python -m fuzz.engine TARGET OPTION...`, started by `python -m fuzz`.

What is under test is instrumented as it is imported, hence a process of its own. libFuzzer's options and its exit
status pass through; an exception that a target lets through ends the process.
"""

import sys

import atheris

_OURS = ("nts_core", "member_agent", "poolsvc", "fuzz")
# Libraries that parse hostile octets in Python; only where they do, as it takes seconds to instrument them.
_LIBRARIES = {"dns": ("dns",), "trust-anchors": ("dns",), "http": ("h11",)}


def main(arguments: list[str]) -> None:
    name, *options = arguments
    with atheris.instrument_imports(include=[*_OURS, *_LIBRARIES.get(name, ())]):
        from fuzz.targets import CANARY, TARGETS  # noqa: PLC0415 - only what is imported here is instrumented
    target = CANARY if name == CANARY.name else TARGETS[name]

    def run(data: bytes) -> None:
        target.run(data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        assert target.layout is not None
        return target.layout.mutate(bytes(data), longest, seed, atheris.Mutate)

    atheris.Setup([name, *options], run, custom_mutator=mutate if target.layout is not None else None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
