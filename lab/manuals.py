"""Man pages, completion and the sample of the agent's settings, from the programs' own help and settings.

What is written by hand stands in packaging/man/*.in, with a line such as @AGENT@ where the rest goes.

    python -m lab.manuals    writes packaging/man, packaging/completions and packaging/agent.toml
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from typing import Any

import typer
from pydantic import BaseModel
from typer.completion import get_completion_script  # type: ignore[attr-defined] # it is there, not in __all__
from typer.core import TyperCommand, TyperGroup

from lab.processes import LabError
from member_agent.cli import app as agent
from member_agent.config import AgentSettings
from nts_core.cli import app as client

PACKAGING = Path(__file__).parent.parent / "packaging"
SAMPLE = PACKAGING / "agent.toml"
_WIDTH = 100
_COMPLETIONS = {"bash": "bash/{}", "zsh": "zsh/_{}", "fish": "fish/{}.fish"}
_SAMPLE_HEAD = """\
# Settings of pool-agent(1), which agent.toml(5) explains. They hold from the next start of the agent.
# What is commented out here is what holds without it.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a table of agent.toml."""

    name: str
    meaning: str
    default: str | None  # in TOML; None when it has none
    allowed: str

    @property
    def variable(self) -> str:
        return f"{AgentSettings.model_config['env_prefix']}{self.name.replace('.', '__').upper()}"


def tables(
    model: type[BaseModel] = AgentSettings, name: str = ""
) -> Iterator[tuple[str, str, list[Setting]]]:
    """Each table with its meaning and its settings, the one without a name first. LabError for what has no meaning."""
    schema = model.model_json_schema()["properties"]
    below = []
    settings = []
    for key, field in model.model_fields.items():
        whole = f"{name}.{key}".removeprefix(".")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append((field.annotation, whole))
            continue
        if not field.description:
            raise LabError(f"the setting {whole} has no description")
        default = model.model_construct().model_dump(mode="json", include={key})[key]
        shown = None if default is None else json.dumps(default)
        settings.append(Setting(whole, field.description, shown, _allowed(schema[key])))
    yield name, model.__doc__ or "", settings
    for table, whole in below:
        yield from tables(table, whole)


def _allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words; nothing where it says nothing."""
    for one in (schema, *schema.get("anyOf", ())):
        match one:
            case {"enum": values}:
                return " or ".join(map(json.dumps, values))
            case {"minimum": least, "maximum": most}:
                return f"{least:,} to {most:,}"
            case {"exclusiveMinimum": least, "maximum": most}:
                return f"more than {least:,}, up to {most:,}"
            case {"minimum": least}:
                return f"{least:,} or more"
    return ""


def sample() -> str:
    """agent.toml as it is installed: every setting, each commented out."""
    lines = [_SAMPLE_HEAD]
    for name, meaning, settings in tables():
        if name:
            lines += [f"# {meaning}", f"[{name}]", ""]
        for setting in settings:
            allowed = f" ({setting.allowed})" if setting.allowed else ""
            lines += [f"# {line}" for line in wrap(f"{setting.meaning}{allowed}", _WIDTH)]
            key = setting.name.rpartition(".")[2]
            lines += [f"#{key} = {setting.default}" if setting.default else f"#{key} =", ""]
    return "\n".join(lines)


def _roff(text: str) -> str:
    """Text as it stands: no character begins a request or an escape."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("`", "")
    text = re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)
    return re.sub(r"\n\s*\n", "\n.PP\n", text)


def _settings() -> str:
    lines = []
    for name, meaning, settings in tables():
        if name:
            lines += [f".SH TABLE [{_roff(name)}]", _roff(meaning)]
        for setting in settings:
            key = setting.name.rpartition(".")[2]
            default = "no default" if setting.default is None else f"default {setting.default}"
            facts = "; ".join(filter(None, (setting.allowed, default, setting.variable)))
            lines += [".TP", f".B {_roff(key)}", _roff(setting.meaning) + ".", ".br", f"({_roff(facts)})"]
    return "\n".join(lines)


def _commands(program: TyperGroup, name: str) -> str:
    return "\n".join(_command(program, typer.Context(program, info_name=name)))


def _command(command: TyperCommand | TyperGroup, context: typer.Context) -> Iterator[str]:
    """A command and those below it, which are listed by themselves."""
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if isinstance(below, TyperCommand | TyperGroup) and not below.hidden:
                yield from _command(below, typer.Context(below, info_name=name, parent=context))
        return
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    yield from (f".SS {_roff(usage)}", _roff(command.help or ""))
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            what, meaning = record
            yield from (".TP", f".B {_roff(what)}", _roff(meaning))


def render() -> dict[Path, str]:
    """All generated files with their texts."""
    programs = {"AGENT": ("pool-agent", agent), "CLIENT": ("pool-client", client)}
    values = {"VERSION": version("truechimer"), "SETTINGS": _settings()}
    pages = {SAMPLE: sample()}
    for key, (name, program) in programs.items():
        values[key] = _commands(typer.main.get_group(program), name)
        variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
        for shell, place in _COMPLETIONS.items():
            script = get_completion_script(prog_name=name, complete_var=variable, shell=shell)
            if shell == "zsh":
                # zsh loads the file at the first completion, which is to be answered as well.
                script += f'\n_{name.replace("-", "_")}_completion "$@"'
            pages[PACKAGING / "completions" / place.format(name)] = f"{script}\n"
    for source in sorted((PACKAGING / "man").glob("*.in")):
        text = source.read_text()
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        pages[source.with_suffix("")] = text
    return pages


def main() -> None:
    for path, text in render().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
