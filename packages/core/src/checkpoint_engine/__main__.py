"""`python -m checkpoint_engine` is the same as the `checkpoint-engine` command; with `--uds S` alone, as upstream's."""

import sys

from checkpoint_engine.cli.main import main

_UDS = "--uds"

if any(argument == _UDS or argument.startswith(f"{_UDS}=") for argument in sys.argv[1:2]):
    # Whoever reaches the socket is this user, who may read all files that this process may read.
    sys.argv[1:] = ["serve", "--allow-root", "/", *sys.argv[1:]]

main()
