"""`p2d heads stability`, and head maps averaged over draws, on a small target."""

import json
from pathlib import Path

import pytest

from flows.adapt import run_adapt
from flows.settings import load_settings
from p2d_core.errors import DataError, HeadMapError
from p2d_core.heads.draws import agreement, mean_of_draws
from p2d_core.heads.head_map import HeadPick, read_head_map
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER, write_world

SETTINGS = """\
name: small
base: {base}
target: {{path: target.jsonl, limit: {limit}}}
corpus: {{sources: [{{path: corpus/ledgers.jsonl, limit: 100}}], include_target: false}}
evaluation: {{source: {{path: evaluation.jsonl, limit: 10}}}}
proxy: {{samples: 20, held_out: 10, epochs: 1}}
heads: {{ranker: frobenius, fraction: 0.1, {heads}}}
scoring: {{scorer: random}}
training: {{epochs: 1}}
arms: {{random: false, calibration_steps: 4}}
"""


def write_settings(folder: Path, heads: str = "", limit: int = 60) -> Path:
    file = folder / "my.yaml"
    file.write_text(SETTINGS.format(base=BASE_FOLDER, heads=heads, limit=limit))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stability")
    write_world(folder, seed=5)
    return folder


@pytest.fixture
def p2d(monkeypatch, command, folder):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("P2D_STORE", raising=False)
    return command


def test_stability_compares_rankers_over_draws(p2d, folder):
    write_settings(folder)
    code, out, err = p2d(
        *("heads", "stability", "my.yaml", "--draws", "3"),
        *("--ranker", "frobenius", "--ranker", "gradient", "--ranker", "random"),
    )
    assert code == 0, err
    got = json.loads((folder / "heads_stability.json").read_text())
    assert (got["draws"], got["proxy_samples"], got["total_heads"]) == (3, 20, 32)
    # 20 of 50: the proxy set with the 30 that are left over
    assert 0.1 < got["shared_samples"] < 0.8
    assert list(got["rankers"]) == ["frobenius", "gradient", "random"]
    for name, found in got["rankers"].items():
        assert f"\n{name}\n" in out
        assert f"{found['spearman']:.2f}" in out
        assert [top["heads"] for top in found["top"]] == [4, 2, 4, 7, 16]
    # the random ranker draws by its own seed, whatever the proxy set
    assert got["rankers"]["random"]["spearman"] == pytest.approx(1)
    assert got["rankers"]["random"]["top"][0]["jaccard"] == 1
    assert got["rankers"]["gradient"]["lowest_spearman"] < 1
    maps = {name: [read_head_map(Path(f) / "heads.parquet") for f in folders]
            for name, folders in got["maps"].items()}  # fmt: skip
    assert len({tuple(each.scores.flatten().tolist()) for each in maps["frobenius"]}) == 3


def test_stability_again_computes_nothing(p2d, folder):
    before = {ref.key for ref in Store(folder / "artifacts").refs()}
    code, _, err = p2d("heads", "stability", "my.yaml", "--draws", "3", "-o", "again.json")
    assert code == 0, err
    assert {ref.key for ref in Store(folder / "artifacts").refs()} == before
    first, again = (
        json.loads((folder / name).read_text()) for name in ("heads_stability.json", "again.json")
    )
    assert again["rankers"]["frobenius"] == first["rankers"]["frobenius"]


@pytest.mark.slow
def test_a_run_can_take_the_mean_over_the_draws(p2d, folder):
    maps = json.loads((folder / "heads_stability.json").read_text())["maps"]["frobenius"]
    settings = load_settings(write_settings(folder, "average_over: 3, max_per_layer: 1"))
    summary = run_adapt(settings, store=folder / "artifacts")
    got = read_head_map(Path(summary.artifacts["heads"]) / "heads.parquet")
    draws = [read_head_map(Path(each) / "heads.parquet").scores for each in maps]
    assert got.scores.tolist() == mean_of_draws(draws).tolist()
    assert sorted(layer for layer, _ in got.task_heads) == [0, 1, 2, 3]
    picked = [HeadPick(settings.heads.fraction, 1).of(each, got.n_kv_groups) for each in draws]
    expected = agreement(draws, [[set(each.task_heads) for each in picked]])
    found = summary.heads.agreement
    assert (found.draws, found.spearman, found.jaccard) == (
        3, pytest.approx(expected.spearman), pytest.approx(expected.top[0].jaccard),
    )  # fmt: skip
    report = (folder / f"artifacts/reports/{summary.run_id}.html").read_text()
    assert f"Over 3 draws of the proxy set: rank correlation {found.spearman:.2f}" in report
    proxies = [line for line in summary.stages if line.name == "proxy"]
    assert proxies[0].reused  # the draws of `heads stability` are those of a run
    given = run_adapt(
        load_settings(folder / "my.yaml"),
        store=folder / "artifacts",
        head_map=summary.artifacts["heads"],
    )
    assert given.heads.ids == summary.heads.ids
    assert given.heads.agreement == found


def test_limits_that_leave_too_few_heads_are_refused_before_anything_starts(p2d, folder):
    settings = load_settings(write_settings(folder, "max_per_layer: 1").with_name("my.yaml"))
    too_many = settings.heads.model_copy(update={"fraction": 0.5})
    with pytest.raises(HeadMapError, match=r"asks for 16 of 32 heads, but heads\.max_per_layer 1"):
        run_adapt(settings.model_copy(update={"heads": too_many}), store=folder / "new")
    assert not (folder / "new").exists()


def test_a_target_without_other_samples_has_but_one_draw(p2d, folder):
    write_settings(folder, limit=30)
    code, _, err = p2d("heads", "stability", "my.yaml", "--draws", "2", "--store", "new")
    assert code == 2
    assert "no other proxy set can be drawn. Lower proxy.samples or" in err
    write_settings(folder, "average_over: 2", limit=30)
    with pytest.raises(DataError, match="no other proxy set can be drawn"):
        run_adapt(load_settings(folder / "my.yaml"), store=folder / "new")


def test_wrong_usage_is_exit_code_2(p2d, folder):
    write_settings(folder)
    assert p2d("heads", "stability", "my.yaml", "--draws", "1")[0] == 2
    code, _, err = p2d("heads", "stability", "my.yaml", "--ranker", "guess", "--store", "new")
    assert (code, "there is no ranker 'guess'" in err) == (2, True)
    code, _, err = p2d("heads", "stability", "my.yaml", "-o", "no/where.json")
    assert (code, "--output no/where.json: there is no folder" in err) == (2, True)
