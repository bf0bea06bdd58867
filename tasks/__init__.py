"""P2D tasks."""
