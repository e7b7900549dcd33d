"""The partitioners, one a file."""

from fedllm.data.partitioners.by import By, client_name
from fedllm.data.partitioners.dirichlet import Dirichlet
from fedllm.data.partitioners.iid import Iid
from fedllm.data.partitioners.pathological import Pathological
from fedllm.data.partitioners.shard import Shard
from fedllm.data.partitioners.size_skew import SizeSkew

__all__ = ["By", "Dirichlet", "Iid", "Pathological", "Shard", "SizeSkew", "client_name"]
