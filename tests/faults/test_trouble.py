"""Disk, permissions and services: a run says what is wrong and goes on later, or goes on now."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.killed import _notes
from p2d_core.adaptation.adaptations import Attention
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import train
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import DataError, P2DError, StorageError, TransientError
from p2d_core.models import load_model, load_tokenizer
from p2d_core.samples.tokens import Encoder, TextFormat
from p2d_core.store import Store
from p2d_core.store.gc import bytes_of
from p2d_core.store.room import check_room, free_bytes, storage_error
from p2d_core.synthetic.world import BASE_FOLDER
from tasks.record import record_run
from tasks.room import SMALL, of_attention
from tasks.stage import BaseModel, Runtime, stage
from tasks.tracking.database import prepare_tracking
from tests.faults.small_job import Ended, SmallJob, content_of
from tests.faults.trials import trials
from tests.small_store import fill, samples, summary

STAGES = ["samples", "proxy", "heads", "measurements", "scores", "subset", "model", "evaluation"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    """With what a run of it makes when nothing is wrong, in ``store``."""
    folder = tmp_path_factory.mktemp("trouble")
    job = SmallJob(folder)
    job.here(folder / "store")
    return job


@pytest.fixture(scope="module")
def whole(job: SmallJob) -> dict[str, dict[str, str]]:
    return content_of(job.folder / "store")


# room on the disk


@given(share=st.floats(0, 3, exclude_min=True))
@settings(max_examples=50)
def test_what_has_no_room_is_refused_with_what_it_needs_and_what_is_free(share: float):
    here = Path(__file__).parent
    free = free_bytes(here)
    needed = round(share * free)
    if share < 0.9:
        check_room(here, needed, "a test")
    elif share > 1.1:
        with pytest.raises(StorageError) as told:
            check_room(here, needed, "a test")
        assert f"{needed / 1e6:,.1f} MB" in str(told.value)
        for words in ("MB free", "p2d artifacts gc", "--store", "the same command goes on"):
            assert words in str(told.value)


def test_room_is_looked_for_where_the_store_will_be(tmp_path: Path):
    check_room(tmp_path / "not" / "there" / "yet", 1, "a test")


STARTED: list[str] = []


@stage("huge", room=lambda rows, **_: rows * 10**15)
def write_hugely(making, runtime, rows):
    """More than any disk has, if there are rows."""
    STARTED.append("huge")


def test_a_stage_without_room_is_not_started_and_leaves_nothing(tmp_path: Path):
    STARTED.clear()
    runtime = Runtime(store=str(tmp_path), run_id="r")
    with pytest.raises(StorageError, match=r"the stage huge may write 1,000,000,000.0 MB, but"):
        write_hugely.fn(runtime, rows=1)
    assert STARTED == []
    assert list((tmp_path / "huge").iterdir()) == []
    write_hugely.fn(runtime, rows=0)
    assert STARTED == ["huge"]


def test_no_room_is_asked_for_what_is_there_already(tmp_path: Path, monkeypatch):
    runtime = Runtime(store=str(tmp_path), run_id="r")
    ref = write_hugely.fn(runtime, rows=0)
    monkeypatch.setattr("p2d_core.store.room.free_bytes", lambda folder: -1)
    assert write_hugely.fn(runtime, rows=0) == ref


def test_every_stage_asks_for_more_than_it_writes_and_not_for_far_too_much(job, tmp_path):
    """Held against a real run of every stage."""
    asked: dict[str, list[int]] = {}

    def asks(folder: Path, needed: int, what: str) -> None:
        asked.setdefault(what.removeprefix("the stage "), []).append(needed)
        check_room(folder, needed, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.stage.check_room", asks)
        job.here(tmp_path / "store")
    written: dict[str, list[int]] = {}
    for ref in Store(tmp_path / "store").refs():
        written.setdefault(ref.stage, []).append(ref.manifest.total_bytes)
    assert set(asked) == set(written)
    for name, sizes in written.items():
        beside_small_files = SMALL if name in ("heads", "reference", "evaluation") else 0
        assert max(sizes) <= max(asked[name]) - SMALL + beside_small_files, name
        # training asks for its checkpoints too, which are gone when it is done
        assert max(asked[name]) <= 2 * SMALL + 12 * max(sizes), name


def test_what_training_asks_for_holds_its_checkpoints_at_their_most(tmp_path: Path):
    """Three at once, each with what is trained and AdamW's two moments."""
    text = TextFormat("\n", 64)
    base = BaseModel.of(BASE_FOLDER, "float32", text)
    model = load_model(BASE_FOLDER, "float32", torch.device("cpu"))
    layers = attention_layers(model)
    Attention().attach(model, layers, None, base.folder)
    encoded = list(Encoder(load_tokenizer(BASE_FOLDER), text).encode_all(samples()[:8]))
    sizes: list[int] = []
    train(
        model,
        encoded,
        TrainingSpec(epochs=6, learning_rate=1e-4, batch_size=8),
        pad_id=0,
        scratch=tmp_path,
        checkpoint_seconds=0,
        progress=lambda done, total: sizes.append(bytes_of(tmp_path)),
    )
    assert max(sizes) > of_attention(base) / 2
    assert max(sizes) * 3 / 2 <= of_attention(base)  # while the third is written


