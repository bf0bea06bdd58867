"""No code runs on load: payloads that would leave a mark are planted wherever bytes are read."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prefect.settings import get_current_settings

from flows.inputs import check_inputs
from flows.settings import load_settings
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import _last_checkpoint, _seal, train
from p2d_core.errors import InputError, P2DError
from p2d_core.heads.head_map import read_head_map
from p2d_core.models import load_model, load_tokenizer
from p2d_core.samples.read import read_samples
from p2d_core.samples.source import SourceSpec
from p2d_core.samples.tokens import EncodedSample
from p2d_core.store import Store
from p2d_core.store.manifest import sealed
from p2d_core.store.query import open_reader
from p2d_core.store.recipe import hash_file
from p2d_core.synthetic.world import BASE_FOLDER
from tasks.samples import read_source
from tasks.stage import Runtime, SourceInput
from tests.demo_run import P2D
from tests.faults.bad import Job
from tests.faults.trials import trials
from tests.job import quick_job
from tests.small_store import fill, samples
from tests.tiny import tiny_llama


class Payload:
    """What, when it is unpickled, leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the-code-ran"


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def as_torch(mark: Path, file: Path, *, zipped: bool = True) -> None:
    torch.save(
        {"x": torch.zeros(1), "y": Payload(mark)}, file, _use_new_zipfile_serialization=zipped
    )


def test_the_payloads_would_leave_their_mark(mark, tmp_path):
    """Otherwise nothing here would show anything."""
    pickle.loads(pickled(mark))  # noqa: S301
    assert mark.exists()
    for zipped in (True, False):
        mark.rmdir()
        as_torch(mark, tmp_path / "x.pt", zipped=zipped)
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert mark.exists()


# ---- model folders

CODE = "import os\nos.mkdir({mark!r})\n"


def _weights(name: str, *, zipped: bool = True, alone: bool = False) -> Any:
    def plant(base: Path, mark: Path) -> None:
        if alone:
            (base / "model.safetensors").unlink()
        as_torch(mark, base / name, zipped=zipped)

    return plant


def _config(name: str, values: dict[str, Any]) -> Any:
    def plant(base: Path, mark: Path) -> None:
        file = base / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | values))
        for module in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
            (base / module).write_text(CODE.format(mark=str(mark)))
        (base / "custom_generate").mkdir()
        (base / "custom_generate/generate.py").write_text(CODE.format(mark=str(mark)))

    return plant


def _adapter(base: Path, mark: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 1}
    (base / "adapter_config.json").write_text(json.dumps(config))
    as_torch(mark, base / "adapter_model.bin")


def _index(base: Path, mark: Path) -> None:
    (base / "model.safetensors").unlink()
    as_torch(mark, base / "pytorch_model-1.bin")
    index = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-1.bin"}})
    (base / "pytorch_model.bin.index.json").write_text(index)
    (base / "model.safetensors.index.json").write_text(index)


def _as_safetensors(base: Path, mark: Path) -> None:
    as_torch(mark, base / "model.safetensors")


