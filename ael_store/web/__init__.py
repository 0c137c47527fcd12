"""The dashboard: `ael web`, and `ael run --web`. How it is made: `docs/decisions/0012-dashboard.md`."""
