"""The model card of an export: what it is, what from, how good, at what cost, how it is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from p2d_core.export.exporting import Exported
from p2d_core.export.rounding import Shift
from p2d_core.samples.source import HUB_PREFIX
from p2d_core.store import ArtifactRef
from tasks.report.markdown import code, escaped, further_tables, table
from tasks.report.page import Page
from tasks.summary import Summary
from tasks.verdict import ARM_NAMES, verdict

CARD, PICTURE = "README.md", "heads.png"
UNKNOWN = "unknown"
LIBRARIES = {"lora": "peft", "merged": "transformers", "delta": "transformers"}
WHAT = {
    "lora": "a LoRA adapter for PEFT, to be loaded over the base",
    "merged": "the whole adapted model",
    "delta": "the numbers that differ from the base, to be written into it",
}
LOADING = {
    "lora": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({base}{at})
model = AutoModelForCausalLM.from_pretrained({base}{at}, dtype="{dtype}")
model = PeftModel.from_pretrained(model, ".")
""",
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")
""",
    "delta": """\
import json, safetensors.torch, torch, transformers
places, new = json.load(open("delta.json")), safetensors.torch.load_file("delta.safetensors")
model = transformers.AutoModelForCausalLM.from_pretrained({base}{at}, dtype="{dtype}")
for name, at in places["slices"].items():
    model.get_parameter(name).data.index_copy_(at["dim"], torch.tensor(at["index"]), new[name])
""",
}


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    model: ArtifactRef
    arm: str
    """Of the run; empty where no run names the model."""
    summary: Summary | None
    exported: Exported
    base: str
    """Folder of the base."""
    base_name: str
    """What it is called instead, such as a hub's name for it; empty: by its folder."""
    base_revision: str
    """Commit of the base on the hub; empty where it is a folder."""
    license_id: str
    has_picture: bool

    @property
    def is_p2d(self) -> bool:
        """Whether it is the adapted model itself, not an arm that it was compared with."""
        return self.arm in ("", "p2d")

    @property
    def trained(self) -> str:
        """On what, and which parameters; of an arm."""
        if self.summary is None:
            return ""
        return next(
            (words for arm, _, words, *_ in _page(self.summary).arms if arm == self.arm), ""
        )

    @property
    def base_words(self) -> str:
        """The base, as a reader is told it."""
        return self.base_name or Path(self.base).name


def as_card(card: Card) -> str:
    """Markdown with YAML front matter, as model hubs read it."""
    front = {
        "base_model": card.base_words,
        "library_name": LIBRARIES[card.exported.form],
        "pipeline_tag": "text-generation",
        "license": card.license_id,
        "tags": ["p2d", card.exported.form],
    }
    target = f" adapted to {card.summary.target}" if card.summary is not None else ", adapted"
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {escaped(card.base_words + target)}", ""]
    lines += [
        f"This is {WHAT[card.exported.form]}. It was made by P2D {version('p2d')}, which finds the "
        "attention heads that a domain moves, and lets them choose the training data (arXiv "
        "2605.21558)."
        if card.is_p2d
        else f"This is {WHAT[card.exported.form]}. It is an arm that P2D {version('p2d')} was "
        f"compared with: {ARM_NAMES[card.arm]}.",
        "",
        "## How to load it",
        "",
        "In this folder:",
        "",
        "```python",
        *loading(card.exported, card.base_name or card.base, card.base_revision),
        "```",
        "",
        *(f"- {escaped(sentence)}" for sentence in precision_words(card.exported)),
    ]
    lines += ["", "## What it was made from", "", *_facts(card)]
    if card.summary is None:
        lines += ["", "No run of the store that it came from names it: its quality is not known."]
    else:
        lines += _of_run(card, card.summary)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def loading(exported: Exported, base: str, revision: str = "") -> list[str]:
    """Lines of Python that load it, run in its folder."""
    text = LOADING[exported.form].format(
        base=json.dumps(base, ensure_ascii=False),
        at=f', revision="{revision}"' if revision else "",
        dtype=exported.dtype,
    )
    return text.splitlines()


