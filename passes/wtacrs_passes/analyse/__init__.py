"""What a joint graph says: products, readers, functions, ranges, annotations, zero rows."""
