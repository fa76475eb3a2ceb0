"""From per-example losses to one private update."""
