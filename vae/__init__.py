"""Decoding on several ranks without a seam: strips of rows around an unmodified decoder, or its tiles dealt out."""
