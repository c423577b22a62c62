"""How much a loss feels each weight, of any module."""