AUTO = {
    "AutoConfig": "configuration_evil.C",
    "AutoModelForCausalLM": "modeling_evil.M",
    "AutoTokenizer": ["tokenization_evil.T", None],
}
FOLDERS: dict[str, Any] = {
    "pickled weights beside": _weights("pytorch_model.bin"),
    "old pickled weights beside": _weights("pytorch_model.bin", zipped=False),
    "pickled weights alone": _weights("pytorch_model.bin", alone=True),
    "old pickled weights alone": _weights("pytorch_model.bin", zipped=False, alone=True),
    "a checkpoint alone": _weights("model.ckpt", alone=True),
    "torch's weights alone": _weights("model.pt", alone=True),
    "arguments of a trainer": _weights("training_args.bin"),
    "an optimizer": _weights("optimizer.pt"),
    "weights that are called safetensors": _as_safetensors,
    "a pickled shard in the index": _index,
    "an adapter": _adapter,
    "code of the model": _config("config.json", {"auto_map": AUTO}),
    "code of an unknown model": _config("config.json", {"auto_map": AUTO, "model_type": "evil"}),
    "code of the tokenizer": _config("tokenizer_config.json", {"auto_map": AUTO}),
    "a tokenizer class of its own": _config(
        "tokenizer_config.json", {"tokenizer_class": "tokenization_evil.T"}
    ),
    "code of generating": _config("generation_config.json", {"custom_generate": "."}),
    "a template that reaches out": _config(
        "tokenizer_config.json",
        {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    ),
}


@pytest.mark.parametrize("name", trials(FOLDERS, quick=len(FOLDERS)))
def test_a_model_folder_runs_no_code(name: str, tmp_path, mark):
    job = Job(tmp_path)
    base = job.own_base()
    FOLDERS[name](base, mark)
    for look in (
        lambda: check_inputs(load_settings(job.save())),
        lambda: load_model(base, "float32", torch.device("cpu")),
        lambda: load_tokenizer(base),
    ):
        try:
            look()
        except InputError as error:
            assert str(base) in str(error)  # noqa: PT017
        assert not mark.exists()


# ---- checkpoints of training


def encoded() -> list[EncodedSample]:
    return [EncodedSample(str(i), [1, 3 + i % 5, 7, 9, 2], 2) for i in range(16)]


def trained(scratch: Path, epochs: float = 2.0) -> torch.Tensor:
    model = tiny_llama(num_hidden_layers=1)
    model.requires_grad_(False)
    projection = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)

    def slowly(done: int, total: int) -> None:
        time.sleep(0.003)

    spec = TrainingSpec(epochs, 1e-2, 4, 0.0, 0)
    train(
        model, encoded(), spec, pad_id=0, scratch=scratch, checkpoint_seconds=1e-3, progress=slowly
    )
    return projection.detach().clone()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """What two runs leave: the one that was stopped after its checkpoint, and the whole one."""
    scratch = tmp_path_factory.mktemp("scratch")
    return scratch, trained(scratch)


CHECKPOINT_FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainable.safetensors"]


