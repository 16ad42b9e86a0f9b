//! What follows from the cluster's Gateways, Nodes and NodePools: one pure function, [`decide`].
//!
//! Receives [`Inputs`] (checked facts); gives [`Decisions`] (a status per Gateway, Gateways to create and to delete).
//! No clock, no I/O, no memory: the same inputs give the same decisions, in whatever order they came. What it needs of the past
//! (who is elected) stands in the Gateways' own status.

pub mod claims;
pub mod elect;
pub mod events;
pub mod guard;
pub mod inputs;
pub mod links;
pub mod membership;
pub mod rules;
pub mod status;
pub mod subnets;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use raven_api::gateway::EndpointType;

pub use inputs::{BalancerFacts, BlockFacts, GatewayFacts, GatewayName, Inputs, NodeFacts, NodeName, PoolFacts, Switches};
pub use status::Decision;

/// Everything that should be, as far as the controller has a say in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decisions {
    /// What each Gateway's status should say.
    pub gateways: BTreeMap<GatewayName, Decision>,
    /// Gateways that the three pool rules want and nobody has written.
    pub create: Vec<raven_api::Gateway>,
    /// Gateways made by a rule that no rule wants any more.
    pub delete: Vec<GatewayName>,
    /// Nodes without a pool that somebody seems to have meant otherwise: in words, for the log.
    pub strays: Vec<String>,
}

/// Decides for the whole cluster at once: who owns a node or a prefix cannot be told by looking at one Gateway alone.
pub fn decide(inputs: &Inputs) -> Decisions {
    // Order of the parts: nodes go to pools, pools elect, prefixes go to pools (but for those that must stay out of the tunnel), and the elected carry the extra ones.
    let (membership, links) = (membership::resolve(inputs), links::Links::of(inputs));
    let mut drafts: Vec<status::Draft<'_>> = inputs
        .by_seniority()
        .into_iter()
        .filter(|gateway| !membership.delete.contains(&gateway.name))
        .map(|gateway| draft(inputs, gateway, &membership, &links))
        .collect();

    subnets::assign(inputs, &mut drafts);

    let cluster = status::ClusterView::of(inputs, &drafts);
    let gateways = drafts.into_iter().map(|draft| (draft.gateway.name.clone(), draft.finish(&cluster, inputs.switches))).collect();
    Decisions { gateways, create: membership.create, delete: membership.delete, strays: membership.strays }
}

fn draft<'a>(
    inputs: &'a Inputs,
    gateway: &'a GatewayFacts,
    membership: &membership::Membership,
    links: &links::Links<'_>,
) -> status::Draft<'a> {
    let (nodes, mut refusals) = membership.pool_of(inputs, gateway);
    let (addressed, unaddressed): (Vec<_>, Vec<_>) = nodes.iter().copied().partition(|node| node.address.is_some());
    let mut tunnel = elect::elect(gateway, EndpointType::Tunnel, &addressed, links, inputs.switches.l3);
    let mut proxy = elect::elect(gateway, EndpointType::Proxy, &addressed, links, inputs.switches.l7);
    tunnel.balance(inputs, gateway);
    proxy.balance(inputs, gateway);
    refusals.extend(elect::unknown_nodes(inputs, gateway, &nodes));
    status::Draft {
        gateway,
        nodes: addressed.into_iter().map(|node| (node, Vec::new())).collect(),
        unaddressed: unaddressed.into_iter().map(|node| node.name.clone()).collect(),
        tunnel,
        proxy,
        refusals,
    }
}
