"""Fixtures of the loopback Hub: a fresh one for each test, which the client libraries of this process know alone."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .loopback import LoopbackHub

# These modules read the environment when they are imported; the libraries look their values up at each use.
SETTINGS = ("huggingface_hub.constants", "datasets.config", "evaluate.config")
# Values that other modules have copies of (`from ..constants import HF_HUB_CACHE`), by the module that they are from.
COPIED = {
    "huggingface_hub.constants": ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_ASSETS_CACHE"),
    "evaluate.config": ("HF_LIST_ENDPOINT",),
}
LIBRARIES = ("huggingface_hub", "transformers", "datasets", "evaluate")
# Packages of downloaded code: that of a second Hub must not be hidden by that of the first.
DOWNLOADED = ("evaluate_modules", "datasets_modules", "transformers_modules")
# hf_xet would wait 3, 9, 27 and 81 seconds before it tries again.
QUICK = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}


def _loaded(libraries: tuple[str, ...]) -> list[str]:
    return [name for name in list(sys.modules) if name.split(".")[0] in libraries]


def _set_copies(name: str, value: object) -> None:
    for module in map(sys.modules.get, _loaded(LIBRARIES)):
        if name in vars(module):
            setattr(module, name, value)


def _set_endpoint_of_shared_clients() -> None:
    """Functions such as huggingface_hub.model_info are methods of a shared HfApi; transformers has another one."""
    hub = sys.modules["huggingface_hub"]
    for module in map(sys.modules.get, _loaded(LIBRARIES)):
        for value in list(vars(module).values()):
            if isinstance(value, hub.HfApi):
                value.endpoint = hub.constants.ENDPOINT


def reread_environment() -> None:
    """Make the libraries that are imported forget their Hub, and use that of os.environ.

    Their modules of settings are reloaded, and derive all URLs and folders from HF_ENDPOINT and HF_HOME again. Modules
    that are imported later read the environment anyway.
    """
    for module in SETTINGS:
        if module in sys.modules:
            settings = importlib.reload(sys.modules[module])
            for name in COPIED.get(module, ()):
                _set_copies(name, getattr(settings, name))
    if "huggingface_hub" in sys.modules:
        hub = sys.modules["huggingface_hub"]
        hub.close_session()
        sys.modules["huggingface_hub.utils._xet"].abort_xet_session()
        hub.HfFileSystem.clear_instance_cache()
        _set_copies("HF_MODULES_CACHE", os.path.join(hub.constants.HF_HOME, "modules"))
        _set_endpoint_of_shared_clients()
    if "datasets.config" in sys.modules:
        # datasets would ask http://datasets-server.127.0.0.1 about a dataset, which no variable prevents
        sys.modules["datasets.config"].USE_PARQUET_EXPORT = False
    for name in _loaded(DOWNLOADED):
        del sys.modules[name]


@contextlib.contextmanager
def only(server: LoopbackHub, home: Path, **settings: str) -> Iterator[LoopbackHub]:
    """The only Hub that this process knows, with all caches in `home` and further variables of the environment."""
    with server, pytest.MonkeyPatch.context() as patch:
        environ = server.environ(home) | settings
        modules = os.path.join(os.environ.get("HF_HOME", ""), "modules")  # code that was downloaded before
        for name in os.environ.keys() - environ.keys():
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        # evaluate and transformers append their folder of downloaded code; that of an earlier home would hide it
        patch.setattr(sys, "path", [place for place in sys.path if place != modules])
        reread_environment()
        yield server
        patch.undo()
        reread_environment()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A fresh Hub, the only one that this process knows, with fresh caches; logged in as "tester", a member of "org".

    Processes that a test starts inherit this Hub; `hub.environ(folder)` gives them caches of their own.
    """
    with only(LoopbackHub(), tmp_path_factory.mktemp("hf-home")) as server:
        yield server


@pytest.fixture
def xet_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A fresh Hub like `hub`, to which large files go by Xet; the client's pauses between attempts are short."""
    pytest.importorskip("hf_xet")
    pytest.importorskip("lz4.frame")
    with only(LoopbackHub(xet=True), tmp_path_factory.mktemp("hf-home"), **QUICK) as server:
        yield server


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a ViT with random weights and its processor."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, **depth, **labels)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