@pytest.mark.parametrize("file", [*CHECKPOINT_FILES, "scaler.pt", "training_args.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_training_runs_no_code(file, zipped, checkpoints, tmp_path, mark, caplog):
    kept, undisturbed = checkpoints
    scratch = tmp_path / "scratch"
    shutil.copytree(kept, scratch)
    folders = sorted(scratch.glob("checkpoint-*"))
    assert set(CHECKPOINT_FILES) <= {each.name for each in folders[-1].iterdir()}
    for folder in folders:
        as_torch(mark, folder / file, zipped=zipped)
        _seal(folder, 1.0)  # whoever plants it can count it in as well
    again = trained(scratch)
    assert not mark.exists()
    assert torch.equal(again, undisturbed)
    if file != "training_args.bin":  # which nobody reads
        assert "it cannot be loaded" in caplog.text


def test_a_checkpoint_that_is_right_is_gone_on_from(checkpoints):
    folder, _ = _last_checkpoint(checkpoints[0])
    assert folder is not None


# ---- Prefect's results


def record(result: str | None, **metadata: Any) -> str:
    return json.dumps({"metadata": metadata, "result": result})


def in_base64(mark: Path) -> str:
    return base64.encodebytes(cloudpickle.dumps(Payload(mark))).decode()


RESULTS: dict[str, Callable[[Path], str]] = {
    "pickle": lambda mark: record(in_base64(mark), serializer={"type": "pickle"}),
    "no serializer named": lambda mark: record(in_base64(mark)),
    "no metadata": lambda mark: json.dumps({"result": in_base64(mark)}),
    "the old form": lambda mark: json.dumps(
        {"data": in_base64(mark), "serializer": {"type": "pickle"}}
    ),
    "pickle of the standard library": lambda mark: record(
        base64.encodebytes(pickled(mark)).decode(),
        serializer={"type": "pickle", "picklelib": "pickle"},
    ),
    "compressed pickle": lambda mark: record(
        in_base64(mark), serializer={"type": "compressed/pickle"}
    ),
    "JSON with a decoder": lambda mark: record(
        json.dumps({"mark": str(mark)}),
        serializer={"type": "json", "object_decoder": "tests.faults.test_no_code_on_load.leave"},
    ),
    "our own with a decoder": lambda mark: record(
        json.dumps({"mark": str(mark)}),
        serializer={
            "type": "p2d-stored",
            "object_decoder": "tests.faults.test_no_code_on_load.leave",
        },
    ),
    "JSON by another library": lambda mark: record(
        str(mark), serializer={"type": "json", "jsonlib": "tests.faults.test_no_code_on_load"}
    ),
    "a class by its name": lambda mark: record(
        json.dumps({"__class__": "tests.faults.test_no_code_on_load.Left", "data": str(mark)}),
        serializer={"type": "json"},
    ),
    "nothing but pickle": lambda mark: pickled(mark).decode("latin-1"),
    "a bomb of lists": lambda mark: "[" * 100_000,
}


def leave(values: dict[str, Any]) -> Any:
    """An object decoder, as a record may name one."""
    os.mkdir(values["mark"])
    return values


def loads(text: str, **_: Any) -> Any:
    """Of a JSON library, as a record may name one."""
    os.mkdir(text)
    return {}


@pytest.mark.parametrize("name", trials(RESULTS, quick=1))
def test_a_planted_result_of_prefect_runs_no_code(name: str, tmp_path, mark, caplog):
    from prefect import flow

    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"prompt": "{name}", "response": "b"}}\n')
    runtime = Runtime(str(tmp_path / "store"), "run")
    source = SourceInput.of(SourceSpec("x", str(file)))

    @flow(persist_result=False)
    def reading() -> Any:
        return read_source(runtime, source)

    first = reading()
    results = Path(get_current_settings().results.local_storage_path)
    (kept,) = results.glob(f"samples-{first.key[:40]}-*")
    kept.write_text(RESULTS[name](mark), encoding="latin-1")
    assert reading() == first
    assert not mark.exists()
    assert "is no result of this stage: removed, looked up anew" in caplog.text
    assert json.loads(kept.read_text())["metadata"]["serializer"]["type"] == "p2d-stored"
    caplog.clear()
    assert reading() == first
    assert "no result of this stage" not in caplog.text


# ---- Parquet


def extension(mark: Path, table: pa.Table) -> pa.Table:
    """Columns of the kind that older releases of PyArrow unpickled."""
    fields = []
    for kind in table.schema:
        tags = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickled(mark),
        }
        fields.append(kind.with_metadata(tags))
    schema = pa.schema(fields, {b"pandas": pickled(mark), b"gates": b"0", b"p2d": pickled(mark)})
    return table.cast(schema)


def test_parquet_of_a_source_runs_no_code(tmp_path, mark):
    rows = pa.table({"prompt": ["a", "b"], "response": ["c", "d"], "extra": [pickled(mark)] * 2})
    pq.write_table(extension(mark, rows), tmp_path / "x.parquet")
    read = list(read_samples(SourceSpec("x", str(tmp_path / "x.parquet"))))
    assert [sample.prompt for sample in read] == ["a", "b"]
    assert not mark.exists()


