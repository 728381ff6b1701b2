"""What a CUDA device says in ten minutes."""
