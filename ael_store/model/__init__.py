"""Values and contracts: what a unit of work is, reads and returns. No I/O."""
