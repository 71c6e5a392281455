"""The mathematics in plain torch: estimators, encodings, tables, and the custom operations."""
