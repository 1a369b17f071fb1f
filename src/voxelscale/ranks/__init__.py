"""Who takes part: ranks and virtual workers, starting ranks under torchrun's engine, faults of a rank."""
