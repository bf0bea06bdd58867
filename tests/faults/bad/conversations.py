"""Bad conversations: a row of messages among good ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.faults.bad.job import DOORS, Bad, Job

ASK = {"role": "user", "content": "copy 1"}
ANSWER = {"role": "assistant", "content": "word 1"}
BAD_ROWS: dict[str, Any] = {
    "messages are a text": "user: copy 1",
    "messages are an object": {"role": "user", "content": "copy 1"},
    "messages are a number": 7,
    "no messages": None,
    "an empty list": [],
    "a message is a text": [ASK, "word 1"],
    "a message is a list": [ASK, ["assistant", "word 1"]],
    "a message is null": [ASK, None],
    "no role": [ASK, {"content": "word 1"}],
    "an unknown role": [ASK, {"role": "narrator", "content": "word 1"}],
    "a role that is a number": [ASK, {"role": 3, "content": "word 1"}],
    "a role that is a list": [ASK, {"role": ["assistant"], "content": "word 1"}],
    "no content": [ASK, {"role": "assistant"}],
    "content is null": [ASK, {"role": "assistant", "content": None}],
    "content is a number": [ASK, {"role": "assistant", "content": 5}],
    "content is an object": [ASK, {"role": "assistant", "content": {"text": "word 1"}}],
    "an empty answer": [ASK, {"role": "assistant", "content": ""}],
    "a blank question": [{"role": "user", "content": " \n"}, ANSWER],
    "no answer": [ASK],
    "no question": [ANSWER],
    "an answer to nothing but a system turn": [{"role": "system", "content": "Be brief."}, ANSWER],
    "a system turn in the middle": [ASK, {"role": "system", "content": "Be brief."}, ANSWER],
    "a tool's turn": [ASK, {"role": "tool", "content": "3"}, ANSWER],
    "a function's call": [ASK, ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}],
    "tool calls": [ASK, ANSWER | {"tool_calls": [{"id": "a"}]}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
    "a part without text": [{"role": "user", "content": [{"type": "text"}]}, ANSWER],
    "a part that is a number": [{"role": "user", "content": [4]}, ANSWER],
    "a part whose text is a number": [
        {"role": "user", "content": [{"type": "text", "text": 4}]}, ANSWER,
    ],
    "an answer with weight 0": [ASK, ANSWER | {"weight": 0}],
    "an escaped NUL": [ASK, {"role": "assistant", "content": "a\0b"}],
    "a lone surrogate": [ASK, {"role": "assistant", "content": "\ud83d"}],
    "ShareGPT's keys, half of them": [{"from": "human", "content": "copy 1"}, ANSWER],
}  # fmt: skip


def conversations() -> Iterator[Bad]:
    for door in DOORS:
        for name, messages in BAD_ROWS.items():

            def breaks(
                job: Job, rng: random.Random, door: str = door, messages: Any = messages
            ) -> None:
                rows: list[Any] = [
                    {
                        "messages": [
                            {"role": "user", "content": row["prompt"]},
                            {"role": "assistant", "content": row["response"]},
                        ]
                    }
                    for row in job.rows[door]
                ]
                job.set("format.template", "plain")  # the base is no chat model
                rows[rng.randrange(1, len(rows))] = {"messages": messages}
                job.write(f"{door}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

            yield Bad(f"conversations, {door}: {name}", breaks, f"{door}.jsonl, line ")
