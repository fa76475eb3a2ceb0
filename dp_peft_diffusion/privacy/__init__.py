"""What is promised: the mechanism, its price, its sampling and its record. No torch."""
