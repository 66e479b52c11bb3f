"""A model as a graph of ops over 2-D values; the catalogue, fusion and the cost model."""

from hexad.graph.graph import Graph
from hexad.graph.node import Node, RopeSpec

__all__ = ["Graph", "Node", "RopeSpec"]
