"""Benchmark suites, one file per operation: ours beside eager PyTorch, `torch.compile` and installed peers."""
