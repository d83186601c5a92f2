"""The desk: catalogue, claim, verdict, store, runners, search, listing import, report."""
