"""P2D flows."""
