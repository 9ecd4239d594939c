"""Settings that cannot be combined: a trainer over several machines."""

from __future__ import annotations

import ipaddress

from async_rl.config.settings import Settings


def nodes_need_an_external_trainer(s: Settings) -> str:
    chosen = s.trainer
    if chosen.nodes == 1:
        return ""
    if s.cluster.engine != "local":
        return (
            f"trainer.nodes={chosen.nodes} does nothing with cluster.engine={s.cluster.engine}, which places ranks by "
            "cluster.ranks_per_node; leave it out"
        )
    if chosen.start != "external":
        return (
            f"trainer.nodes is {chosen.nodes}, but the run starts its ranks on its own machine; set "
            "trainer.start=external, and start them with torchrun on each machine"
        )
    if chosen.ranks % chosen.nodes:
        return f"trainer.nodes is {chosen.nodes}, which does not divide trainer.ranks={chosen.ranks}"
    return ""


def a_network_needs_ranks_that_others_start(s: Settings) -> str:
    chosen = s.trainer
    if not chosen.network:
        return ""
    if chosen.start != "external" and s.cluster.engine == "local":
        return (
            "trainer.network does nothing with trainer.start=launcher: those ranks are on one machine and talk over "
            "its loopback; leave it out"
        )
    if "/" in chosen.network:
        try:
            ipaddress.ip_network(chosen.network, strict=False)
        except ValueError as error:
            return f"trainer.network: {error}; write a network like 10.0.0.0/8, or names of interfaces like ib0,eth0"
    return ""


NODE_RELATIONS = (nodes_need_an_external_trainer, a_network_needs_ranks_that_others_start)
