"""Bad model folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.bad.job import Bad, Job, deep


def _config(**changes: Any) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        file = base / "config.json"
        values = json.loads(file.read_text()) | changes
        values = {key: value for key, value in values.items() if value != "gone"}
        file.write_text(json.dumps(values))

    return breaks


def _text_of(name: str, text: str | bytes) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return breaks


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        data = (base / name).read_bytes()
        (base / name).write_bytes(data[: rng.randrange(1, len(data) - 1)])

    return breaks


def _removed(name: str) -> Callable[[Path, random.Random], None]:
    return lambda base, rng: (base / name).unlink()


def _weights(change: Callable[[dict[str, torch.Tensor], str], None], part: str) -> Any:
    def breaks(base: Path, rng: random.Random) -> None:
        weights = load_file(base / "model.safetensors")
        change(weights, rng.choice(sorted(name for name in weights if part in name)))
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    return breaks


def _put(value: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    def change(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name].view(-1)[-1] = value

    return change


def _shaped(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = torch.zeros(3, 5)


def _sharded(*names: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / "model.safetensors").rename(base / "model-00001.safetensors")
        tensors = load_file(base / "model-00001.safetensors")
        placed = {tensor: names[i % len(names)] for i, tensor in enumerate(tensors)}
        text = json.dumps({"metadata": {}, "weight_map": placed})
        (base / "model.safetensors.index.json").write_text(text)

    return breaks


def _only_pickled(name: str) -> Callable[[Path, random.Random], None]:
    return lambda base, rng: (base / "model.safetensors").rename(base / name) and None


def _index(text: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / "model.safetensors").rename(base / "model-1.safetensors")
        (base / "model.safetensors.index.json").write_text(text)

    return breaks


REMOTE = {"AutoModelForCausalLM": "modeling_evil.Evil"}
BAD_MODELS: dict[str, tuple[Callable[[Path, random.Random], None], str]] = {
    "no config": (_removed("config.json"), "config.json"),
    "an empty config": (_text_of("config.json", ""), "config.json"),
    "a cut config": (_cut("config.json"), "config.json"),
    "a config that is a list": (_text_of("config.json", "[]"), "config.json"),
    "a config of random bytes": (_text_of("config.json", b"\xff\xfe\x00{"), "config.json"),
    "a config nested too deeply": (_text_of("config.json", deep(100_000)), "config.json"),
    "no model type": (_config(model_type="gone"), "model_type"),
    "a model type that nobody knows": (_config(model_type="evil"), "evil"),
    "a model type that is a number": (_config(model_type=7), "model_type"),
    "a model type with a path": (_config(model_type="../../evil"), "evil"),
    "a model that is no language model": (_config(model_type="vit"), "base"),
    "an encoder and decoder": (_config(model_type="t5"), "base"),
    "remote code": (_config(auto_map=REMOTE), "auto_map"),
    "remote code on a hub": (_config(auto_map={"AutoConfig": "evil/repo--m.C"}), "auto_map"),
    "remote code in a part": (_config(text_config={"auto_map": REMOTE}), "auto_map"),
    "remote attention": (_config(attn_implementation="evil/kernel"), "attn_implementation"),
    "remote attention, inside": (
        _config(x={"_attn_implementation": "evil/kernel:run"}), "attn_implementation"
    ),
    "remote code of the tokenizer": (
        _text_of("tokenizer_config.json", json.dumps({"auto_map": REMOTE})), "tokenizer_config.json"
    ),
    "remote code of generating": (
        _text_of("generation_config.json", json.dumps({"auto_map": REMOTE})), "generation_config",
    ),
    "an adapter": (
        _text_of("adapter_config.json", json.dumps({"base_model_name_or_path": "/other"})),
        "adapter_config.json",
    ),
    "more layers than weights": (_config(num_hidden_layers=5), "config.json"),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "minus one layer": (_config(num_hidden_layers=-1), "base"),
    "no layers": (_config(num_hidden_layers=0), "base"),
    "layers as text": (_config(num_hidden_layers="four"), "base"),
    "another width": (_config(hidden_size=64), "config.json"),
    "no width": (_config(hidden_size=0), "base"),
    "a width below zero": (_config(hidden_size=-128), "base"),
    "a width that heads do not divide": (_config(hidden_size=130, head_dim="gone"), "base"),
    "heads of another number": (_config(num_attention_heads=16), "base"),
    "no heads": (_config(num_attention_heads=0), "base"),
    "more groups than heads": (_config(num_key_value_heads=64), "base"),
    "groups that do not divide": (_config(num_key_value_heads=3), "base"),
    "another vocabulary": (_config(vocab_size=7), "base"),
    "positions below zero": (_config(max_position_embeddings=-5), "max_position_embeddings"),
    "positions as text": (_config(max_position_embeddings="many"), "max_position_embeddings"),
    "positions as a list": (_config(max_position_embeddings=[1]), "max_position_embeddings"),
    "another activation": (_config(hidden_act="evil"), "base"),
    "NaN in the config": (_config(rms_norm_eps="x"), "base"),
    "no weights": (_removed("model.safetensors"), "safetensors"),
    "empty weights": (_text_of("model.safetensors", b""), "model.safetensors"),
    "cut weights": (_cut("model.safetensors"), "model.safetensors"),
    "weights of random bytes": (
        _text_of("model.safetensors", random.Random(1).randbytes(5000)), "model.safetensors"
    ),
    "weights with a header beyond the file": (
        _text_of("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"), "model.safetensors"
    ),
    "weights that are pickled": (
        _text_of("model.safetensors", b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "model.safetensors"
    ),
    "pickled weights only": (_only_pickled("pytorch_model.bin"), "pytorch_model.bin"),
    "a checkpoint only": (_only_pickled("model.ckpt"), "model.ckpt"),
    "weights of torch only": (_only_pickled("model.pt"), "model.pt"),
    "weights under another name": (_only_pickled("weights.safetensors"), "model.safetensors"),
    "a query of another shape": (_weights(_shaped, "q_proj"), "q_proj"),
    "a norm of another shape": (_weights(_shaped, "norm"), "norm"),
    "an embedding of another shape": (_weights(_shaped, "embed_tokens"), "embed_tokens"),
    "NaN in a query": (_weights(_put(float("nan")), "q_proj"), "q_proj"),
    "NaN in an embedding": (_weights(_put(float("nan")), "embed_tokens"), "embed_tokens"),
    "an infinite norm": (_weights(_put(float("inf")), "norm"), "norm"),
    "a key that is infinite": (_weights(_put(float("-inf")), "k_proj"), "k_proj"),
    "no query": (_weights(lambda weights, name: weights.pop(name), "q_proj"), "q_proj"),
    "no mlp": (_weights(lambda weights, name: weights.pop(name), "mlp"), "mlp"),
    "no weights of layer 3": (
        _weights(
            lambda weights, _: [weights.pop(n) for n in list(weights) if ".3." in n] and None, "q"
        ),
        "layers.3",
    ),
    "an index that is no JSON": (
        _index("{"),
        "model.safetensors.index.json",
    ),
    "an index without files": (
        _index("{}"),
        "weight_map",
    ),
    "a shard that is not there": (
        _sharded("model-00001.safetensors", "model-00002.safetensors"), "model-00002.safetensors"
    ),
    "a shard out of the folder": (
        _sharded("model-00001.safetensors", "../other.safetensors"), "../other.safetensors"
    ),
    "an absolute shard": (
        _sharded("model-00001.safetensors", "/etc/other.safetensors"), "/etc/other.safetensors"
    ),
    "a pickled shard": (
        _sharded("model-00001.safetensors", "model-00002.bin"), "model-00002.bin"
    ),
    "no tokenizer": (
        lambda base, rng: [f.unlink() for f in base.glob("tokenizer*")] and None, "tokenizer"
    ),
    "a cut tokenizer": (_cut("tokenizer.json"), "tokenizer"),
    "an empty tokenizer": (_text_of("tokenizer.json", ""), "tokenizer"),
    "a tokenizer that is a list": (_text_of("tokenizer.json", "[]"), "tokenizer"),
    "a tokenizer of random bytes": (_text_of("tokenizer.json", b"\xff\x00\x80"), "tokenizer"),
}  # fmt: skip


def models() -> Iterator[Bad]:
    for name, (change, named) in BAD_MODELS.items():
        for draw in range(3 if "cut" in name else 1):

            def breaks(job: Job, rng: random.Random, change: Any = change) -> None:
                change(job.own_base(), rng)

            yield Bad(f"model: {name} ({draw})", breaks, named)