def license_of(base: Path) -> str:
    """What the base's own card says; unknown where it has none."""
    try:
        text = (base / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        found = front["license"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return UNKNOWN
    return found if isinstance(found, str) and found else UNKNOWN


def precision_words(exported: Exported) -> list[str]:
    """What rounding does, and how far logits are from the adapted model's, as it was measured."""
    sentences = []
    if exported.dtype == exported.precision:
        sentences.append(f"It was adapted in {exported.precision} and is exported in it.")
    else:
        lost = exported.rounding
        sentences.append(
            f"It was adapted in {exported.precision} and is exported for {exported.dtype}. Of "
            f"{lost.moved:,} numbers that moved, rounding gives {lost.lost:,} "
            f"({lost.share_lost:.1%}) the base's value back."
        )
        if exported.form == "lora":
            sentences.append(
                "As an adapter it keeps its changes in float32, and none is lost; once it is "
                "merged, those are."
            )
    shifts: dict[str, Shift | None] = {"as loaded": exported.as_loaded}
    if exported.form == "lora":
        shifts["merged"] = exported.when_merged
    for when, found in shifts.items():
        if found is not None:
            sentences.append(
                f"Logits on a few proxy samples, {when}: at most {found.highest:.2g} and on "
                f"average {found.mean:.2g} from the adapted model's own in {exported.precision}, "
                f"which reach {found.largest:.2g}."
            )
    if exported.compared:
        merged = "merged, " if exported.form == "lora" else ""
        rounded = "" if exported.dtype == exported.precision else f", rounded to {exported.dtype}"
        sentences.append(
            f"Read back and {merged}compared: every moved weight is the adapted model's{rounded}, "
            "bit for bit, and every other the base's."
        )
    return sentences


def _facts(card: Card) -> list[str]:
    manifest = card.model.manifest
    commit = f" at commit {code(card.base_revision)}" if card.base_revision else ""
    rows = {
        "base model": f"{escaped(card.base_words)}{commit}, SHA-256 of its files "
        f"{code(manifest.inputs['base']['sha256'])}",
        "adaptation": f"{escaped(str(manifest.facts['adaptation']))}: "
        f"{manifest.facts['trainable']:,} parameters moved, "
        f"{manifest.facts['share_of_model']:.1%} of the model",
        "model artifact": code(card.model.key),
        "license": f"{escaped(card.license_id)} (look at those of the base and of the data)",
    }
    if card.summary is not None:
        page = _page(card.summary)
        rows |= {
            "target": escaped(card.summary.target),
            "corpus": _corpus(card.summary),
            **_datasets(card.summary),
        }
        # of another arm than P2D's neither the data nor, of full fine-tuning, the heads
        if card.is_p2d:
            rows["data"] = escaped(page.data_text)
        else:
            rows["trained"] = escaped(card.trained)
        if card.arm != "full":
            rows["task heads"] = escaped(page.heads_text)
        rows["run"] = code(card.summary.run_id)
    return table(["", ""], rows.items(), gap="")


def _of_run(card: Card, summary: Summary) -> list[str]:
    page, quality = _page(summary), summary.quality
    lines: list[str] = []
    if card.arm != "full":
        lines += ["", "## Task heads", "", escaped(page.heads_text)]
        if summary.heads is not None:
            ids = [f"layer {layer} head {head}" for layer, head in sorted(summary.heads.ids)]
            lines[-1:] = [lines[-1] + ":", "", ", ".join(ids)]
        if card.has_picture:
            lines += ["", f"![every query head with its rank]({PICTURE})"]
    if card.is_p2d:
        columns = ["source", ">chosen", ">in the corpus", ">share"]
        sources = ([escaped(cell) for cell in row] for row in page.sources)
        lines += ["", "## Data", *table(columns, sources, gap="")]
    lines += [""]
    better = "higher" if quality.higher_is_better else "lower"
    columns = ["", "trained", f">{escaped(page.metric)} ({better} is better)", ">retention"]
    columns.append(">loss (nats a response token)")
    rows = []
    for arm, *cells in page.arms:
        name, *others = (escaped(cell) for cell in cells)
        loss = f"{quality.losses[arm]:.3f}" if arm in quality.losses else ""
        rows.append([f"**{name}**" if arm == card.arm else name, *others, loss])
    lines += ["## Quality", *table(columns, rows, gap=""), *further_tables(summary, gap="")]
    lines += [f"- {escaped(sentence)}" for sentence, _ in verdict(summary)]
    aer = summary.aer
    return [
        *lines,
        "",
        "## Cost",
        "",
        f"Alignment Efficiency Ratio {escaped(page.aer_text)}: selecting and training over full "
        f"fine-tuning on the whole corpus ({aer.full_seconds:.1f} s, {aer.reference}).",
    ]


def _corpus(summary: Summary) -> str:
    sources = summary.selection.corpus_by_source
    return f"{summary.selection.corpus:,} samples of {escaped(', '.join(sorted(sources)))}"


def _datasets(summary: Summary) -> dict[str, str]:
    """Those of the hub, with their commits."""
    found = [code(name) for name in summary.hub if name.startswith(HUB_PREFIX)]
    return {"hub datasets": ", ".join(found)} if found else {}


def _page(summary: Summary) -> Page:
    """For its words; what it shows beside the summary is not read."""
    return Page(summary, "", "", "", "", {}, (), (), (), {})