def test_all_shards_are_asked_for_before_the_first_is_measured(job, tmp_path):
    """Not an hour later, at the shard that does not fit any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2d_core.store.room.free_bytes", lambda folder: 25 * 10**6)
        patch.setattr("tasks.room.A_ROW", 100_000)
        with pytest.raises(StorageError, match=r"measuring 400 samples may write"):
            job.here(tmp_path / "store")
    assert not list((tmp_path / "store/measurements").glob("*/manifest.json"))


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A limit of this process, as a quota has it; needs no right."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "limit", trials([300, 1_000, 3_000, 8_000, 15_000, 30_000, 60_000, 90_000, 150_000], quick=1)
)
def test_when_a_file_cannot_grow_the_run_says_so_and_the_next_one_completes(
    limit: int, job: SmallJob, whole, tmp_path: Path
):
    """Whichever stage it meets first: samples for the smallest, the model for the largest."""
    store = tmp_path / "store"
    prepare_tracking(store)
    with files_of_at_most(limit), pytest.raises(P2DError) as told:
        job.here(store)
    assert isinstance(told.value, StorageError | TransientError)
    assert "the same command" in str(told.value)
    assert set(content_of(store)) < set(whole) or isinstance(told.value, TransientError)
    job.here(store)
    assert content_of(store) == whole


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(28, "No space left on device", "x"), True),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("database or disk is full"), True),
        (OSError(13, "Permission denied", "x"), False),
        (OSError(30, "Read-only file system", "x"), False),
    ],
)
def test_what_libraries_say_of_a_full_or_forbidden_disk_is_understood(error, is_full, tmp_path):
    told = storage_error(error, tmp_path, "the stage proxy")
    assert told is not None
    assert ("the disk is full" in str(told)) == is_full
    assert ("no permission" in str(told)) != is_full


def test_other_errors_are_left_as_they_are(tmp_path):
    assert storage_error(ValueError("no"), tmp_path, "x") is None
    wrong_file = DataError("no permission to read it")
    wrong_file.__context__ = PermissionError(13, "Permission denied")
    assert storage_error(wrong_file, tmp_path, "x") is None


# disks and permissions for real, in a process of its own


def on_a_small_disk(script: str) -> list[str]:
    """Words before a command that mount a disk of their own for it, or a skip."""
    words = ["unshare", "--mount"]
    if os.geteuid():
        words = ["unshare", "--user", "--map-root-user", "--mount"]
    mounts = [*words, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /tmp"]
    if not shutil.which("unshare") or subprocess.run(mounts, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    return [*words, "sh", "-c", script, "sh"]


def without_rights() -> list[str]:
    """Words before a command that take root's right to write everywhere, or a skip."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root writes everywhere, and there is no setpriv to lay that down")
    caps = "-dac_override,-dac_read_search"
    return ["setpriv", "--bounding-set", caps, "--inh-caps", caps]


def test_a_disk_without_room_for_the_books_is_refused_before_anything_starts(job, tmp_path):
    script = f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}" && exec "$@"'
    ended = job.run(tmp_path / "store", wrapped_in=on_a_small_disk(script))
    assert "(Prefect, MLflow) may write 12.0 MB" in ended.check_told()


FILLED = """
mount -t tmpfs -o size=48m tmpfs "{store}" || exit 9
( until ls "{store}"/{stage}/*/manifest.json > /dev/null 2>&1; do sleep 0.02; done
  dd if=/dev/zero of="{store}/filler" bs=64k 2> /dev/null ) &
"$@"
echo "first: $?"
rm -f "{store}/filler"
wait
"$@"
echo "second: $?"
cp -r "{store}" "{store}.kept"
"""


@pytest.mark.parametrize("filled_after", trials(STAGES, quick=0))
def test_a_disk_that_fills_up_on_the_way_ends_the_run_and_the_next_one_completes(
    filled_after: str, job: SmallJob, whole, tmp_path: Path
):
    """Prefect's and MLflow's databases lie on the same disk."""
    store = tmp_path / "store"
    store.mkdir()
    script = FILLED.format(store=store, stage=filled_after)
    ended = job.run(store, wrapped_in=on_a_small_disk(script))
    assert "Traceback" not in ended.text, ended.text[-6000:]
    assert "second: 0" in ended.text, ended.text[-6000:]
    # after the last stage, the run may have been through before the disk was full
    if "first: 0" not in ended.text or filled_after not in STAGES[-2:]:
        assert "first: 1" in ended.text
        (told,) = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        assert "the same command" in told
    assert content_of(tmp_path / "store.kept") == whole


