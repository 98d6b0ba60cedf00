"""How checkpoints route a text, and what dispatch costs on clusters."""
