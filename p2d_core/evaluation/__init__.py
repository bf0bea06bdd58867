"""What an adapted model can do."""
