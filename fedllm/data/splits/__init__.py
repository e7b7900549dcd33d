"""The splits, one a file."""

from fedllm.data.splits.by import By, client_name
from fedllm.data.splits.dirichlet import Dirichlet
from fedllm.data.splits.iid import Iid
from fedllm.data.splits.pathological import Pathological
from fedllm.data.splits.shard import Shard
from fedllm.data.splits.size_skew import SizeSkew

__all__ = ["By", "Dirichlet", "Iid", "Pathological", "Shard", "SizeSkew", "client_name"]
