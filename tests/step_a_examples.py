"""Step A's examples as processes of one machine make them: seconds of a core, and memory.

    python -m tests.step_a_examples 16000 2

makes so many examples of a query and seven texts, of 128 words each, in two processes. It prints of
each the seconds of a core that making them took, and preparing their batches; the most memory above
what it had before; and a hash of what was made, the same for any number of processes. Tokens are
those of the tokenizer of a rehearsal.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import numpy as np

from tests.commands import ROOT, free_port

TEXTS, WORDS, POOL, BATCH = 7, 128, 4096, 64


def measure(count: int, processes: int) -> list[dict]:
    """What each process says."""
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.step_a_examples", "child", str(count), str(processes),
             str(index), port],
            # One core each, so that seconds are of the work and not of its threads.
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "XLA_FLAGS": "", "TOKENIZERS_PARALLELISM": "false"},
        )
        for index in range(processes)
    ]  # fmt: skip
    printed = [child.communicate(timeout=3000)[0] for child in children]
    assert not any(child.returncode for child in children), printed
    return [json.loads(text.splitlines()[-1]) for text in printed]


def make(count: int, processes: int, index: int, port: int) -> dict:
    """One of the processes: its figures."""
    from expandr_jax.data.triples import MadeTriples, Triple
    from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
    from expandr_jax.objectives.packed_examples import ExampleHashes, triple_blocks
    from expandr_jax.objectives.stored_examples import store_examples
    from expandr_jax.planning.synthetic import draw_words, word
    from expandr_jax.runtime import processes as runtime
    from tests.host_rates import WORDS as KNOWN
    from tests.host_rates import Encoder

    runtime.start(f"127.0.0.1:{port}", processes, index)
    own, encoder = runtime.current(), Encoder()
    drawn = draw_words(np.random.default_rng(0), KNOWN, POOL * WORDS).reshape(POOL, WORDS)
    pool = [" ".join(map(word, row)) for row in drawn.tolist()]

    def triple(number: int) -> Triple:
        texts = [f"{pool[(number * TEXTS + i) % POOL]} {word(number)}" for i in range(TEXTS)]
        return Triple(queries[number], (texts[0],), tuple(texts[1:4]), tuple(texts[4:]))

    queries = [f"{word(i % KNOWN)} {word(i // KNOWN)} {i}" for i in range(count)]
    triples, hashes = MadeTriples(queries, triple), ExampleHashes()
    encoder.tokenize(pool[:64])
    own.barrier()
    before, start = _memory(reset=True), time.process_time()
    blocks = triple_blocks(triples, encoder, processes=own)
    stored = store_examples(hashes.passing(blocks))
    made, peak = time.process_time(), _memory()
    settings = types.SimpleNamespace(
        batch_size=BATCH, negatives=3, plain_share=0.0, length_window=0, curriculum=False
    )
    batches = ContrastiveBatches(stored, settings, 3, 0, 0, 512, range(count // BATCH))
    batches.prepare()
    prepared = time.process_time()
    numbers = hashlib.sha256(hashes.all.encode())
    for i in range(0, len(stored), 997):
        numbers.update(repr(stored[i]).encode())
    own.finish()
    return {
        "making s": round(made - start, 2), "preparing s": round(prepared - made, 2),
        "MB": round((peak - before) / 1e6), "made": numbers.hexdigest()[:12],
    }  # fmt: skip


def _memory(*, reset: bool = False) -> int:
    """The most bytes since the start, or since the last time that it was reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    if sys.argv[1] == "child":
        print(json.dumps(make(*map(int, sys.argv[2:6]))))
    else:
        for figures in measure(*map(int, sys.argv[1:3])):
            print(*(f"{name} {value}" for name, value in figures.items()), sep=", ")
