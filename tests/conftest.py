"""Eight virtual devices, a compilation cache, and models that several test files share."""

import fcntl
import gc
import os
import pathlib
from unittest import mock

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "xla"
# Before jax is imported: programs that tests start inherit the cache, but not the devices.
# Two workers fill two cores: a program in one piece takes a fifth less to compile than in 32, and
# LLVM's later passes a sixth of what tests take. Without any of its passes sums are rounded worse.
# What users run, and what tests start as programs of their own, is compiled as ever.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=1"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PLATFORMS"] = "cpu"

import pytest  # noqa: E402

from eval.benchmarks.minilm import SHA256 as MINILM_SHA256  # noqa: E402
from eval.benchmarks.minilm import SOURCE as MINILM  # noqa: E402
from eval.benchmarks.smollm2 import SHA256 as SMOLLM2_SHA256  # noqa: E402
from eval.benchmarks.smollm2 import SOURCE as SMOLLM2  # noqa: E402
from expandr_jax.runtime.bucket import Bucket  # noqa: E402
from expandr_jax.weights.hf import load_generator, load_retriever  # noqa: E402
from tests.commands import finish, start  # noqa: E402
from tests.fake_bucket import NAME, serve  # noqa: E402
from tests.serving import Server  # noqa: E402

# Where the run that is compared with recorded files is made: none of it may change a file.
ELSEWHERE = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8", "TZ": "Pacific/Kiritimati",
    "PYTHONHASHSEED": "7",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_looked_through():
    """Spares each phase of a run that a file trains the libraries and programs before it.

    A phase ends with a collection of garbage; they took a fifth of the time of a file that trains.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm():
    """all-MiniLM-L6-v2: (retriever, params)."""
    return load_retriever(MINILM, sha256=MINILM_SHA256)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct: (generator, params)."""
    return load_generator(SMOLLM2, sha256=SMOLLM2_SHA256)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """An uninterrupted run of the smoke config, one for all workers: (workdir, what it printed)."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    workdir, printed = directory / "smoke", directory / "smoke.txt"
    with open(directory / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            with mock.patch.dict(os.environ, ELSEWHERE):
                process = start(workdir)
            printed.write_text(finish(process), encoding="utf-8")
    return workdir, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def service(smoke, tmp_path_factory):
    """`eval.serve` on that run; tests leave its documents as they were."""
    server = Server(smoke[0], tmp_path_factory.mktemp("service") / "state")
    server.wait_for("are compiled")
    yield server
    printed = server.stop()
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 9, printed  # No request is logged.


@pytest.fixture(scope="session")
def served():
    """One bucket for all tests: gcsfs keeps what it once connected to."""
    with serve() as bucket:
        yield bucket


@pytest.fixture
def bucket(served, tmp_path, monkeypatch):
    """The bucket, which does not fail yet, with a directory for what is in it on this machine."""
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EXPANDR_SCRATCH", str(tmp_path / "scratch"))
    Bucket(f"gs://{NAME}")  # Sets how gcsfs works, as in a run, before a test does without one.
    served.fail = lambda method, name: None
    served.requests.clear()
    served.objects.clear()
    yield served
    served.fail = lambda method, name: None
