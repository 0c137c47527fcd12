"""The only place where SQL runs: opening, loading, committing, reading, upgrading."""
