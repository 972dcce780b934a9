"""The chapters of the demo, one function each: measure, draw, say what was found."""

from headwise.report.chapters.cache import budgets, generation, plan
from headwise.report.chapters.heads import ablation, scores
from headwise.report.chapters.routing import routing

__all__ = ["ablation", "budgets", "generation", "plan", "routing", "scores"]
