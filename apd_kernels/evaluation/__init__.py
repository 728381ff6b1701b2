"""Evaluation: k-NN, CMC and mAP, re-ranking."""
