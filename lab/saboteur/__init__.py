"""A server that breaks the rules of NTS in one named way at a time, for clients to prove themselves against.

`KE_SABOTAGES` and `NTP_SABOTAGES` are the tables, in `ke` and in `ntp`: each entry has a name, a sentence (what
the server does; what the client must do), and the outcome that a client of ours has to come to. `Saboteur`, in
`server`, plays them: a real NTS-KE server over TLS and a real NTP server over UDP on an address of 127.0.0.0/8, in a
thread of their own, so that a client which blocks its own loop is found out.

What makes the proofs sharp:

1. The true answer tells a time three seconds ahead, every lie that is well sealed an hour. Who took what is seen
   in the offset.
2. `keyring` opens every cookie that was given honestly: whatever else a client keeps came from a lie.
3. Everything is counted, also plain NTP on the port that was told and, where this process may bind it, on port 123.
4. The randomness of keys, cookies, nonces and garbage comes from a seed; only TLS and the clock use their own.
"""

from lab.saboteur.ke import KE_SABOTAGES
from lab.saboteur.ntp import NTP_SABOTAGES
from lab.saboteur.server import STALL, TRUTH, Fate, Saboteur
from lab.saboteur.tls import NAME

__all__ = ["KE_SABOTAGES", "NAME", "NTP_SABOTAGES", "STALL", "TRUTH", "Fate", "Saboteur"]
