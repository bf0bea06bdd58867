"""Which parameters move, how they are trained, and what of it is kept."""
