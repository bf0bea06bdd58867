"""EleutherAI's lm-eval on a model that P2D made: which tasks, what they hold, what came of them.

It is an extra (`pip install 'p2d[eval]'`) and slow to import: only where it is used.
"""

from p2d_core.evaluation.harness.running import run_tasks
from p2d_core.evaluation.harness.tasks import HarnessSpec, checked_tasks, documents_of

__all__ = ["HarnessSpec", "checked_tasks", "documents_of", "run_tasks"]
