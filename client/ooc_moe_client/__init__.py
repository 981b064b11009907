"""A trainer's side of the store: the channel to the daemon, the HBM cache of experts, prefetch and write-back."""
