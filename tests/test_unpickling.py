"""Foreign pickles: the tensors come out as torch's own reader gives them, and nothing of the file runs."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.data import AttributeDict
from omegaconf import OmegaConf
from torch import nn
from torch._utils import _rebuild_tensor_v2

from poserelay.errors import UserError
from poserelay.unpickling import Inert, read_pickled, read_restricted

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
FORMATS = [{}, {"_use_new_zipfile_serialization": False}]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("options", FORMATS)
def test_what_torch_reads_is_read_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 5, 4)
    saved = {
        "state_dict": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(),
        "optimizer": torch.optim.SGD([nn.Parameter(torch.randn(3))], 0.1, momentum=0.9).state_dict(),
        "shared": [whole, whole[2:4, 1:].transpose(0, 2), whole.expand(2, 6, 5, 4)],
        "parameter": nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "size": torch.Size([2, 3]),
        "plain": [1, 2.5, None, True, "text", b"bytes", ("a", {"b": {1: 2}}), 2**70, -1],
        **{str(dtype): torch.randint(0, 2, (3, 2)).to(dtype) for dtype in DTYPES},
    }
    torch.save(saved, tmp_path / "a.pth", **options)
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    ours = read_restricted(tmp_path / "a.pth")
    # Bytes are the one plain value that is pickled as a call.
    assert theirs["plain"].pop(5) == b"bytes"
    assert ours["plain"].pop(5) is Inert
    assert equal(ours, theirs)
    assert ours["shared"][0].data_ptr() == ours["shared"][2].data_ptr()


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_any_view_of_a_tensor(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.arange(torch.Size(sizes).numel()).reshape(sizes).to(data.draw(st.sampled_from(DTYPES)))
    for axis, size in enumerate(sizes):
        start = data.draw(st.integers(0, size))
        tensor = tensor.narrow(axis, start, data.draw(st.integers(0, size - start)))
    tensor = tensor.permute(data.draw(st.permutations(range(len(sizes)))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pth")
        torch.save([tensor], path, **data.draw(st.sampled_from(FORMATS)))
        assert equal(read_restricted(path), torch.load(path, weights_only=True))


def test_a_file_of_2019_is_read_by_both() -> None:
    """A real file in the format before torch 1.6."""
    path = Path(os.environ.get("POSERELAY_DATA", "nowhere")) / "checkpoints/resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip("POSERELAY_DATA names no folder with checkpoints")
    assert equal(read_restricted(path), torch.load(path, map_location="cpu", weights_only=True))


class Running:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: Path) -> dict[str, Any]:
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Running(os.system, f"touch {canary}"),
        "exec": Running(exec, touch),
        "eval": Running(eval, touch),
        "subprocess": Running(subprocess.call, ["touch", str(canary)]),
        "partial": Running(functools.partial(os.system, f"touch {canary}")),
        "nested": [Running(getattr, Running(__import__, "os"), "system"), {"a": Running(Path.touch, canary)}],
        "torch": Running(torch.hub.load_state_dict_from_url, "http://localhost", str(canary)),
        "reducer": Running(functools.reduce, os.system, [f"touch {canary}"], 0),
        "map": Running(list, Running(map, exec, [touch])),
    }


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, name: str, protocol: int, options: dict[str, Any]) -> None:
    canary = tmp_path / "canary"
    weight = torch.randn(2)
    torch.save({"w": weight, "bad": hostile(canary)[name]}, tmp_path / "a.pth", pickle_protocol=protocol, **options)
    ours = read_pickled(tmp_path / "a.pth")
    assert not canary.exists()
    assert torch.equal(ours["w"], weight)


def in_zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    return path


RUNNING = [
    b"cos\nsystem\n(S'touch CANARY'\ntR.",  # REDUCE
    b"(S'touch CANARY'\nios\nsystem\n.",  # INST
    b"(cos\nsystem\nS'touch CANARY'\no.",  # OBJ
    b"(lp0\n\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch CANARY\x85Ra.",  # STACK_GLOBAL, REDUCE, APPEND
    b"cos\nsystem\np0\n0g0\n(S'touch CANARY'\ntR.",  # through the memo
    b"cfunctools\npartial\n(cos\nsystem\nS'touch CANARY'\ntR(tR.",  # the answer is called
]
OTHER_OPCODES = [
    b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x0ctouch CANARYt\x81.",  # NEWOBJ
    b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x0ctouch CANARYt}\x92.",  # NEWOBJ_EX
    b"cos\nsystem\n(dS'a'\nS'touch CANARY'\nsb.",  # BUILD
    b"cos\nsystem\nS'touch CANARY'\na.",  # APPEND
    b"cos\nsystem\nS'touch CANARY'\nS'b'\ns.",  # SETITEM
]


@pytest.mark.parametrize("program", RUNNING)
def test_these_programs_run_where_pickle_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: bytes):
    monkeypatch.chdir(tmp_path)
    pickle.loads(program)
    assert Path("CANARY").exists()


@pytest.mark.parametrize("program", [*RUNNING, *OTHER_OPCODES])
def test_no_opcode_reaches_a_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_pickled(in_zip(tmp_path / "a.pth", program)) in (Inert, [Inert])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pth"]


def test_attributes_set_by_a_pickle_reach_nothing_of_ours(tmp_path: Path) -> None:
    """BUILD on what a file may name: the containers and the functions that rebuild tensors."""
    program = b"c%s\n%s\n(N(dS'__defaults__'\n(I1\ntstb."
    own = types.ModuleType("own")
    exec("def function(a=0): return a", own.__dict__)
    sys.modules["own"] = own
    pickle.loads(program % (b"own", b"function"))
    del sys.modules["own"]
    assert own.function() == 1
    for module, name in [
        (b"collections", b"OrderedDict"),
        (b"torch._utils", b"_rebuild_tensor_v2"),
        (b"torch", b"FloatStorage"),
        (b"torch", b"Size"),
        (b"own", b"function"),
    ]:
        with contextlib.suppress(UserError):
            read_pickled(in_zip(tmp_path / "a.pth", program % (module, name)))
        torch.save({"w": torch.ones(2), "n": np.float32(1)}, tmp_path / "b.pth")
        assert read_restricted(tmp_path / "b.pth")["w"].tolist() == [1, 1]
    assert _rebuild_tensor_v2.__defaults__ == (None,)


def test_a_foreign_class_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "foreign_project.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("foreign_project")
    monkeypatch.setitem(sys.modules, "foreign_project", module)
    exec("class Config(dict):\n    def __setstate__(self, state): raise SystemExit(9)", module.__dict__)
    config = module.Config(lr=0.1)
    config.nested = [module.Config()]
    weight = torch.randn(3)
    for index, options in enumerate(FORMATS):
        torch.save({"hyper_parameters": config, "state_dict": {"w": weight}}, tmp_path / f"{index}.ckpt", **options)
    monkeypatch.delitem(sys.modules, "foreign_project")
    for index in range(len(FORMATS)):
        saved = read_pickled(tmp_path / f"{index}.ckpt")
        assert saved["hyper_parameters"] is Inert
        assert torch.equal(saved["state_dict"]["w"], weight)
    assert "foreign_project" not in sys.modules
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hyperparameters_that_the_field_pickles(tmp_path: Path) -> None:
    weight = torch.randn(3)
    beside = {
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
        "cfg": OmegaConf.create({"backbone": {"name": "resnet50", "kwargs": [1, 2]}}),
        "attributes": AttributeDict(lr=1.0),
        "scalar": np.float64(3.5),
        "array": np.arange(5),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "path": Path("somewhere"),
        "time": datetime.datetime(2024, 1, 1),
        "set": {1, 2},
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "network": nn.Linear(2, 2),
    }
    for protocol in (2, 5):
        torch.save({**beside, "state_dict": {"w": weight}}, tmp_path / "a.ckpt", pickle_protocol=protocol)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "a.ckpt", weights_only=True)
        saved = read_pickled(tmp_path / "a.ckpt")
        assert set(saved) == {*beside, "state_dict"}
        assert torch.equal(saved["state_dict"]["w"], weight)
        assert all(saved[name] is Inert for name in ("args", "cfg", "attributes", "scalar", "array", "network"))


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_the_files_and_never_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    path, canary = tmp_path / "a.pth", tmp_path / "canary"
    saved = {"w": torch.arange(4.0), "n": np.float32(1), "bad": Running(os.system, f"touch {canary}")}
    torch.save(saved, path, **data.draw(st.sampled_from(FORMATS)))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pth: not a readable PyTorch file"):
            read_pickled(path)
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read_pickled(path)
    assert not canary.exists()


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4.0), "n": np.float32(1)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in records if name.endswith("data.pkl"))
    # K\x00 offset, K\x04 size: the four elements from the third on.
    assert records[pickled].count(b"K\x00K\x04\x85") == 1
    records[pickled] = records[pickled].replace(b"K\x00K\x04\x85", b"K\x02K\x04\x85")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="out of bounds"):
        read_pickled(tmp_path / "b.pth")


def test_a_legacy_file_that_claims_more_than_it_holds_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.arange(4.0), "n": np.float32(1)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    claim = b"cpuq\x06K\x04N"
    assert content.count(claim) == 1
    path.write_bytes(content.replace(claim, b"cpuq\x06\x8a\x08" + struct.pack("<q", 2**50) + b"N"))
    with pytest.raises(UserError, match="shorter than its tensors"):
        read_pickled(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_formats_are_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_pickled(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(UserError, match=r"tar format of torch 0\.1"):
        read_pickled(tmp_path / "old.tar")
    for content in (b"", b"<html>404</html>", b"PK\x03\x04rest", pickle.dumps({"a": 1})):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(UserError, match="not a readable PyTorch file"):
            read_pickled(tmp_path / "a.pth")


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(10_000)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        read_pickled(path)
