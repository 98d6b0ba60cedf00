"""How a run resumes: which checkpoint it starts from, and what it passes over."""
