"""The `p2d` command: one file a command, nothing heavy imported before it is needed."""
