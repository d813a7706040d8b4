"""All that lies in the directory of a run. Knows no ranks: rank 0 writes."""
