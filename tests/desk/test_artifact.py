"""Artifacts: built once by racing processes, kept without pickle, rebuilt when damaged or changed."""

import importlib
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from workingpapers.desk.artifact import artifact, cache_directory

MODULE = """
from __future__ import annotations
import os
import time
import numpy as np
from workingpapers.desk.artifact import artifact

SCALE = 2.0
METHODS = ["unused by the artifacts"]

def note(word):
    with open(os.environ["NOTES"], "a") as file:
        file.write(word + "\\n")

@artifact
def weights(width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    note(f"weights {width} {seed}")
    import torch
    table = torch.full((width, 2), SCALE + seed, requires_grad=True)
    return {"table": table, "tied": table, "view": table.T, "steps": torch.arange(width)}

@artifact
def statistics(*, name: str = "a") -> dict[str, np.ndarray]:
    note("statistics")
    return {"file": np.arange(6.0).reshape(2, 3), "words": np.array(["a", "bc"]), "file/one": np.array(True)}

@artifact
def contested() -> dict[str, np.ndarray]:
    note("begin")
    time.sleep(0.3)
    note("end")
    return {"ones": np.ones(4)}

@artifact
def failing(how: str) -> dict[str, torch.Tensor]:
    import torch
    note("failing")
    if how == "raises":
        raise OSError("no disk")
    return {
        "mixed": {"a": torch.ones(1), "b": np.ones(1)},
        "objects": {"a": np.array([{}, None])},
        "list": [torch.ones(1)],
        "empty": {},
        "number": {"a": 1.0},
        "keys": {1: torch.ones(1)},
    }[how]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module with artifacts, the environment they need, and the notes that the builders have made."""
    (tmp_path / "with_artifacts.py").write_text(MODULE)
    monkeypatch.setenv("WORKINGPAPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "with_artifacts", raising=False)
    (tmp_path / "notes").touch()
    module = importlib.import_module("with_artifacts")
    module.notes = lambda: (tmp_path / "notes").read_text().splitlines()
    return module


def kept():
    return sorted(path.suffix for path in cache_directory().iterdir())


def test_tensors_are_built_once_per_arguments_and_read_back_equal(module):
    first = module.weights(3)
    assert torch.equal(first["table"], torch.full((3, 2), 2.0))
    assert torch.equal(first["tied"], first["table"])
    assert torch.equal(first["view"], first["table"].T)
    assert first["steps"].dtype == torch.int64
    assert not first["table"].requires_grad
    first["table"].zero_()
    again = module.weights(width=3, seed=0)
    assert torch.equal(again["table"], torch.full((3, 2), 2.0)), "what a caller does to its arrays stays with it"
    assert module.notes() == ["weights 3 0"]
    assert module.weights(3, 1)["table"][0, 0] == 3.0
    assert module.notes() == ["weights 3 0", "weights 3 1"]
    assert kept() == [".lock", ".lock", ".safetensors", ".safetensors"]


def test_arrays_are_kept_under_any_name_without_pickle(module):
    module.statistics()
    arrays = module.statistics()
    assert module.notes() == ["statistics"]
    assert arrays["file"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert arrays["words"].tolist() == ["a", "bc"]
    assert arrays["file/one"].shape == ()
    assert arrays["file/one"]
    assert kept() == [".lock", ".npz"]
    arrays["file"][0, 0] = 9.0
    assert module.statistics()["file"][0, 0] == 0.0


def test_two_processes_build_it_once(module, tmp_path):
    code = """
import os, sys, time, with_artifacts
with_artifacts.note("ready")
while not os.path.exists(sys.argv[1]):
    time.sleep(0.001)
print(with_artifacts.contested()["ones"].sum(), "torch" in sys.modules)
"""
    go = tmp_path / "go"
    command = [sys.executable, "-c", code, str(go)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    racing = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    until = time.monotonic() + 60
    while module.notes() != ["ready", "ready"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    go.touch()
    said = [process.communicate(timeout=60)[0].strip() for process in racing]
    assert said == ["4.0 False", "4.0 False"], "arrays need no torch"
    assert module.notes() == ["ready", "ready", "begin", "end"]


@pytest.mark.parametrize("name", ["weights", "statistics"])
def test_a_damaged_file_is_built_again(module, name):
    build = {"weights": lambda: module.weights(3), "statistics": module.statistics}[name]
    build()
    (path,) = (path for path in cache_directory().iterdir() if path.suffix in (".safetensors", ".npz"))
    whole = path.read_bytes()
    for damage in (b"", whole[:40], whole[: len(whole) // 2], b"\x00" * len(whole), os.urandom(200)):
        path.write_bytes(damage)
        with pytest.warns(UserWarning, match="could not be read and is built again"):
            build()
        assert path.stat().st_size == len(whole)
    assert len(module.notes()) == 6


def test_a_pickle_in_the_cache_is_not_loaded(module):
    module.statistics()
    (path,) = cache_directory().glob("*.npz")
    with zipfile.ZipFile(path, "w") as archive, archive.open("file.npy", "w") as member:
        np.lib.format.write_array(member, np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.warns(UserWarning, match="is built again"):
        assert "words" in module.statistics()


def test_the_source_it_depends_on_counts(module, tmp_path):
    def rewritten(old, new):
        (tmp_path / "with_artifacts.py").write_text(MODULE.replace(old, new))
        module.weights(2)
        return len(module.notes())

    module.weights(2)
    assert rewritten("unused by", "not used by") == 1
    assert rewritten("import os\n", "# a comment\nimport os\n") == 1
    assert rewritten("SCALE = 2.0", "SCALE = 2.5") == 2


def test_what_the_builder_raises_passes_through_and_leaves_nothing(module):
    for _ in range(2):
        with pytest.raises(OSError, match="no disk"):
            module.failing("raises")
    assert module.notes() == ["failing", "failing"]
    assert kept() == [".lock"]


@pytest.mark.parametrize(
    ("how", "given"),
    [
        ("mixed", "got {'a': Tensor, 'b': array of float64}"),
        ("objects", "got {'a': array of object}"),
        ("list", "got list"),
        ("empty", "got {}"),
        ("number", "got {'a': float}"),
        ("keys", "got {1: Tensor}"),
    ],
)
def test_other_things_than_arrays_are_refused(module, how, given):
    with pytest.raises(TypeError, match=given):
        module.failing(how)
    assert kept() == [".lock"]


def test_arguments_must_be_plain_values(module):
    with pytest.raises(TypeError, match=r"width of the artifact with_artifacts.weights must be .* got \[3\]"):
        module.weights([3])
    with pytest.raises(TypeError, match="missing a required argument: 'width'"):
        module.weights()
    with pytest.raises(ValueError, match=r"width .* must be finite, got nan"):
        module.weights(float("nan"))


def test_only_module_level_functions_with_named_arguments_qualify():
    with pytest.raises(TypeError, match="module-level function"):
        artifact(lambda: {})
    for signature in ("*values", "**values", "value, /"):
        namespace = {"__name__": "elsewhere"}
        exec(f"def build({signature}): ...", namespace)
        with pytest.raises(TypeError, match="arguments must have names"):
            artifact(namespace["build"])
