"""Networks run by something other than torch."""
