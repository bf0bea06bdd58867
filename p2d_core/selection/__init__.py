"""From scores to the subset that training sees, in DuckDB."""
