"""Pages that people read: a run, a search, their sections."""
