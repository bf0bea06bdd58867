"""A model's results on tasks of lm-eval, with their standard errors."""

from __future__ import annotations

import math
from typing import Any

import torch

from p2d_core.errors import EvaluationError, P2DError
from p2d_core.evaluation.harness.contained import contained
from p2d_core.evaluation.harness.tasks import HarnessSpec, loaded_tasks
from p2d_core.progress import Progress, no_progress

RESAMPLES = 1000
"""Of the bootstrap, for metrics whose standard error has no formula."""


def run_tasks(
    model: Any,
    tokenizer: Any,
    spec: HarnessSpec,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Runs the tasks as the command ``lm-eval`` would on the same weights and tokenizer.

    Args:
        model: a causal language model, on its device.
        tokenizer: one of its own: lm-eval changes it.
        limit: first documents of each task, to try; the spec's if None.
        progress: is told of the requests that the model has seen.

    Returns:
        A row a task (or group), metric and filter: ``task``, ``metric`` (with the filter's name
        behind a slash where there is one), ``value``, ``stderr`` (None where there is none),
        ``samples``, ``higher_is_better``.

    Raises:
        EvaluationError: lm-eval could not run them.
        SettingsError: the tasks have changed since they were checked.
    """
    with contained():
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        class Told(HFLM):  # type: ignore[misc]
            """Says how far it is."""

            asked = done = 0

            def tell(self, rows: int) -> None:
                self.done = min(self.done + rows, self.asked)
                progress(self.done, self.asked)

            def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
                made = super()._model_call(inps, *args, **kwargs)
                self.tell(len(inps))
                return made

            def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
                made = super()._model_generate(context, *args, **kwargs)
                self.tell(len(context))
                return made

            def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
                self.asked += len(requests)
                return super().loglikelihood(requests, *args, **kwargs)

            def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
                self.asked += len(requests)
                return super().loglikelihood_rolling(requests, *args, **kwargs)

            def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
                self.asked += len(requests)
                return super().generate_until(requests, *args, **kwargs)

        tasks = loaded_tasks(spec)
        try:
            found = evaluate(
                lm=Told(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                task_dict=tasks,
                limit=limit or spec.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
        except (P2DError, torch.OutOfMemoryError, OSError):
            raise
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:400].rstrip(".")
            raise EvaluationError(
                f"lm-eval could not run {', '.join(spec.tasks)} ({said}). What is finished is "
                "kept: mend the task, or leave it out of evaluation.harness.tasks."
            ) from error
    return _rows(found)


def _rows(found: Any) -> list[dict[str, Any]]:
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kept}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if kept == "none" else f"{metric}/{kept}",
                    "value": float(value) if math.isfinite(value) else None,
                    "stderr": float(stderr) if _is_finite(stderr) else None,
                    "samples": int(values.get("sample_len", 0)),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                }
            )
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
