"""Ablations, domain-generalization protocols and the test with hard samples."""
