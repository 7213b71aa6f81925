"""Plain text to packed rows of token ids."""
