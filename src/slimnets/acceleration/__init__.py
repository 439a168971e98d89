"""What makes a compressed network run faster."""
