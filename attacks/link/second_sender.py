"""A second sender asks for an engine in the middle of the first one's update, to open it when its own time is over."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from victim import MOST_SECONDS, listening

from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.link.channel import Listener
from checkpoint_engine.reference.engine import ModelSpec
from checkpoint_engine.reference.process import ReferenceProcess


def ask(engine: str, listener: Listener, seconds: float) -> CheckpointEngineError | None:
    handles = {"cpu:0": listener.handle}
    how = {"pause": "keep", "reset_caches": True, "timeout": seconds}
    try:
        ReferenceClient(engine).update_weights(handles, version="hostile", **how)
    except CheckpointEngineError as error:
        return error
    return None


def attack(engine: str) -> None:
    with listening() as (listener, _, _), listening() as (other, _, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, engine, listener, MOST_SECONDS)
        channel, _ = listener.accept(Deadline(MOST_SECONDS), Cancel(), "the worker connecting")
        with channel:
            start = time.monotonic()
            refused = ask(engine, other, 1.0)
            seconds = time.monotonic() - start
            if not ReferenceClient(engine).is_paused(Deadline(5.0)):
                sys.exit("NOT REFUSED: the engine serves in the middle of the first sender's update")
        first.result(MOST_SECONDS)
    if refused is None:
        sys.exit("NOT REFUSED: two senders at once")
    print(f"refused within {seconds:.2f} s: {type(refused).__name__}: {str(refused)[:300]}")


with ReferenceProcess(ModelSpec().to_json(), 1) as process:
    ReferenceClient(process.endpoint).wait_ready(Deadline(60))
    attack(process.endpoint)
