"""Another user of the host looks for the ranks' secret: in their files, behind their socket, in what /proc tells."""

import os
import shutil
import subprocess
import sys

from victim import attack, meeting_file

NOBODY = 65534
PROGRAM = """
import os, socket, sys
secret, pid = sys.argv[1], sys.argv[2]

def connect():
    socket.socket(socket.AF_UNIX).connect(secret + ".socket")

tries = {
    "read the secret": lambda: open(secret, "rb").read(),
    "list where it lies": lambda: os.listdir(os.path.dirname(secret)),
    "put another in its place": lambda: os.rename(secret, secret + ".old"),
    "connect to rank 0": connect,
    "read the environment of a rank": lambda: open(f"/proc/{pid}/environ", "rb").read(),
    "read the memory of a rank": lambda: open(f"/proc/{pid}/mem", "rb").read(1),
    "open what a rank holds open": lambda: os.listdir(f"/proc/{pid}/fd"),
}
for what, do in tries.items():
    try:
        do()
    except PermissionError:
        continue
    except OSError as error:
        print(f"{what}: {error!r}")
        continue
    print(what)
"""


def look(_address: str, _port: int) -> str:
    secret = meeting_file()
    if not secret.with_suffix(".socket").exists():
        sys.exit("NOT TRIED: rank 0 has no socket where it was looked for")
    done = as_nobody(PROGRAM, str(secret), str(os.getpid()))
    if done.returncode or done.stdout:
        sys.exit(f"NOT REFUSED: another user could {done.stdout or done.stderr}")
    return "another user may not even look"


def as_nobody(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable  # ours may lie in a home
    command = [python, "-c", program, *arguments]
    try:
        return subprocess.run(
            command,
            check=False,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
        )
    except PermissionError as error:
        sys.exit(
            f"SKIPPED: only root can start a process of another user, and only a Python that it may start: {error}"
        )


attack(look)
