"""The scheduler core: which request runs when, in which blocks. Token ids and block ids only; never torch."""
