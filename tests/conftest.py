"""Environment of every test: no network, one thread, fixed seeds, caches of its own. Set before torch is imported."""

import atexit
import gc
import os
import random
import shutil
import tempfile

import pytest

# What is imported lives as long as the process: no collection walks through it, neither now nor in a test, where
# `Trainer.train` asks for a full one each time.
gc.disable()

_CACHE = tempfile.mkdtemp(prefix="pdt-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("pdt", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("pdt")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def process_group(tmp_path):
    """
    A group of this process alone, in which a model behaves as among several. It ends after the test's own objects: a
    `DistributedDataParallel` that is freed last waits for a thread of gloo, which waits for the GIL.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
