"""`python -m lab.crates FILE`: the terms and licence texts of all crates whose code is in the packet engine.

They want to go wherever a copy of it goes: `engine/pyproject.toml` takes FILE into the wheel.
"""

import json
import subprocess
import sys
from pathlib import Path

_ENGINE = Path(__file__).resolve().parent.parent / "engine"
_HEAD = "The module holds code of Rust's standard library (MIT OR Apache-2.0) and of these crates:"
_TEXTS = ("licen", "copying", "copyright", "notice")


def _cargo(*arguments: str) -> str:
    argv = ["cargo", *arguments, "--locked"]
    return subprocess.run(argv, cwd=_ENGINE, check=True, stdout=subprocess.PIPE, text=True).stdout


def _linked() -> set[tuple[str, str]]:
    """Name and version of each crate that is no macro and no tool of the build, without our own."""
    lines = _cargo("tree", "--edges", "normal,no-proc-macro", "--prefix", "none").splitlines()[1:]
    return {(name, version.removeprefix("v")) for name, version, *_ in map(str.split, lines)}


def document() -> str:
    """First each crate with its terms, then each text once, with the crates that it came with."""
    linked = _linked()
    crates: list[str] = []
    texts_by_words: dict[str, tuple[str, list[str]]] = {}
    for package in json.loads(_cargo("metadata", "--format-version", "1"))["packages"]:
        if (package["name"], package["version"]) not in linked:
            continue
        crate = f"{package['name']} {package['version']}"
        if not package["license"]:
            raise SystemExit(f"error: {crate} does not name its terms")
        texts = [
            path
            for path in sorted(Path(package["manifest_path"]).parent.iterdir())
            if path.name.lower().startswith(_TEXTS) and path.is_file()
        ]
        crates.append(f"{crate}: {package['license']}" + ("" if texts else ", without a text"))
        for path in texts:
            text = path.read_text(encoding="utf-8").strip()
            _, who = texts_by_words.setdefault(" ".join(text.split()), (text, []))
            who.append(f"{crate} ({path.name})")
    rule = "\n\n" + "=" * 80 + "\n\n"
    parts = [f"{', '.join(who)}:\n\n{text}" for text, who in texts_by_words.values()]
    return rule.join(["\n".join([_HEAD, "", *sorted(crates)]), *parts]) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(document(), encoding="utf-8")
