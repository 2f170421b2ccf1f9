"""``make reproduce-app``: what it costs to take a concept away, by four methods (Fereidouni et al., arXiv 2508.15094)."""
