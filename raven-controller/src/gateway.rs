//! Decides the desired state of all Gateways: one pure function, [`decide`].
//!
//! Input: [`Inputs`], validated facts of the cluster. Output: [`Decisions`], a status per Gateway, and Gateways to
//! create and to delete. There is no clock, no I/O and no stored state: the same inputs yield the same decisions.
//! Previous elections are read from the status of each Gateway.
//!
//! Modules in the order of the computation: [`membership`] and [`rules`] assign nodes to Gateways, [`elect`] elects
//! gateway nodes (using [`links`] and [`agents`] to replace nodes that are cut off or have no agent; [`ready`] decides which
//! proxies work, [`keys`] whose a public key is), [`prefixes`] assigns prefixes (using [`claims`]
//! and [`protected`]), [`status`] computes the conditions, and [`events`] derives Events from the new status.

pub(crate) mod agents;
pub(crate) mod claims;
pub(crate) mod elect;
pub(crate) mod events;
pub(crate) mod exposure;
pub(crate) mod facts;
pub(crate) mod inputs;
pub(crate) mod keys;
pub(crate) mod links;
pub(crate) mod membership;
pub(crate) mod prefixes;
pub(crate) mod protected;
pub(crate) mod ready;
pub(crate) mod refusal;
pub(crate) mod rules;
pub(crate) mod status;
pub(crate) mod text;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use raven_api::gateway::EndpointType;

use facts::{Family, GatewayFacts, GatewayName, NodeFacts, NodeName};
use inputs::Inputs;
use keys::KeyHolders;
use links::Links;
use membership::Membership;
use status::{ClusterView, Decision, Draft};

/// Desired state of all Gateways.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Decisions {
    /// Desired status of each Gateway.
    pub(crate) gateways: BTreeMap<GatewayName, Decision>,
    /// Gateways to create: required by a pool rule and absent.
    pub(crate) create: Vec<raven_api::Gateway>,
    /// Gateways to delete: created by a pool rule and no longer required.
    pub(crate) delete: Vec<GatewayName>,
    /// GatewayNodes to delete: their Nodes do not exist, as far as is known.
    pub(crate) orphans: Vec<NodeName>,
    /// GatewayNodes that still report Ready, although no agent works on their nodes.
    pub(crate) silent: Vec<NodeName>,
    /// Messages about nodes without a pool whose labels or NodePools suggest one, for the log.
    pub(crate) strays: Vec<String>,
}

/// Computes the desired state of all Gateways. Ownership of nodes and prefixes depends on all Gateways, so they
/// are decided together.
pub(crate) fn decide(inputs: &Inputs) -> Decisions {
    let (mut membership, free) = membership::resolve(inputs);
    if inputs.rules {
        rules::apply(inputs, &free, &mut membership);
    }
    let exposed = exposure::exposed(inputs);
    let links = Links::of(inputs, &exposed);
    let holders = KeyHolders::of(inputs, &exposed);
    let gateways = inputs.by_seniority().into_iter().filter(|gateway| !membership.delete.contains(&gateway.name));
    let mut drafts: Vec<Draft<'_>> =
        gateways.map(|gateway| draft(inputs, gateway, &membership, &links, &holders, &exposed)).collect();

    prefixes::assign(inputs, &mut drafts);
    relay_edges(&mut drafts);

    let cluster = ClusterView::of(inputs, &drafts);
    let gateways =
        drafts.into_iter().map(|draft| (draft.gateway.name.clone(), draft.finish(&cluster, inputs.switches))).collect();
    let orphans = inputs.gateway_nodes.iter().filter(|name| !inputs.nodes.contains_key(*name)).cloned().collect();
    let reports_ready = |name: &&NodeName| inputs.links.get(*name).is_some_and(|facts| facts.ready == Some(true));
    let silent = inputs.without_agent.iter().filter(reports_ready).cloned().collect();
    Decisions {
        gateways,
        create: membership.create,
        delete: membership.delete,
        orphans,
        silent,
        strays: membership.strays,
    }
}

// The publicIP of an edge may be that of its site's NAT: `underNAT` may have been left out, and OpenYurt's agent writes the
// address that it observes. Other edges would dial it in vain, although a pool relays. Decided here, so that all agents
// choose the same paths.
fn relay_edges(drafts: &mut [Draft<'_>]) {
    if drafts.iter().any(|draft| draft.exposed && draft.tunnel.can_relay(draft.gateway)) {
        drafts.iter_mut().filter(|draft| !draft.exposed).for_each(|draft| draft.tunnel.be_relayed());
    }
}

fn draft<'a>(
    inputs: &'a Inputs,
    gateway: &'a GatewayFacts,
    membership: &Membership,
    links: &Links<'_>,
    holders: &KeyHolders<'_>,
    exposed: &BTreeSet<GatewayName>,
) -> Draft<'a> {
    let (nodes, mut refusals) = membership.pool_of(inputs, gateway);
    let family = Family::of(&nodes, Family::current(&gateway.resource));
    let (addressed, unaddressed): (Vec<&NodeFacts>, Vec<_>) =
        nodes.iter().partition(|node| node.address_of(family).is_some());
    let mut tunnel = elect::elect(inputs, gateway, EndpointType::Tunnel, &addressed, links, holders);
    let mut proxy = elect::elect(inputs, gateway, EndpointType::Proxy, &addressed, links, holders);
    tunnel.add_load_balancers(inputs, gateway);
    proxy.add_load_balancers(inputs, gateway);
    refusals.extend(elect::refused_endpoints(inputs, gateway, family, &nodes, &unaddressed));
    let mut keys = BTreeMap::new();
    if gateway.resource.encrypts_pool() {
        let members = || addressed.iter().map(|node| &node.name);
        refusals.extend(holders.refusals(inputs, &gateway.name, members()));
        let known: BTreeMap<&str, &str> = keys::in_status(gateway).collect();
        let key = |node: &NodeName| holders.member_key(inputs, node, known.get(node.as_str()).copied());
        keys.extend(members().map(|node| (node.clone(), key(node))));
    } else {
        let elected: Vec<_> = tunnel.elected.iter().map(|e| NodeName::from(e.node_name.as_str())).collect();
        refusals.extend(holders.refusals(inputs, &gateway.name, elected.iter()));
    }
    Draft {
        gateway,
        family,
        nodes: addressed.into_iter().map(|node| (node, Vec::new())).collect(),
        unaddressed: unaddressed.into_iter().map(|node| node.name.clone()).collect(),
        keys,
        tunnel,
        proxy,
        refusals,
        exposed: exposed.contains(&gateway.name),
    }
}
