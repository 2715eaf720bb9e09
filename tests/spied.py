"""`python -m jaxpref.main` as a user runs it, but what processes put on devices is written down.

SPIED is a folder. There process P leaves a file `P.tokenised` if it tokenises data, and adds a line
to `P.jsonl` for each batch: how many rows it has written, and the tokens of each of its devices.
ALTERED is "PROCESS EXAMPLE": that process reads another token in that example. SIGNALLED is
"PROCESS SIGNAL BATCH SECONDS": that process sends itself that signal so many seconds after it has
put that batch, counted from 1, and leaves a file `signalled`; without seconds it takes a rest then.
SAVING is "PROCESS SIGNAL": that process does so when it first waits for a save; all take a rest.
With STUCK the first update never begins, as if it took for ever to compile: the main thread waits
in C, where it sees no signal, and process P leaves a file `P.stuck`.
"""

import ctypes
import importlib
import json
import os
import runpy
import threading
import time
from pathlib import Path

import jax
import numpy as np

from jaxpref import checkpoint, interrupts, sharding
from jaxpref.data import TokenizedDataset
from jaxpref.train import layout

load = importlib.import_module("jaxpref.data.load")
put_batch, group = sharding.put_batch, TokenizedDataset.group
tokenize = load.tokenize
wait = checkpoint.Checkpoints.wait


def put_and_tell(mesh, batch):
    placed = put_batch(mesh, batch)
    rows = {}
    for shard in placed.tokens.addressable_shards:
        first = shard.index[1].start or 0
        for number, row in enumerate(np.moveaxis(np.asarray(shard.data), 1, 0)):
            assert rows.setdefault(first + number, row.tolist()) == row.tolist()
    line = {
        "written": batch.tokens.shape[1],
        "lengths": batch.lengths.tolist(),
        "logical": placed.tokens.shape,
        "rows": rows,
    }
    told = Path(os.environ["SPIED"], f"{jax.process_index()}.jsonl")
    with told.open("a") as file:
        file.write(json.dumps(line) + "\n")
    process, number, batch, seconds = os.environ.get("SIGNALLED", "-1 0 0 0").split()
    if int(process) == jax.process_index() and len(told.read_text().splitlines()) == int(batch):
        threading.Timer(float(seconds), signal_itself, [int(number)]).start()
        time.sleep(0 if float(seconds) else 2)
    return placed


def signal_itself(number):
    Path(os.environ["SPIED"], "signalled").touch()
    os.kill(os.getpid(), number)


def wait_when_signalled(self):
    checkpoint.Checkpoints.wait = wait
    process, number = map(int, os.environ["SAVING"].split())
    if jax.process_index() == process:
        signal_itself(number)
    # JAX looks for a signal once a second, and then processes agree.
    while jax.process_count() > 1 and not interrupts._noticed():
        time.sleep(0.1)
    time.sleep(2)
    wait(self)


def update_that_is_stuck(*args, **options):
    def update(*inputs):
        Path(os.environ["SPIED"], f"{jax.process_index()}.stuck").touch()
        # To lock a mutex twice takes for ever, and no signal wakes who waits for it.
        mutex = ctypes.create_string_buffer(256)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    return update


def tokenize_and_tell(*given, **options):
    Path(os.environ["SPIED"], f"{jax.process_index()}.tokenised").touch()
    return tokenize(*given, **options)


def altered(self, index):
    found = group(self, index)
    process, example = map(int, os.environ["ALTERED"].split())
    if (jax.process_index(), index) != (process, example):
        return found
    first, *others = found.responses
    first = first.copy()
    first[0] += 1
    return found._replace(responses=[first, *others])


if __name__ == "__main__":
    if "SPIED" in os.environ:
        sharding.put_batch = put_and_tell
        load.tokenize = tokenize_and_tell
    if "SAVING" in os.environ:
        checkpoint.Checkpoints.wait = wait_when_signalled
    if "STUCK" in os.environ:
        layout.make_update = update_that_is_stuck
    if "ALTERED" in os.environ:
        TokenizedDataset.group = altered
    runpy.run_module("jaxpref.main", run_name="__main__")
