"""Policies: network-free velocity fields predicted once per segment."""

from piflow_jax.flow.policies.arcflow import ArcFlowPolicy, ArcOutput
from piflow_jax.flow.policies.base import Policy
from piflow_jax.flow.policies.dx import DXPolicy
from piflow_jax.flow.policies.gmflow import GMFlowPolicy, GMOutput

__all__ = ["ArcFlowPolicy", "ArcOutput", "DXPolicy", "GMFlowPolicy", "GMOutput", "Policy"]
