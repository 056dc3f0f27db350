"""Documents to shards: vocabulary, best-fit rows, Parquet files with a manifest."""
