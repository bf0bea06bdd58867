"""Arms side by side: what was chosen and how it was trained, against what came of it."""
