"""Healthy models, and what verdicts say of them with every threshold at its value and twice as sensitive."""
