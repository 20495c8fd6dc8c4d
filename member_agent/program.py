"""`pool-agent` as a process of its own: the command line, and what `run` becomes."""

import sys


def main() -> None:
    """Run either of them without what libraries load for people only.

    structlog loads these wherever they are installed, which would be 5 MB of an idle agent. Help texts find
    rich all the same.
    """
    hidden = dict.fromkeys(("rich", "greenlet"))
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is what importlib takes for not installed
    from member_agent import running  # noqa: PLC0415 - while they are hidden

    work = running.main
    if sys.argv[1:2] != [running.WORD]:
        from member_agent import cli  # noqa: PLC0415 - 2 MB that an agent that runs is to be without

        work = cli.main
    for name in hidden:
        del sys.modules[name]
    work()


if __name__ == "__main__":
    main()
