"""Several ranks: the FSDP2 strategy and its sharding, collectives, and keeping ranks on one sequence of collectives."""
