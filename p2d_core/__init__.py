"""P2D: the attention heads that a task needs choose its data and are what fine-tuning moves."""
