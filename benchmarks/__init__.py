"""What the loop costs, measured beside plain `sqlite3`: `python -m benchmarks`, or `./dev bench`."""
