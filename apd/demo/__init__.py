"""The demonstration on drawn people."""
