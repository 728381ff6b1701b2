"""The gallery: FAISS indexes with keys, labels and a folder on disk."""
