"""The command line: ``editserver serve | demo | doctor | sae``."""
