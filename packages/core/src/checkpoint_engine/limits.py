"""How long this project waits, where one wait must outlast another; the order stands here, and a test holds it.

An update that fails is settled from the inside out: the engine's worker says goodbye, its rank hears that, the client
asks what the engine holds, the rank waits for the client's words, the command for its ranks. Whoever waits is more
patient than the one that it waits for, or else the cause would be cut off on its way to the terminal. Seconds, all of
them. What only says how often somebody looks stays where it is used.
"""

from __future__ import annotations

__all__ = [
    "ABORT",
    "ANSWER",
    "BEAT",
    "BOARD_LEAVE",
    "CONNECT",
    "EXPLANATION",
    "FETCH_GOODBYE",
    "GREETING",
    "HEAR",
    "HTTP_BODY",
    "HTTP_HEADERS",
    "HUNG",
    "KNOCK",
    "LAST_WORD",
    "ORPHAN_GRACE",
    "ORPHAN_SETTLE",
    "PARENT_MARGIN",
    "PARENT_SETTLE",
    "PEER_KNOCK",
    "PROCESS_GRACE",
    "QUICK_ANSWER",
    "RANK_CONNECT",
    "RANK_GOODBYE",
    "RANK_RETURN",
    "RANK_SETTLE",
    "ROLLBACK_TALK",
    "SETTLE",
    "SILENCE",
    "UNMAP",
    "UNMAP_AT_MOST",
    "UNMAP_BYTES",
    "UPDATE",
    "WORKER_GOODBYE",
]

UPDATE = 600.0
"""For an update, unless somebody says otherwise."""

# -- a rank and the worker that it feeds

GREETING = 5.0
"""For whoever connects to a link to say who it is; others wait meanwhile."""
WORKER_GOODBYE = 5.0
"""For a worker whose update failed to say so."""
LAST_WORD = 1.0
"""For a rank to read an answer of its worker that has begun to arrive."""
RANK_GOODBYE = 2 * WORKER_GOODBYE
"""For a rank to hear from all of its workers that they have given up."""
UNMAP = 5.0
"""For workers to unmap memory that is to be freed, besides what a driver needs to take that much back."""
UNMAP_BYTES = 4e9
"""A driver takes back so many bytes in a second at least ..."""
UNMAP_AT_MOST = 30.0
"""... and needs no longer than that."""
FETCH_GOODBYE = 1.0
"""For reads from other hosts that are under way when their update ends."""

# -- ranks among themselves

BEAT = 1.0
"""A rank shows so often that it is alive."""
SILENCE = 5 * BEAT
"""A rank whose process or host gives no sign of life for so long counts as lost."""
HUNG = 15 * BEAT
"""A rank whose process lives, but whose Python does nothing for so long, counts as lost too."""
RANK_CONNECT = 2 * BEAT
"""For one try to reach rank 0's host: the next one may find it again."""
RANK_RETURN = RANK_CONNECT + BEAT
"""A rank that is lost when others begin something is waited for so long: its host may be back, and it on its way."""
EXPLANATION = 2.0
"""A rank that sees a peer vanish waits so long for the peer's own word of why."""

# -- asking an engine

KNOCK = 5.0
"""For one try to reach an engine that may not be up."""
HEAR = 2 * KNOCK
"""For an engine's workers to say what they hold, before an update: a step of the engine may be under way."""
ANSWER = 5.0
"""An engine that runs into a deadline itself gets this much longer to say so."""
SETTLE = 15.0
"""For asking an engine, after a failure, what it holds now; and again for having it serve."""

ROLLBACK_TALK = RANK_GOODBYE + 5.0
"""For all ranks to say, after an update failed, what their workers hold: each hears that from its own first."""

# -- the command line, its ranks, and processes in general

QUICK_ANSWER = 1.0
"""An engine that is up already says within this time whether it can be updated, before any file is read."""
RANK_SETTLE = ANSWER + 2 * SETTLE + 5.0
"""For a rank of the command line to hear from its client what became of the engine."""
PARENT_SETTLE = RANK_SETTLE + 5.0
"""After one rank has failed, the others get so long to put their engines into a known state."""
PARENT_MARGIN = RANK_SETTLE + RANK_GOODBYE + 10.0
"""Ranks keep their own deadlines; only a rank that is stuck beyond them meets this one."""
ABORT = 2.0
"""For an update that is about to begin, and is to be given up, to begin."""
ORPHAN_SETTLE = 8.0
"""For putting the engine into a known state after the command is gone."""
ORPHAN_GRACE = ORPHAN_SETTLE + 1.0
"""After that a rank without its command ends, whatever it does."""
BOARD_LEAVE = 2.0
"""For other ranks to read what they came for, before the one that holds it ends."""
PROCESS_GRACE = BOARD_LEAVE + 1.0
"""How long a process gets to end by itself."""

# -- callers of the HTTP API

HTTP_HEADERS = 10.0
"""For whoever connects to say what they want, and for a request that has begun to show the rest of its headers."""
HTTP_BODY = 60.0
"""For the whole body of a request."""

# -- other hosts

PEER_KNOCK = 2.0
"""For finding out, after a read failed, whether anybody listens there."""
CONNECT = 5.0
"""For a connection to another host."""
