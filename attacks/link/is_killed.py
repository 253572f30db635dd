"""A worker process that is let in and killed in the middle of the update (SIGKILL): nobody says goodbye."""

import socket
import subprocess
import sys

from victim import attack_with_token

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel


def wait_for_answer(channel: SenderChannel) -> None:
    channel.receive(Deadline(60.0), "the worker accepting")


def attack(worker: socket.socket) -> None:
    sleep = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
    with subprocess.Popen(sleep, pass_fds=[worker.fileno()], stdout=subprocess.PIPE) as child:
        worker.close()
        child.stdout.readline()
        child.kill()


attack_with_token(attack, wait_for_answer)
