"""What rounding does to a weight, a layer and the network."""