def test_parquet_of_the_store_runs_no_code(tmp_path, mark):
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    for ref in refs.values():
        values = json.loads((ref.path / "manifest.json").read_text())
        for file in ref.path.rglob("*.parquet"):
            pq.write_table(extension(mark, pq.read_table(file)), file)
            entry = {"size": file.stat().st_size, "sha256": hash_file(file)}
            values["files"][str(file.relative_to(ref.path))] = entry
        (ref.path / "manifest.json").write_text(sealed(values))
    try:
        read_head_map(refs["heads"].path / "heads.parquet")
    except P2DError as error:
        assert "head map" in str(error)  # noqa: PT017
    with open_reader(store) as reader:
        for view in reader.columns:
            reader.run(f"SELECT * FROM {view}").read_all()  # noqa: S608
        assert reader.columns["samples"]
    assert not mark.exists()
    assert len(samples()) > 0


# ---- YAML

TAGS = [
    "!!python/object/apply:os.mkdir ['{mark}']",
    "!!python/object/apply:os.mkdir {{args: ['{mark}']}}",
    "!!python/object/new:os.mkdir ['{mark}']",
    "!!python/object/apply:subprocess.check_call [[mkdir, '{mark}']]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{mark}')\"]",
    "!!python/object/new:type {{args: ['z', !!python/tuple [], {{extend: !!python/name:exec }}]}}",
    "!!python/object:tests.faults.test_no_code_on_load.Payload {{mark: '{mark}'}}",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{mark}']",
    "&a !!python/object/apply:os.mkdir ['{mark}']",
    "{{<<: !!python/object/apply:os.mkdir ['{mark}']}}",
]


@pytest.mark.parametrize("place", ["base: {}", "{}: 1", "target: {{path: {} }}", "- {}"])
@pytest.mark.parametrize("tag", TAGS)
def test_yaml_runs_no_code(tag: str, place: str, tmp_path, mark):
    file = tmp_path / "run.yaml"
    file.write_text(place.format(tag.format(mark=mark)) + "\n")
    with pytest.raises(InputError, match=r"run\.yaml"):
        load_settings(file)
    assert not mark.exists()


# ---- a whole run in a store that is full of it


def plant_everywhere(store: Path, mark: Path) -> None:
    """Where a run that goes on, or one that looks around, could come by."""
    for name in ("mlflow/artifacts", "prefect/results", ".scratch", "runs"):
        (store / name).mkdir(parents=True, exist_ok=True)
        for file in ("x.pkl", "x.pt", "pytorch_model.bin", "x.json"):
            (store / name / file).write_bytes(pickled(mark))
    for result in (store / "prefect/results").iterdir():
        result.write_text(record(in_base64(mark), serializer={"type": "pickle"}))
    for folder in [*store.glob("*/*/adapter"), *store.glob("mlflow/artifacts/**/artifacts")]:
        if folder.is_dir():
            as_torch(mark, folder / "adapter_model.bin")
            (folder / "python_model.pkl").write_bytes(pickled(mark))
            (folder / "MLmodel").write_text(
                "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
                "    python_model: python_model.pkl\n"
            )


def test_mlflow_would_run_the_code_of_such_a_model(tmp_path, mark, monkeypatch):
    """What stands beside an adapter there would run if anyone loaded it as a model of MLflow."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    (tmp_path / "python_model.pkl").write_bytes(pickled(mark))
    (tmp_path / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n"
        "    python_model: python_model.pkl\n"
    )
    with suppress(Exception):
        mlflow.pyfunc.load_model(str(tmp_path))
    assert mark.exists()


@pytest.mark.faults
def test_a_run_in_a_store_full_of_payloads_runs_none(tmp_path, mark):
    job = quick_job(tmp_path)
    job.run()
    plant_everywhere(job.store, mark)
    job.run(selection={"fraction": 0.2})
    plant_everywhere(job.store, mark)
    again = job.run()
    assert again.selection.selected
    words = [
        ["artifacts", "ls"],
        ["artifacts", "verify"],
        ["sql", "FROM runs"],
        ["artifacts", "gc"],
    ]
    for command in words:
        subprocess.run(
            [str(P2D), *command, "--store", str(job.store)], cwd=tmp_path, timeout=120, check=False
        )
    assert not mark.exists()
    assert (BASE_FOLDER / "model.safetensors").is_file()
