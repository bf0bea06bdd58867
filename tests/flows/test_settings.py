"""Settings: every one has a default and a line of help, and is read by something."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from flows.inputs import check_inputs, make_runtime
from flows.presets import PRESETS
from flows.settings import RunSettings, load_settings, parse_settings
from flows.settings_compare import CompareSettings
from p2d_core.errors import SettingsError
from p2d_core.synthetic.world import BASE_FOLDER, write_world

REQUIRED = {"base", "target", "path", "name", "tasks"}


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    from flows.settings_errors import inner_model

    found = [model]
    for field in model.model_fields.values():
        inner = inner_model(field.annotation)
        if inner is not None:
            found += models(inner)
    return found


def test_every_setting_has_a_default_and_a_line_of_help():
    for model in models(RunSettings):
        for name, field in model.model_fields.items():
            assert not field.is_required() or name in REQUIRED, name
            inner = field.annotation
            is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
            text = inner.__doc__ if is_section else field.description
            assert text, name
            assert len(text.splitlines()) == 1, name


def test_paths_are_relative_to_the_settings_file(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep/run.yaml"
    file.write_text("base: ../model\ntarget: {path: data/t.jsonl}\n")
    settings = load_settings(file)
    assert settings.base == str(tmp_path / "model")
    assert settings.target.path == str(tmp_path / "deep/data/t.jsonl")
    assert settings.target.name == "t"


def test_hub_names_stay_as_they_are(tmp_path):
    values = {"base": "b", "target": {"path": "hf://datasets/openai/gsm8k"}}
    assert parse_settings(values, tmp_path / "r.yaml").target.path == "hf://datasets/openai/gsm8k"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("../*.jsonl", "configs"),
        ("..", "configs"),
        ("*.jsonl", "runs"),
        ("/*.jsonl", "files"),
        ("data/pool/chats.v2.jsonl", "chats.v2"),
        ("data/pool", "pool"),
        ("data/pool/*.jsonl", "pool"),
        ("data/pool/part-[0-9].parquet", "pool"),
        ("hf://datasets/me/llama-3.1-data", "llama-3.1-data"),
        ("hf://datasets/me/chats@0123abc", "chats"),
    ],
)
def test_a_source_without_a_name_is_called_what_a_person_would_call_it(tmp_path, path, name):
    values = {"base": "b", "target": {"path": path}}
    assert parse_settings(values, tmp_path / "configs/runs/r.yaml").target.name == name


def test_a_tag_that_mlflow_would_refuse_after_the_run_is_refused_before(tmp_path):
    values = {"base": "b", "target": {"path": "t"}, "tracking": {"tags": {"team (blue)": "x"}}}
    with pytest.raises(SettingsError, match=r"`tracking.tags.team \(blue\).*should match pattern"):
        parse_settings(values, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (3, r"`heads` was 3\. Input should be a mapping of names to values\.$"),
        ({"slices": "qo"}, r"`heads.slices` was 'qo'\. Input should be a list, such as \[first,"),
        (
            {"slices": ["q", "w"]},
            r"`heads.slices.1` was 'w'\. Input should be 'q', 'k', 'v' or 'o'",
        ),
        ({"slices": []}, r"`heads.slices` was \[\]\. The list should have at least 1 item"),
        (
            {"options": "values"},
            r"`heads.options` was 'values'\. Input should be a mapping of names",
        ),
    ],
)
def test_what_is_no_list_or_mapping_is_told_in_the_words_of_yaml(heads, said):
    with pytest.raises(SettingsError, match=said):
        parse_settings({"base": "b", "target": {"path": "t"}, "heads": heads}, Path("my.yaml"))


def test_a_file_that_is_not_there_says_how_to_get_one(tmp_path):
    with pytest.raises(SettingsError, match=r"run.yaml: there is no such file. `p2d config >"):
        load_settings(tmp_path / "run.yaml")


def test_a_file_without_keys_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"needs keys such as `base:` and `target:`"):
        parse_settings(["base"], Path("run.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=1)
    return folder


CHANGES = [
    ("name", "other"),
    ("seed", 7),
    ("precision", "bfloat16"),
    ("device", "cpu"),
    ("threads", 1),
    ("target", {"limit": 190}),
    ("target", {"skip": 2}),
    ("corpus", {"sources": []}),
    ("format", {"separator": " : "}),
    ("format", {"max_tokens": 32}),
    ("evaluation", {"samples": 30}),
    ("evaluation", {"metric": "exact_match"}),
    ("evaluation", {"also": ["perplexity"]}),
    ("proxy", {"samples": 40}),
    ("proxy", {"held_out": 40}),
    ("proxy", {"epochs": 9}),
    ("proxy", {"learning_rate": 1}),
    ("proxy", {"batch_size": 3}),
    ("heads", {"ranker": "gradient"}),
    ("heads", {"options": {"support": "values"}}),
    ("heads", {"slices": ["q", "o"]}),
    ("heads", {"fraction": 0.3}),
    ("heads", {"max_per_layer": 2}),
    ("heads", {"one_per_kv_group": True}),
    ("heads", {"average_over": 2}),
    ("heads", {"proxy_epochs": 9}),
    ("heads", {"proxy_learning_rate": 1}),
    ("scoring", {"scorer": "tfidf"}),
    ("scoring", {"options": {"neighbours": 2}}),
    ("scoring", {"tokens_per_batch": 99}),
    ("scoring", {"depth": 0.5}),
    ("selection", {"fraction": 0.3}),
    ("selection", {"pool": 2}),
    ("selection", {"match_lengths": False}),
    ("selection", {"replay": 0.3}),
    ("selection", {"quotas": {"ledgers": 0.5}}),
    ("selection", {"where": "n_tokens < 200"}),
    ("skip_bad_rows", 3),
    ("training", {"adaptation": "full"}),
    ("training", {"with_proxy": False}),
    ("training", {"epochs": 9}),
    ("training", {"learning_rate": 1}),
    ("training", {"batch_size": 3}),
    ("training", {"group_by_length": True}),
    ("training", {"warmup": 0.5}),
    ("training", {"checkpoint_seconds": 3}),
    ("training", {"gradient_checkpointing": True}),
    ("training", {"micro_batch_tokens": 512}),
    ("training", {"parallel": "fsdp"}),
    ("arms", {"full_learning_rate": 1}),
    ("preset", "paper"),
]


@pytest.mark.parametrize(("section", "change"), CHANGES)
def test_a_changed_setting_reaches_the_stages(world, section, change):
    """What a stage is given differs; what the others do with it their own tests show."""
    values = {
        "base": str(BASE_FOLDER),
        "target": {"path": "target.jsonl"},
        "corpus": {"sources": [{"path": "corpus/ledgers.jsonl"}]},
    }
    given = values | {"evaluation": {"samples": 40}, "heads": {"ranker": "spad"}}

    def handed_on(values) -> tuple:
        settings = parse_settings(values, world / "run.yaml")
        inputs = check_inputs(settings)
        direct = (
            settings.name, settings.proxy.samples, settings.proxy.held_out,
            settings.evaluation.samples, settings.heads.slices, settings.heads.average_over,
            settings.n_proxy_trained_on,
        )  # fmt: skip
        return inputs, make_runtime(settings, world, "run"), direct

    before = given.get(section)
    changed = before | change if isinstance(change, dict) and before else change
    assert handed_on(given | {section: changed}) != handed_on(given)


OF_METRICS = [
    ("exact_match", {"answer_pattern": "(.*)"}),
    ("rouge_l", {"max_new_tokens": 5}),
    ("accuracy", {"choices": "others"}),
    ("accuracy", {"answer": "label"}),
    ("accuracy", {"normalise": "bytes"}),
]


@pytest.mark.parametrize(("metric", "change"), OF_METRICS)
def test_a_setting_of_a_metric_reaches_it_and_is_refused_where_no_metric_reads_it(
    world, tmp_path, metric, change
):
    row = {"prompt": "q", "response": "a", "options": ["a", "b"], "others": ["c", "a"], "label": 1}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")

    def evaluated(**evaluation):
        values = {
            "base": str(BASE_FOLDER),
            "target": {"path": str(world / "target.jsonl")},
            "evaluation": {"source": {"path": "asked.jsonl"}} | evaluation,
        }
        return check_inputs(parse_settings(values, tmp_path / "run.yaml")).evaluating

    needed = {"metric": metric} | ({"choices": "options"} if metric == "accuracy" else {})
    assert evaluated(**needed | change).identity != evaluated(**needed).identity
    (name,) = change
    told = f"evaluation.{name} is .* but loss and perplexity do not read it. .* {metric}"
    with pytest.raises(SettingsError, match=told):
        evaluated(metric="perplexity", **change)


def test_a_preset_gives_what_the_file_leaves_out_and_nothing_else():
    given = {"base": "b", "target": {"path": "t"}, "preset": "paper", "heads": {"fraction": 0.2}}
    settings = RunSettings.model_validate(given)
    assert (settings.heads.ranker, settings.heads.fraction) == ("spad", 0.2)
    assert settings.scoring.scorer == "icl-attention"
    own = RunSettings.model_validate(given | {"heads": {"ranker": "taylor"}})
    assert own.heads.ranker == "taylor"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32),
        ("compare", {"seeds": [2**32]}),
        ("selection", {"pool": float("inf")}),
        ("scoring", {"enough": float("inf")}),
    ],
)
def test_numbers_that_no_stage_could_take_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        RunSettings.model_validate({"base": "b", "target": {"path": "t"}, key: value})


def test_options_of_a_preset_belong_to_its_plugin():
    given = {"base": "b", "target": {"path": "t"}, "preset": "paper"}
    assert RunSettings.model_validate(given).scoring.options == {"bias": "per-token"}
    other = RunSettings.model_validate(given | {"scoring": {"scorer": "tfidf"}})
    assert other.scoring.options == {}
    same = RunSettings.model_validate(given | {"scoring": {"scorer": "icl-attention"}})
    assert same.scoring.options == {"bias": "per-token"}


def test_the_learning_rate_of_a_preset_is_that_of_its_adaptation():
    given = {"base": "b", "target": {"path": "t"}, "preset": "cheap"}
    assert RunSettings.model_validate(given).training.learning_rate == 3e-3
    lora = RunSettings.model_validate({**given, "training": {"adaptation": "lora"}})
    assert (lora.training.adaptation, lora.training.learning_rate) == ("lora", "auto")
    assert lora.heads.proxy_learning_rate == 3e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_one_that_a_run_takes(world, preset):
    """Its plugins are there and take its options."""
    values = {
        "base": str(BASE_FOLDER),
        "target": {"path": "target.jsonl"},
        "corpus": {"sources": [{"path": "corpus/ledgers.jsonl"}]},
        "evaluation": {"samples": 40},
        "preset": preset,
    }
    check_inputs(parse_settings(values, world / "run.yaml"))


@pytest.mark.parametrize("preset", ["papre", ["paper"], {"paper": 1}, 3])
def test_what_is_no_preset_is_named_with_those_that_are(preset):
    with pytest.raises(SettingsError, match=r"`preset` .*'default', 'paper' or 'cheap'"):
        parse_settings({"base": "b", "target": {"path": "t"}, "preset": preset}, Path("my.yaml"))


def test_settings_that_were_written_out_whole_read_back_the_same():
    given = {"base": "b", "target": {"path": "t"}, "preset": "paper"}
    settings = RunSettings.model_validate(given)
    assert RunSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_choices_of_a_comparison_that_differ_have_names_that_do():
    shares = [{"name": "frobenius", "fraction": share} for share in (0.1, 0.25)]
    labelled = [share | {"label": f"{share['fraction']:.0%}"} for share in shares]
    assert [each.shown for each in CompareSettings(rankers=labelled).rankers] == ["10%", "25%"]
    with pytest.raises(ValidationError, match="two of them are called 'frobenius'; give each a l"):
        CompareSettings(rankers=shares)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [(-1, "greater than 0, or 'auto'"), ("fast", "a valid number, .*, or 'auto'")],
)
def test_where_a_number_or_a_word_would_do_both_are_said_once(given, wrong):
    values = {"base": "b", "target": {"path": "t"}, "training": {"learning_rate": given}}
    with pytest.raises(SettingsError, match=rf"`training.learning_rate` was .*{wrong}\. It means"):
        parse_settings(values, Path("my.yaml"))
