"""Every operation in plain PyTorch: the oracle of the tests (in float64) and the path for CPUs and other devices."""
