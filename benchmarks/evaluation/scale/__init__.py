"""What a gateway costs, and what it can follow, by the number of its members."""
