//! Which node a WireGuard public key belongs to: the one that published it first. With the key of another node, a stolen
//! node could cut that node off, because agents have one peer per key.

use std::collections::{BTreeMap, BTreeSet};

use raven_api::gateway::{CONFIG_PUBLIC_KEY, Endpoint, EndpointType};

use super::facts::{GatewayFacts, GatewayName, NodeName};
use super::inputs::Inputs;
use super::refusal::{Notice, Refusal};

/// The keys in the present statuses.
pub(crate) struct KeyHolders<'a>(BTreeMap<&'a str, Holder<'a>>);

/// The tunnel nodes with a key in the present status of a Gateway, and their keys.
pub(crate) fn in_status(gateway: &GatewayFacts) -> impl Iterator<Item = (&str, &str)> {
    let active = gateway.resource.status.iter().flat_map(|status| &status.active_endpoints);
    let tunnels = active.filter(|endpoint| endpoint.type_ == EndpointType::Tunnel);
    tunnels.filter_map(|endpoint| {
        let key = endpoint.config.get(CONFIG_PUBLIC_KEY).filter(|key| !key.is_empty())?;
        Some((endpoint.node_name.as_str(), key.as_str()))
    })
}

/// The node that a key belongs to.
#[derive(Clone, Copy)]
struct Holder<'a> {
    node: &'a str,
    gateway: &'a GatewayName,
}

impl<'a> KeyHolders<'a> {
    /// If several nodes have a key, one of an exposed Gateway holds it, or that of the Gateway with the strongest claims. A
    /// node that was deleted, or that has published another key since, holds none.
    pub(crate) fn of(inputs: &'a Inputs, exposed: &BTreeSet<GatewayName>) -> Self {
        let mut gateways = inputs.by_seniority();
        gateways.sort_by_key(|gateway| !exposed.contains(&gateway.name));
        let mut holders = BTreeMap::new();
        for gateway in gateways {
            for (node, key) in in_status(gateway) {
                let name = NodeName::from(node);
                if inputs.nodes.contains_key(&name) && inputs.keys.get(&name).is_none_or(|published| published == key) {
                    holders.entry(key).or_insert(Holder { node, gateway: &gateway.name });
                }
            }
        }
        Self(holders)
    }

    /// True if the key belongs to no other node.
    pub(crate) fn may_have(&self, node: &NodeName, key: &str) -> bool {
        self.other(key, node).is_none()
    }

    /// Refusals for elected nodes that have published the key of another node. `elected`: tunnel endpoints of `gateway`.
    pub(crate) fn refusals(&self, inputs: &Inputs, gateway: &GatewayName, elected: &[Endpoint]) -> Vec<Refusal> {
        let elected = elected.iter().map(|endpoint| NodeName::from(endpoint.node_name.as_str()));
        let refused = elected.filter_map(|node| {
            let holder = self.other(inputs.keys.get(&node)?, &node)?;
            let message = format!(
                "node {node} has published the WireGuard key of node {} of Gateway {}, which is not accepted: if {node} was cloned from the other machine's disk, delete /var/lib/raven/wireguard.key on {node} and restart its agent; otherwise {node} may be stolen",
                holder.node, holder.gateway
            );
            let note = format!(
                "node {node} of Gateway {gateway} has published the WireGuard key of {}, which was not accepted: {node} may be a clone of that machine, or stolen",
                holder.node
            );
            let notice = Notice { to: holder.gateway.clone(), reason: "PublicKeyClaimed", note };
            Some(Refusal::new("PublicKeyTaken", message).with_notice(notice))
        });
        refused.collect()
    }

    fn other(&self, key: &str, node: &NodeName) -> Option<Holder<'a>> {
        self.0.get(key).copied().filter(|holder| holder.node != node.as_str())
    }
}
