"""Check a cluster: Megatron's own loop on small models, on every layout that the ranks allow."""
