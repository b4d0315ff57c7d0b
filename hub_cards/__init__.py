"""Model cards: a template for each family, which `modeling_sumagg.publishing.hub` fills, and the cards of what was trained."""
