"""What P2D costs, each time against something that a reader knows the price of."""
