"""Distributed training: the FSDP2 strategy, its sharding, collectives, and lockstep of ranks with uneven batches."""
