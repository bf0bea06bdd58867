"""The report of a run: gathered once, shown as MLflow's note and as an HTML file."""
