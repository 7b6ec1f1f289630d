"""The peer of `eval.load`: FastAPI with sentence-transformers and FAISS, as one would write it.

    python -m eval.benchmarks.serving_peer RUN THREADS BATCHED

It encodes with the run's exported retriever, searches the run's vectors exactly, and answers as
`eval.serve` does: ids, scores and texts. BATCHED is 1 where requests that come together are encoded
and searched together, by the same queue as ours.
"""

import asyncio
import json
import pathlib
import socket
import sys
import time
from collections.abc import Sequence

import numpy as np

from expandr_jax.data.beir import read_beir
from expandr_jax.serving.batching import Batcher
from expandr_jax.serving.bodies import SearchBody
from expandr_jax.vectors.stored import open_vectors


def main(workdir: str, threads: str, batched: str) -> None:
    """Serves; prints its port when it is ready."""
    import faiss
    import torch
    import uvicorn
    from fastapi import FastAPI, Response
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(int(threads))
    faiss.omp_set_num_threads(int(threads))
    run = pathlib.Path(workdir)
    model = SentenceTransformer(str(run / "export" / "retriever"), device="cpu")
    corpus = read_beir(run / "data").corpus
    ids, texts = list(corpus), list(corpus.values())
    vectors = np.asarray(open_vectors(run / "work" / "vectors" / "expandr.npy"), np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    def search(asked: Sequence[SearchBody]) -> list[bytes]:
        start = time.perf_counter()
        encoded = model.encode(
            [body.query for body in asked], batch_size=16, show_progress_bar=False
        )
        middle = time.perf_counter()
        scores, rows = index.search(np.asarray(encoded, np.float32), max(b.k for b in asked))
        end = time.perf_counter()
        seconds = {"encode": middle - start, "search": end - middle, "total": end - start}
        return [
            _answer(zip(scores[i], rows[i], strict=True), body.k, ids, texts, seconds)
            for i, body in enumerate(asked)
        ]

    search([SearchBody(query="warm up")])
    batcher = Batcher(search, 16 if batched == "1" else 1, 10_000, "search")
    app = FastAPI()

    @app.post("/search")
    async def answer(body: SearchBody) -> Response:
        content = await asyncio.wrap_future(batcher.submit(body))
        return Response(content, media_type="application/json")

    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(app, access_log=False, log_config=None, server_header=False)
    uvicorn.Server(config).run([listening])


def _answer(found, k: int, ids: list[str], texts: list[str], seconds: dict[str, float]) -> bytes:
    results = [
        {"id": ids[row], "score": round(float(score), 6), "text": texts[row]}
        for score, row in list(found)[:k]
    ]
    content = {
        "mode": "plain", "late": False, "expansion": None, "results": results,
        "seconds": {step: round(value, 6) for step, value in seconds.items()},
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


if __name__ == "__main__":
    main(*sys.argv[1:])