def test_a_store_that_may_not_be_written_is_named_before_anything_starts(job, tmp_path):
    store = tmp_path / "store"
    store.mkdir(mode=0o500)
    told = job.run(store, wrapped_in=without_rights()).check_told()
    assert f"no permission at {store}" in told
    assert "Give this user access to it" in told


@pytest.mark.parametrize("forbidden", trials([*STAGES, "runs", ".locks"], quick=0))
def test_a_folder_that_may_not_be_written_ends_the_run_and_the_next_one_completes(
    forbidden: str, job: SmallJob, whole, tmp_path: Path
):
    store = tmp_path / "store"
    (store / forbidden).mkdir(parents=True, mode=0o500)
    told = job.run(store, wrapped_in=without_rights()).check_told()
    assert str(store / forbidden) in told
    (store / forbidden).chmod(0o700)
    job.here(store)
    assert content_of(store) == whole


# services

LOCKED = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def locked(database: Path, seconds: float) -> Iterator[None]:
    """Another process has MLflow's database for itself."""
    words = [sys.executable, "-c", LOCKED, str(database), str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield
        other.kill()


@pytest.mark.faults
def test_a_run_that_cannot_record_keeps_what_it_made_and_the_next_computes_nothing(
    job: SmallJob, tmp_path: Path
):
    store = tmp_path / "store"
    prepare_tracking(store)
    with locked(store / "mlflow/mlflow.db", 300):
        job.run(store).check_told()
    assert len(list((store / "runs").glob("*.json"))) == 1
    made = {ref.key: ref.manifest.run_id for ref in Store(store).refs()}
    again = job.run(store)
    assert again.code == 0, again.text
    assert {ref.key: ref.manifest.run_id for ref in Store(store).refs()} == made


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("recorded"))
    prepare_tracking(store.root)
    return store


def test_a_database_that_is_locked_for_a_moment_is_waited_for(recorded: Store):
    with locked(recorded.root / "mlflow/mlflow.db", 2):
        assert record_run(summary(fill(recorded)), {}, store=recorded.root)["run_id"]


@pytest.mark.faults
def test_a_database_that_stays_locked_is_named_and_the_run_recorded_later(recorded: Store):
    done = summary(fill(recorded))
    with (
        locked(recorded.root / "mlflow/mlflow.db", 300),
        pytest.raises(TransientError, match=r"artifacts are kept.*is locked\. .*the same command"),
    ):
        record_run(done, {}, store=recorded.root)
    assert record_run(done, {}, store=recorded.root)["run_id"]


def kill_server(process: subprocess.Popen[str], sign: Path, pattern: str) -> None:
    """Kills what the command has started, as soon as there is a sign of the stage."""
    until = time.monotonic() + 200
    while not list(sign.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()


@pytest.mark.parametrize("after", trials(STAGES, quick=0))
def test_a_prefect_server_that_goes_away_costs_its_pages_or_the_rest_of_the_run(
    after: str, job: SmallJob, whole, tmp_path: Path
):
    store = tmp_path / "store"
    process = job.start(store)
    kill_server(process, store, f"{after}/*/manifest.json")
    text, _ = process.communicate(timeout=200)
    assert "Traceback" not in text
    if process.returncode == 0:
        assert "recorded, but not in Prefect's pages" in text
        assert len(list((store / "runs").glob("*.json"))) == 1
    else:
        # Prefect asked the server between two stages, where it tells nobody but the flow
        told = Ended(process.returncode, text).check_told()
        assert told.startswith("error: Prefect's server that this command started does not answer")
        assert job.run(store).code == 0
    assert content_of(store) == whole


@pytest.mark.faults
def test_a_prefect_server_that_does_not_start_is_named_and_the_next_run_completes(
    job: SmallJob, whole, tmp_path: Path
):
    store = tmp_path / "store"
    process = job.start(store, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="5")
    while not psutil.Process(process.pid).children():
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 1, text[-6000:]
    assert "error: Prefect's server that this command started does not answer" in text
    assert "Traceback" not in text
    assert job.run(store).code == 0
    assert content_of(store) == whole


def test_a_server_of_a_team_that_is_away_is_named_with_its_address(job, tmp_path):
    """And so it is where a killed run left its note, which the server is told of first."""
    where, store = "http://127.0.0.1:9/api", tmp_path / "s"
    (_notes(store) / "20260101-000000-abcdef").touch()
    ended = job.run(store, PREFECT_API_URL=where, PREFECT_CLIENT_MAX_RETRIES="0")
    assert f"Prefect's server {where} does not answer" in ended.check_told()
