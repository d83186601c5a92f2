"""What at least two fields need."""
