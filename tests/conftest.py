"""What every test file shares: the interpreter without a GPU, both paths of the norm, profiles."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from paths import GPU, TRITON, NormPath

# Several test processes share the cores, and so do the commands that they start.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if processes > 1:
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)

# Derandomized: a run is a function of the code alone, and a failure shrinks and repeats.
settings.register_profile(
    "gatednorm",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    print_blob=False,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
settings.load_profile("gatednorm")


def _kernels_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors to the Triton kernels, which the interpreter runs."""
    from gatednorm import autograd
    from gatednorm.kernels import launch

    monkeypatch.setattr(autograd, "backend", lambda device_type: launch)


KERNELS = pytest.param(
    "kernels",
    marks=[
        *([pytest.mark.gpu] if GPU else []),
        pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    ],
)


@pytest.fixture(params=["cpu", KERNELS])
def path(request, monkeypatch) -> NormPath:
    """The closed form on CPU tensors, and the kernels: on a GPU, or under the interpreter."""
    if request.param == "kernels" and not GPU:
        _kernels_on_cpu_tensors(monkeypatch)
    return NormPath(request.param)


@pytest.fixture(params=[KERNELS])
def kernels(request, monkeypatch) -> NormPath:
    """The Triton kernels alone."""
    if not GPU:
        _kernels_on_cpu_tensors(monkeypatch)
    return NormPath("kernels")


@pytest.fixture
def own_cache_and_no_network(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A tokenizer.json."""
    from text_sets import TEXTS, byte_level

    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    byte_level(TEXTS).save(str(file))
    return file


@pytest.fixture
def hub(tmp_path):
    """A set laid out like one of the hub, in four files."""
    from text_sets import write_hub

    return write_hub(tmp_path / "owner" / "texts")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """An untrained run in the current folder's runs/."""
    from small_runs import write_checkpoint

    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs" / "a", "mamba2")
    return tmp_path / "runs" / "a"


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of the infinities that some tests are about.
    ignored = "ignore::RuntimeWarning:triton.runtime.interpreter"
    config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests have recorded to be read, whichever process ran them: the mutants and what noticed
    each, and how many logits the exact mode's tests have compared."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    for title in ("mutants", "exact mode"):
        lines = [line for r in reports for key, line in r.user_properties if key == title]
        if lines:
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(sorted(lines)))
