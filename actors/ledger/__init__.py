"""What was used and what it costs: one append-only ledger, one desk per process."""
