"""One measurement over the whole job: who computes what, and the collectives that share it."""
