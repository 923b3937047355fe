"""U1 to U3: pickles, weights and configurations that somebody else made; nothing in them runs."""

import hashlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from soak import examples

from wsiseg.config import build, read_yaml
from wsiseg.errors import CheckpointError, ConfigError
from wsiseg.models.weights import read_weights
from wsiseg.settings.tile import TileConfig


class Runs:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw(module, name, argument):
    """A protocol 0 pickle that calls `module.name(argument)`; the module need not be imported."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def dotted(path, argument):
    """A protocol 4 pickle that reaches a function through the attributes of an allowed module."""
    module, name = path
    body = b"\x8c" + bytes([len(module)]) + module.encode()
    body += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
    text = argument.encode()
    return b"\x80\x04" + body + b"\x8c" + bytes([len(text)]) + text + b"\x85R."


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_object(value):
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def payloads(canary):
    """Return name -> content of files that would create `canary` when unpickled."""
    shell = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    bomb = Runs(os.system, shell)
    plain = pickle.dumps(bomb)
    weights = {"model_state_dict": {"net.x": torch.zeros(1)}, "epoch": bomb}
    found = {f"protocol{p}": pickle.dumps(bomb, protocol=p) for p in range(6)}
    found |= {
        "eval": pickle.dumps(Runs(eval, python)),
        "exec": pickle.dumps(Runs(exec, python)),
        "raw-os": raw("os", "system", shell),
        "raw-posix": raw("posix", "system", shell),
        "raw-subprocess": raw("subprocess", "getoutput", shell),
        "raw-pty": raw("pty", "spawn", shell),
        "raw-runpy": raw("runpy", "run_path", canary),
        "raw-timeit": raw("timeit", "timeit", python),
        "raw-pickle": raw("pickle", "loads", plain.hex()),
        "dotted-torch": dotted(("torch.serialization", "os.system"), shell),
        "dotted-numpy": dotted(("numpy.f2py.crackfortran", "os.system"), shell),
        "dotted-collections": dotted(("collections", "_sys.modules"), shell),
        "zip": zipped({"archive/data.pkl": plain, "archive/version": b"3"}),
        "zip-in-zip": zipped({"archive/data.pkl": zipped({"data.pkl": plain})}),
        "zip-traversal": zipped({"../../../data.pkl": plain, "archive/data.pkl": plain}),
        "tar": tarred({"pickle": plain, "tensors": plain, "storages": plain}),
        "torch-zip": saved(weights),
        "torch-legacy": saved(weights, _use_new_zipfile_serialization=False),
        "torch-module": saved({"model_state_dict": bomb}),
        "torchscript-like": zipped({"m/data.pkl": plain, "m/constants.pkl": plain}),
        "numpy": numpy_object(bomb),
        "numpy-zip": zipped({"a.npy": numpy_object(bomb)}),
        "twice": pickle.dumps(1) + plain,
        "behind-zeros": bytes(64) + plain,
    }  # fmt: skip
    return found


NAMES = sorted(payloads("x"))


def test_there_are_thirty_payloads_and_they_do_run_where_they_are_unpickled(tmp_path):
    canary = tmp_path / "canary"
    assert len(NAMES) >= 30
    pickle.loads(payloads(canary)["protocol4"])
    assert canary.exists()


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_wherever_it_is_given(wsiseg_here, tmp_path, name):
    canary = tmp_path / "canary"
    content = payloads(canary)[name]
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    run = tmp_path / "run"
    run.mkdir()
    for part in ("model.json", "weights.safetensors", "config.yaml"):
        (run / part).write_bytes(content)
    point = run / "resume" / "step-00000002"
    point.mkdir(parents=True)
    for part in ("state.json", "state.safetensors"):
        (point / part).write_bytes(content)
    store = tmp_path / "tiles" / "a.zarr"
    store.mkdir(parents=True)
    for part in ("zarr.json", "ledger.json", "ledger.jsonl"):
        (store / part).write_bytes(content)
    table = tmp_path / "cohort.csv"
    table.write_bytes(content)
    commands = [
        ("segment", "x.svs", "--model", file),
        ("segment", "x.svs", "--model", run),
        ("import-checkpoint", file, "-o", tmp_path / "imported", "--mpp", 0.5),
        ("finetune", store, "-o", run, "--from-scratch", "--steps", 1),
        ("pretrain", store.parent, "-o", run, "--steps", 1),
        ("tile", "x.svs", "-o", tmp_path / "out", "--config", file),
        ("tile", "x.svs", "-o", tmp_path / "out", "--classes", file),
        ("tile", "x.svs", "-o", tmp_path / "out", "--annotations", file),
        ("tile", table, "-o", tmp_path / "out"),
        ("tile", file, "-o", tmp_path / "out"),
        ("export", store, "-o", tmp_path / "x.geojson"),
        ("evaluate", store, file),
        ("verify", store),
        ("check", file),
    ]
    for command in commands:
        done = wsiseg_here(*command, cwd=tmp_path)
        assert not canary.exists(), command
        assert done.returncode in (1, 2), f"{command}: {done.stderr}"
    remedy = wsiseg_here("segment", "x.svs", "--model", file, cwd=tmp_path).stderr
    assert "run folder" in remedy
    assert "import-checkpoint" in remedy


# What scanners of pickles look for: functions that run, fetch, delete or import something.
DANGEROUS = [
    "os.system", "os.popen", "os.execv", "os.remove", "os.rename", "os.putenv", "posix.system",
    "posix.remove", "nt.system", "subprocess.run", "subprocess.Popen", "subprocess.call",
    "subprocess.check_output", "shutil.rmtree", "shutil.copy", "sys.exit",
    "socket.create_connection", "socket.socket", "pty.spawn", "runpy.run_module",
    "runpy.run_path", "importlib.import_module", "pkgutil.resolve_name", "imp.load_source",
    "zipimport.zipimporter", "builtins.eval", "builtins.exec", "builtins.compile",
    "builtins.open", "builtins.getattr", "builtins.__import__", "__builtin__.eval",
    "operator.attrgetter", "operator.methodcaller", "functools.partial", "types.FunctionType",
    "types.CodeType", "code.InteractiveInterpreter", "bdb.Bdb.run", "pdb.Pdb.run",
    "cProfile.run", "profile.run", "timeit.timeit", "trace.Trace.run", "doctest.debug_script",
    "ctypes.CDLL", "ctypes.cdll.LoadLibrary", "multiprocessing.Process", "asyncio.run",
    "webbrowser.open", "urllib.request.urlopen", "http.client.HTTPConnection", "requests.get",
    "httpx.get", "ftplib.FTP", "smtplib.SMTP", "telnetlib.Telnet", "pip.main", "pydoc.locate",
    "venv.create", "ensurepip.bootstrap", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.package.PackageImporter", "torch.utils.cpp_extension.load",
    "torch.storage._load_from_bytes", "numpy.load", "numpy.testing.rundocs",
    "numpy.f2py.crackfortran.getlincoef", "joblib.load", "dill.loads", "cloudpickle.loads",
    "pickle.loads", "_pickle.loads", "marshal.loads", "shelve.open", "sqlite3.connect",
    "logging.config.dictConfig",
]  # fmt: skip


@pytest.mark.parametrize("is_zip", [False, True], ids=["plain", "zip"])
@pytest.mark.parametrize("name", DANGEROUS)
def test_no_function_is_found_through_a_checkpoint(wsiseg_here, tmp_path, name, is_zip):
    module, function = name.rsplit(".", 1)
    content = raw(module, function, "x")
    if is_zip:
        content = zipped({"m/data.pkl": content, "m/version": b"3", "m/byteorder": b"little"})
    (tmp_path / "model.pth").write_bytes(content)
    before = set(sys.modules)
    done = wsiseg_here("import-checkpoint", tmp_path / "model.pth", "-o", tmp_path / "run",
                       "--mpp", 0.5)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "cannot be read without running code from it" in done.stderr
    assert module not in {*sys.modules} - before
    assert not (tmp_path / "run").exists()


SHAPES = {"a": (2, 3), "b": (4,)}
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
}
NUMBER = st.one_of(st.integers(-4, 48), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "U8", "F8_E4M3", "", "X" * 99]),
        "shape": st.lists(NUMBER, max_size=4),
        "data_offsets": st.lists(NUMBER, max_size=3),
    }
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, st.text(max_size=8), st.floats()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
HEADER = st.one_of(
    st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | JSON, max_size=4),
    st.builds(lambda extra: GOOD | extra, st.dictionaries(st.sampled_from("ab"), ENTRY)),
    JSON,
)


@examples(pr=200, night=50_000)
@given(
    header=HEADER,
    length=st.one_of(st.none(), st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1])),
    num_data=st.integers(0, 64),
)
def test_hostile_weights_are_refused_and_cost_nothing(tmp_path_factory, header, length, num_data):
    path = tmp_path_factory.getbasetemp() / "weights.safetensors"
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.sha256(data).hexdigest()
    is_good = length is None and num_data == 40 and isinstance(header, dict)
    if is_good and {k: v for k, v in header.items() if k != "__metadata__"} == GOOD:
        return
    with pytest.raises(CheckpointError, match="weights"):
        read_weights(path, sha256=digest, shapes=SHAPES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_good_weights_are_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    text = json.dumps(GOOD).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(40))
    found = read_weights(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), shapes=SHAPES)
    assert {name: tuple(t.shape) for name, t in found.items()} == SHAPES


LAUGHS = "\n".join(
    ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
HOSTILE_YAML = {
    "python-object": "tile: !!python/object/apply:os.system ['touch {canary}']",
    "python-name": "tile: !!python/name:os.system",
    "python-module": "tile: !!python/module:os",
    "python-new": "tile: !!python/object/new:os.system ['touch {canary}']",
    "python-tuple": "tile: !!python/tuple [1, 2]",
    "own-tag": "tile: !wsiseg {mpp: 1}",
    "laughs": LAUGHS,
    "alias": "tile: &t {mpp: 0.5}\nsegment: *t",
    "recursive": "tile: &t [*t]",
    "merge-key": "tile:\n  <<: {mpp: 0.5}\n  <<: {mpp: 1.0}",
    "duplicate": "tile:\n  mpp: 0.5\n  mpp: 1.0",
    "duplicate-section": "tile: {}\ntile: {}",
    "unknown": "tile: {mmp: 0.5}",
    "unknown-section": "tlie: {mpp: 0.5}",
    "nan": "tile: {mpp: .nan}",
    "infinite": "tile: {mpp: .inf}",
    "1e400": "tile: {mpp: 1.0e+400}",
    "1e400-text": "tile: {mpp: 1e400}",
    "huge-integer": "tile: {tile_size: " + "9" * 5000 + "}",
    "octal": "tile: {tile_size: 0o7777777777777777}",
    "sexagesimal": "tile: {tile_size: 190:20:30}",
    "date": "tile: {mpp: 2001-12-14}",
    "impossible-date": "tile: {mpp: 2001-99-99}",
    "bool": "tile: {mpp: yes}",
    "norway": "tile: {codec: no}",
    "null": "tile: {tile_size: null}",
    "list": "tile: {mpp: [0.5]}",
    "section-list": "tile: [1, 2]",
    "section-text": "tile: text",
    "top-list": "- tile",
    "top-text": "tile",
    "nested-flow": "tile: " + "[" * 3000 + "]" * 3000,
    "nested-map": "tile: " + "{a: " * 3000 + "}" * 3000,
    "nested-block": "\n".join("  " * i + "a:" for i in range(1500)),
    "unclosed": "tile: {mpp: 0.5",
    "tabs": "tile:\n\tmpp: 0.5",
    "control": "tile: {mpp: \x00}",
    "binary-tag": "tile: {codec: !!binary aGVsbG8=}",
    "set-tag": "tile: !!set {mpp}",
    "omap-tag": "tile: !!omap [mpp: 0.5]",
    "list-key": "? [a]\n: tile",
    "map-key": "? {a: b}\n: tile",
    "null-key": "~: tile",
    "number-key": "1: tile",
    "nan-key": ".nan: 1",
    "two-documents": "tile: {}\n---\ntile: {}",
    "directive": "%YAML 9.9\n---\ntile: {}",
    "anchor-only": "tile: &x",
    "dunder": "tile: {__class__: x}",
    "dotted": "tile: {tissue.method: none}",
    "negative": "tile: {tile_size: -1}",
    "other-type": "tile: {tile_size: 256.0}",
}
HARMLESS = {"directive", "anchor-only", "alias"}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_configuration_is_one_line_and_runs_nothing(wsiseg_here, tmp_path, name):
    canary = tmp_path / "canary"
    path = tmp_path / "config.yaml"
    path.write_text(HOSTILE_YAML[name].replace("{canary}", str(canary)))
    done = wsiseg_here("tile", "x.svs", "-o", "out", "--config", path, cwd=tmp_path)
    assert not canary.exists()
    assert done.returncode == 2 or (name in HARMLESS and done.returncode == 1), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 3000
    assert len([line for line in done.stderr.splitlines() if "rror:" in line]) == 1, done.stderr


@pytest.mark.parametrize(
    "value", ["[" * 3000, "9" * 5000, "!!python/name:os.system", "&a [*a]", "2001-99-99", "\x07"]
)
def test_a_hostile_assignment_is_one_line(wsiseg_here, tmp_path, value):
    done = wsiseg_here("tile", "x.svs", "-o", "out", "--set", f"mpp={value}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr) < 9000


@examples(pr=200, night=50_000)
@given(text=st.text(max_size=200) | st.binary(max_size=200) | st.from_regex(
    r"(tile: )?[\[\]{}&*!|>%@`'\"#,:?\-a-z0-9. \n]{0,60}", fullmatch=True
))  # fmt: skip
def test_any_text_is_a_configuration_or_an_error_of_ours(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    try:
        values = read_yaml(path)
        build(TileConfig, values.get("tile") or {}, where="tile")
    except ConfigError as error:
        assert "any.yaml" in str(error) or "tile" in str(error)
    except TypeError:
        assert not isinstance(values.get("tile") or {}, dict)
