"""How the agent fails: one exception with a remedy, and one enum of exit statuses."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """How `pool-agent` ends."""

    OK = 0
    USAGE = 2
    CONFIGURATION = 3  # a file, an address or an option that cannot be used
    CERTIFICATE = 4  # certificate and key unreadable, or not a pair
    REGISTRY = 5  # the registry is out of reach or refuses
    STATE = 6  # the state directory is unusable, locked, or holds no membership
    REMOVED = 7  # the server has left the pool


class AgentError(Exception):
    """What happened, what to do about it, and how the program ends if nobody handles it."""

    def __init__(self, message: str, remedy: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.status = status
