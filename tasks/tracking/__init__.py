"""What a run leaves in MLflow, an idea a file."""
