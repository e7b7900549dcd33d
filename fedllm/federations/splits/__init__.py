"""The splits, one a file."""

from fedllm.federations.splits.by import By, client_name
from fedllm.federations.splits.dirichlet import Dirichlet
from fedllm.federations.splits.iid import Iid
from fedllm.federations.splits.pathological import Pathological
from fedllm.federations.splits.shard import Shard
from fedllm.federations.splits.size_skew import SizeSkew

__all__ = ["By", "Dirichlet", "Iid", "Pathological", "Shard", "SizeSkew", "client_name"]
