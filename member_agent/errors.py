"""How the agent fails: one exception with a remedy, and one enum of exit statuses."""

from enum import IntEnum

from nts_core.errors import printable


class ExitStatus(IntEnum):
    """How `pool-agent` ends."""

    OK = 0
    USAGE = 2
    CONFIGURATION = 3  # a file, an address or an option that cannot be used
    CERTIFICATE = 4  # certificate and key unreadable, or not a pair
    REGISTRY = 5  # the registry is out of reach or refuses
    STATE = 6  # the state directory is unusable, or holds no membership
    REMOVED = 7  # the server has left the pool
    ENGINE = 8  # what answers NTS-KE and NTP does not serve what it should
    CHECK = 9  # `pool-agent check` found something wrong
    LOCKED = 10  # another agent uses the state directory
    NO_ROOM = 11  # the state directory's disk is full, of which the system may know better soon


class AgentError(Exception):
    """What happened, what to do about it, and how the program ends if nobody handles it."""

    def __init__(self, message: str, remedy: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.status = status

    def told(self) -> str:
        """For people, in two lines."""
        return f"error: {printable(self.message, None)}\n  {printable(self.remedy, None)}"
