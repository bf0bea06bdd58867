"""What is in a stage's key, what is tried again, and what Prefect's cache may not do."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from prefect import flow

from p2d_core.errors import DataError, DeviceMemoryError, P2DError, TransientError
from p2d_core.samples.source import SourceSpec
from p2d_core.store import Store
from tasks.samples import read_source
from tasks.stage import BaseModel, Plugin, Runtime, ShardRef, SourceInput, stage

CALLS: list[str] = []


@dataclass(frozen=True)
class Spec:
    share: float
    version: str = "1"


@stage("notes", outside_key=("hint",))
def write_note(making, runtime, text, spec, made_from=None, hint=None):
    """Writes a text; the test counts how often."""
    CALLS.append(text)
    (making.folder / "note.txt").write_text(text)


FAILURES: list[BaseException] = []


@stage("flaky")
def fail_first(making, runtime, name):
    """Raises what the test has put up, one after the other."""
    CALLS.append(name)
    if FAILURES:
        raise FAILURES.pop(0)


@pytest.fixture
def runtime(tmp_path) -> Runtime:
    CALLS.clear()
    FAILURES.clear()
    return Runtime(store=str(tmp_path / "store"), run_id="one")


def note(runtime, text="a", share=0.1, **more):
    return write_note.fn(runtime, text=text, spec=Spec(share), **more)


def test_the_same_inputs_are_made_once(runtime):
    first, again = note(runtime), note(replace(runtime, run_id="two"))
    assert first == again
    assert CALLS == ["a"]
    assert again.manifest.run_id == "one"


def test_what_cannot_change_a_result_is_not_in_the_key(runtime):
    first = note(runtime, hint="x")
    other = replace(runtime, device="cpu", threads=1, tokens_per_batch=9, checkpoint_seconds=1)
    assert note(other, hint="y") == first


@pytest.mark.parametrize(
    "change", [{"text": "b"}, {"share": 0.2}, {"made_from": ShardRef("f", 0, "other")}]
)
def test_what_can_change_it_is(runtime, change):
    before = note(runtime, made_from=ShardRef("f", 0, "sha"))
    assert note(runtime, **{"made_from": ShardRef("f", 0, "sha")} | change).key != before.key


def test_a_file_that_changes_between_the_look_at_it_and_its_stage_is_not_kept(runtime, tmp_path):
    """Under the key of what it was it would be taken for that in every later run."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n')
    looked_at = SourceInput.of(SourceSpec("s", str(file)))
    whole = file.read_text()
    file.write_text(whole * 2)
    with pytest.raises(DataError, match=r"source 's': .*data.jsonl changed after it was checked"):
        read_source.fn(runtime, looked_at)
    assert list(Store(Path(runtime.store)).refs()) == []
    file.write_text(whole)
    assert read_source.fn(runtime, looked_at).manifest.cost["samples"] == 1


def test_a_shard_counts_by_its_samples_and_not_by_its_place(runtime):
    assert note(runtime, made_from=ShardRef("f", 0, "sha")) == note(
        runtime, made_from=ShardRef("elsewhere", 7, "sha")
    )


def test_a_source_counts_by_its_content_and_not_by_its_path(tmp_path, runtime):
    keys = []
    for name, line in [("a", "{}"), ("b", "{}"), ("c", "[]")]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(line)
        source = SourceInput.of(SourceSpec("s", str(file)))
        keys.append(note(runtime, made_from=source).key)
    assert keys[0] == keys[1] != keys[2]


def test_precision_and_text_format_are_in_the_key_of_a_base(runtime):
    base = BaseModel("folder", "sha", "float32", "\n", 512)
    keys = {
        note(runtime, made_from=changed).key
        for changed in (
            base,
            replace(base, folder="moved"),
            replace(base, precision="bfloat16"),
            replace(base, separator=" "),
            replace(base, max_tokens=64),
        )
    }
    assert len(keys) == 4


def test_defaults_of_a_plug_in_count_as_if_they_had_been_given(runtime):
    assert Plugin.of("x", Spec(0.5)) == Plugin.of("x", Spec(share=0.5, version="1"))
    keys = {note(runtime, made_from=Plugin.of("x", Spec(0.5, v))).key for v in ("1", "2")}
    assert len(keys) == 2


def run_in_a_flow(task, *args, **kwargs):
    @flow
    def one_stage():
        return task(*args, **kwargs, return_state=True)

    return one_stage()


@pytest.mark.parametrize(
    "passing",
    [
        TransientError("busy"),
        OSError("disk"),
        torch.cuda.OutOfMemoryError("full"),
        DeviceMemoryError("full"),
    ],
)
def test_what_may_pass_by_itself_is_tried_again(runtime, passing):
    FAILURES[:] = [passing]
    state = run_in_a_flow(fail_first.with_options(retry_delay_seconds=0), runtime, name="x")
    assert state.is_completed()
    assert CALLS == ["x", "x"]


@pytest.mark.parametrize("lasting", [ValueError("wrong"), P2DError("no")])
def test_what_will_not_is_not(runtime, lasting):
    FAILURES[:] = [lasting, lasting]

    @flow
    def one_stage():
        fail_first.with_options(retry_delay_seconds=0)(runtime, name="x")

    with pytest.raises(type(lasting)):
        one_stage()
    assert CALLS == ["x"]
    assert list(Store(Path(runtime.store)).refs()) == []


def test_prefect_shows_a_reused_stage_as_cached(runtime):
    assert run_in_a_flow(write_note, runtime, text="c", spec=Spec(1)).name == "Completed"
    assert run_in_a_flow(write_note, runtime, text="c", spec=Spec(1)).name == "Cached"
    assert CALLS == ["c"]


def test_prefect_never_answers_for_an_artifact_that_is_gone(runtime):
    import shutil

    ref = run_in_a_flow(write_note, runtime, text="d", spec=Spec(1)).result()
    shutil.rmtree(ref.path)
    state = run_in_a_flow(write_note, runtime, text="d", spec=Spec(1))
    assert state.name == "Completed"
    assert state.result() == ref
    assert CALLS == ["d", "d"]
    assert (ref.path / "note.txt").read_text() == "d"


def test_another_store_does_not_get_this_stores_artifacts(runtime, tmp_path):
    run_in_a_flow(write_note, runtime, text="e", spec=Spec(1))
    elsewhere = replace(runtime, store=str(tmp_path / "other"))
    ref = run_in_a_flow(write_note, elsewhere, text="e", spec=Spec(1)).result()
    assert ref.location.startswith(elsewhere.store)


KILLED = """
import sys, time
from pathlib import Path
from p2d_core.store import Recipe, Store
def build(making):
    (making.folder / "half").write_text("x")
    (making.scratch / "checkpoint").write_text("x")
    print("half", flush=True)
    time.sleep(60)
Store(Path(sys.argv[1])).produce(Recipe("notes", "1"), build, run_id="killed")
"""


def test_a_killed_stage_leaves_no_artifact_and_no_lock_but_its_checkpoints(tmp_path):
    from p2d_core.store import Recipe

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    assert list(store.refs()) == []
    seen = []

    def build(making):
        seen.extend(file.name for file in making.scratch.iterdir())

    store.produce(Recipe("notes", "1"), build, run_id="next")
    assert seen == ["checkpoint"]
