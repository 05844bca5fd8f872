"""Where runs are kept: a folder each, which is the truth, and a DuckDB file, which is the index."""
