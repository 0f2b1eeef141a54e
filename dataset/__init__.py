"""Tasks in, batches out: sources and builders of datasets, their files, and how they are sampled."""
