"""The command line: one file a noun, `app.py` puts them together, `main.py` is where `ael` begins."""
