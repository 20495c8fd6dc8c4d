"""Keeps a network namespace and hands out sockets of it: `namespace_holder.py SOCKET`, started inside by lab.peers.

Whoever connects to the UNIX socket and names a kind (an octet: socket.SOCK_STREAM or SOCK_DGRAM) gets a fresh IPv4
socket of this namespace as a descriptor. A socket stays in the namespace in which it was made, whoever uses it.
"""

import socket
import sys

_DEADLINE = 5.0


def main() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        while True:
            caller, _ = listener.accept()
            caller.settimeout(_DEADLINE)
            with caller, socket.socket(socket.AF_INET, caller.recv(1)[0]) as made:
                socket.send_fds(caller, [b"."], [made.fileno()])


if __name__ == "__main__":
    main()
