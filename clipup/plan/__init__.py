"""What a training run will need: memory of a GPU, traffic of a step, hours and price, computed without weights."""

from ..train.cards import CARDS, Card, card
from .cost import Rates
from .plan import Cluster, Plan, plan, propose
from .subject import Subject

__all__ = ["CARDS", "Card", "Cluster", "Plan", "Rates", "Subject", "card", "plan", "propose"]
