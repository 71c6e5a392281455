"""Joint graphs: what operations do, names, cones, edits; and everything private of torch."""
