"""The loop: trigger, select, tick, deliver, commit, measure. No SQL here."""
