"""BEIR's public archives, downloaded when they are first needed, with the quick start's models.

    python -m train.joint --config=configs/public.py:scifact --workdir=runs/scifact
    python -m eval.beir --config=configs/public.py:fiqa --systems=bm25,dense --workdir=runs/fiqa

Addresses and md5 sums are those of BEIR's README; another file is refused. Training needs one of
msmarco, nfcorpus, nq, hotpotqa, fiqa, fever and scifact, which have training queries. The terms of
each are its authors'.
"""

import ml_collections

from configs import beir
from expandr_jax.errors import UserError

ADDRESS = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{}.zip"
MD5 = {
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "quora": "18fb154900ba42a600f84b839c173167",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
}


def get_config(name: str = "scifact") -> ml_collections.ConfigDict:
    """One of the archives.

    Args:
        name: As BEIR calls it.

    Raises:
        UserError: It is none of these.
    """
    if name not in MD5:
        raise UserError(f"configs/public.py:{name}: expected one of {', '.join(MD5)}")
    config = beir.get_config()
    config.data.url = ADDRESS.format(name)
    config.data.md5 = MD5[name]
    config.evaluation.drop_identical_ids = name in beir.OF_OWN_DOCUMENTS
    return config
