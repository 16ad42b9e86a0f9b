//! Which node a WireGuard public key belongs to: the one that published it first, of those that prove that they have the
//! private key, if there are any ([`raven_api::key_proof`]). With the key of another node, a stolen node could cut that node
//! off, because agents have one peer per key.

use std::collections::{BTreeMap, BTreeSet};

use raven_api::gateway::{CONFIG_PUBLIC_KEY, EndpointType};

use super::facts::{GatewayFacts, GatewayName, NodeName, PublishedKey};
use super::inputs::Inputs;
use super::refusal::{Notice, Refusal};

/// The key of a node of a pool with encryption.
#[derive(Debug)]
pub(crate) struct MemberKey {
    /// The key, base64; empty if the node has none: agents keep a key that is only missing.
    pub(crate) key: String,
    /// The node publishes it at present.
    pub(crate) published: bool,
}

/// The holders of all keys.
pub(crate) struct KeyHolders<'a>(BTreeMap<&'a str, Holder<'a>>);

/// The nodes with a key in the present status of a Gateway, and their keys.
pub(crate) fn in_status(gateway: &GatewayFacts) -> impl Iterator<Item = (&str, &str)> {
    holders(gateway).filter_map(|(node, key)| Some((node, key?)))
}

/// The nodes that may have a key (the elected ones, and all nodes of a pool with encryption), each with its key in the
/// status. An empty key there means that the node has none.
fn holders(gateway: &GatewayFacts) -> impl Iterator<Item = (&str, Option<&str>)> {
    let status = || gateway.resource.status.iter();
    let tunnels = status().flat_map(|status| &status.active_endpoints).filter(|e| e.type_ == EndpointType::Tunnel);
    let tunnels = tunnels.map(|endpoint| (&endpoint.node_name, endpoint.config.get(CONFIG_PUBLIC_KEY)));
    let members = status().flat_map(|status| &status.nodes).filter(|_| gateway.resource.encrypts_pool());
    let members = members.map(|node| (&node.node_name, node.public_key.as_ref()));
    tunnels.chain(members).map(|(node, key)| (node.as_str(), key.map(String::as_str).filter(|key| !key.is_empty())))
}

/// The node that a key belongs to.
#[derive(Clone, Copy)]
struct Holder<'a> {
    node: &'a str,
    gateway: &'a GatewayName,
}

/// The right of a node to a key, the strongest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Right {
    /// The key was accepted, and the node has proven it.
    Proven,
    /// The node has proven it, and it is not accepted yet.
    ProvenSince,
    /// The key was accepted without a proof.
    Accepted,
}

impl<'a> KeyHolders<'a> {
    /// If several nodes have an equal right to a key, one of an exposed Gateway holds it, or that of the Gateway with the
    /// strongest claims. A node that was deleted, or that has published another key since, holds none.
    pub(crate) fn of(inputs: &'a Inputs, exposed: &BTreeSet<GatewayName>) -> Self {
        let mut gateways = inputs.by_seniority();
        gateways.sort_by_key(|gateway| !exposed.contains(&gateway.name));
        let mut claims = Vec::new();
        for gateway in gateways {
            for (name, accepted) in holders(gateway) {
                let node = NodeName::from(name);
                if !inputs.nodes.contains_key(&node) {
                    continue;
                }
                let (right, key) = match (inputs.keys.get(&node), accepted) {
                    (Some(PublishedKey { key, proven: true }), _) if accepted == Some(key) => {
                        (Right::Proven, key.as_str())
                    }
                    (Some(PublishedKey { key, proven: true }), _) => (Right::ProvenSince, key.as_str()),
                    (Some(published), Some(key)) if published.key != key => continue,
                    (_, Some(key)) => (Right::Accepted, key),
                    (_, None) => continue,
                };
                claims.push((right, key, Holder { node: name, gateway: &gateway.name }));
            }
        }
        claims.sort_by_key(|(right, ..)| *right);
        let mut holders = BTreeMap::new();
        for (_, key, holder) in claims {
            holders.entry(key).or_insert(holder);
        }
        Self(holders)
    }

    /// True if the key belongs to no other node.
    pub(crate) fn may_have(&self, node: &NodeName, key: &str) -> bool {
        self.other(key, node).is_none()
    }

    /// The key that a node has published, or the first of `further` that it may have. A key that is known from the status
    /// belongs there: it stays while its GatewayNode cannot be read or is recreated, because tunnels must not end. Agents keep
    /// a key that is missing, because a controller of an older release publishes none; an empty one says that the node has
    /// none, because all were refused.
    pub(crate) fn key_of<const N: usize>(
        &self,
        inputs: &Inputs,
        node: &NodeName,
        further: [Option<&str>; N],
    ) -> Option<String> {
        let published = inputs.keys.get(node).map(|published| published.key.as_str());
        let (own, refused): (Vec<&str>, Vec<&str>) =
            [published].into_iter().chain(further).flatten().partition(|key| self.may_have(node, key));
        own.first().copied().or((!refused.is_empty()).then_some("")).map(str::to_owned)
    }

    /// The key of a node of a pool with encryption; `known` is the one in the status.
    pub(crate) fn member_key(&self, inputs: &Inputs, node: &NodeName, known: Option<&str>) -> MemberKey {
        let key = self.key_of(inputs, node, [known]).unwrap_or_default();
        let published = inputs.keys.get(node).is_some_and(|published| published.key == key);
        MemberKey { key, published }
    }

    /// Refusals for nodes of `gateway` that have published the key of another node.
    pub(crate) fn refusals<'n>(
        &self,
        inputs: &Inputs,
        gateway: &GatewayName,
        nodes: impl Iterator<Item = &'n NodeName>,
    ) -> Vec<Refusal> {
        let refused = nodes.filter_map(|node| {
            let holder = self.other(&inputs.keys.get(node)?.key, node)?;
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
