"""Every operation in Triton, with its launcher and its tile sizes. Imported only when a Triton operation runs."""
