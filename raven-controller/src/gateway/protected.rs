//! Addresses that must stay outside the tunnel, whatever a Gateway claims. A prefix that covers one of them could cut
//! nodes off from the API server or from their peers, and such a node could not receive the correction.
//!
//! A refused prefix is in no status, so no dataplane routes it. Agents check the prefixes again against the addresses
//! of their own node.
//!
//! Addresses of nodes exclude prefixes of the annotation, not pod prefixes. The kubelet reports the address of its
//! node: if it excluded pod prefixes, a stolen node could claim an address in another pool's pod prefix and take that
//! prefix off the network. [`prefixes`](super::prefixes) reports such an address on the node's own Gateway instead.

use std::collections::BTreeSet;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use raven_api::gateway::Endpoint;
use raven_api::prefix::NEVER_ROUTED;

use super::claims::Kind;
use super::facts::{GatewayName, NodeFacts, NodeName};
use super::inputs::Inputs;
use super::status::Draft;

/// Reason of refusals because of a protected address.
pub(crate) const PREFIX_PROTECTED: &str = "PrefixProtected";

/// Kind of a protected prefix. Sorted by priority: a refusal reports the first one that applies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Protected {
    /// No router forwards the prefix.
    NeverRouted(&'static str),
    /// A range of Service addresses, which every node serves locally.
    Services,
    /// An address of the API server.
    ApiServer,
    /// The `publicIP` of an endpoint.
    Public(GatewayName, NodeName),
    /// The InternalIP of an elected node of an exposed Gateway without `publicIP`.
    Dialled(GatewayName, NodeName),
    /// The InternalIP of a node.
    Node {
        /// Gateway of the node's pool, if it has one.
        gateway: Option<GatewayName>,
        /// Name of the node.
        node: NodeName,
        /// The node is elected and not behind NAT: peers answer to this address.
        dials: bool,
    },
}

/// All protected prefixes of the cluster.
pub(crate) struct ProtectedPrefixes {
    held: JointPrefixMap<IpNet, BTreeSet<Protected>>,
}

impl ProtectedPrefixes {
    /// Collects the protected prefixes.
    pub(crate) fn new(inputs: &Inputs, drafts: &[Draft<'_>]) -> Self {
        let mut all = Self { held: JointPrefixMap::new() };
        NEVER_ROUTED.into_iter().for_each(|(prefix, name)| all.add(prefix, Protected::NeverRouted(name)));
        inputs.services.iter().for_each(|range| all.add(*range, Protected::Services));
        inputs.api_servers.iter().for_each(|address| all.add(IpNet::from(*address), Protected::ApiServer));
        let mut members = BTreeSet::new();
        for draft in drafts {
            all.add_endpoints(draft);
            for (node, _) in &draft.nodes {
                members.insert(&node.name);
                all.add_node(draft, node);
            }
        }
        for node in inputs.nodes.values().filter(|node| !members.contains(&node.name)) {
            let protected = Protected::Node { gateway: None, node: node.name.clone(), dials: false };
            node.addresses().for_each(|address| all.add(address.into(), protected.clone()));
        }
        all
    }

    /// Returns the protected prefix that forbids `gateway` to claim `prefix`, if there is one.
    pub(crate) fn conflict(&self, prefix: IpNet, gateway: &GatewayName, kind: Kind) -> Option<(IpNet, &Protected)> {
        let overlapping = self.held.cover(&prefix).chain(self.held.children(&prefix));
        let all = overlapping.flat_map(|(held, reasons)| reasons.iter().map(move |protected| (held, protected)));
        all.filter(|(_, protected)| applies(protected, gateway, kind)).min_by(|a, b| (a.1, a.0).cmp(&(b.1, b.0)))
    }

    fn add(&mut self, prefix: IpNet, protected: Protected) {
        self.held.entry(prefix).or_default().insert(protected);
    }

    // All listed endpoints: each may be elected next and must be reachable then.
    fn add_endpoints(&mut self, draft: &Draft<'_>) {
        for endpoint in &draft.gateway.resource.spec.endpoints {
            if let Some(address) = endpoint.public_address() {
                self.add(
                    address.into(),
                    Protected::Public(draft.gateway.name.clone(), endpoint.node_name.as_str().into()),
                );
            }
        }
    }

    fn add_node(&mut self, draft: &Draft<'_>, node: &NodeFacts) {
        let gateway = &draft.gateway.name;
        let elected = draft.tunnel.elected.iter().chain(&draft.proxy.elected);
        let elected: Vec<&Endpoint> = elected.filter(|e| e.node_name == node.name.as_str()).collect();
        let dialled = draft.exposed && elected.iter().any(|e| e.public_address().is_none());
        let dials = elected.iter().any(|e| !e.under_nat);
        for address in node.addresses().map(IpNet::from) {
            if dialled {
                self.add(address, Protected::Dialled(gateway.clone(), node.name.clone()));
            }
            self.add(address, Protected::Node { gateway: Some(gateway.clone()), node: node.name.clone(), dials });
        }
    }
}

// The annotation is meant for a site's own LAN, which contains its nodes. Other pools may send there through the
// tunnel, unless the tunnel's outer packets have their source there.
fn applies(protected: &Protected, gateway: &GatewayName, kind: Kind) -> bool {
    match protected {
        Protected::Node { .. } if kind == Kind::Pod => false,
        Protected::Node { gateway: Some(own), dials, .. } if own == gateway => *dials,
        _ => true,
    }
}

/// Formats the message of a refusal. `what` names the claimed prefix and its source.
pub(crate) fn message(what: &str, prefix: IpNet, held: IpNet, protected: &Protected, gateway: &GatewayName) -> String {
    if prefix.prefix_len() == 0 {
        return format!(
            "{what} is the whole address space, including the address of the API server: list the prefixes behind this pool; until then the prefix is ignored"
        );
    }
    let (is, remedy) = match protected {
        Protected::NeverRouted(name) => (format!("{name}, which no router forwards"), "list the pool's own prefixes"),
        Protected::Services => (
            "the range of Service addresses, which every node serves locally".to_owned(),
            "use prefixes outside this range",
        ),
        Protected::ApiServer => ("the API server's address".to_owned(), "use narrower prefixes"),
        Protected::Public(other, node) => (
            format!("publicIP of node {node} in Gateway {other}, at which peers reach its tunnel"),
            "use narrower prefixes",
        ),
        Protected::Dialled(other, node) => (
            format!("address of gateway node {node} in Gateway {other}, which peers dial"),
            "use narrower prefixes, or set publicIP in its endpoint",
        ),
        Protected::Node { gateway: Some(own), node, .. } if own == gateway => (
            format!("address of gateway node {node} of this pool, the source address of its tunnel packets"),
            "if the site is behind NAT, list its nodes as endpoints with underNAT: true, otherwise use narrower prefixes",
        ),
        Protected::Node { gateway: Some(other), node, .. } => {
            (format!("address of node {node} in Gateway {other}"), "use narrower prefixes")
        }
        Protected::Node { gateway: None, node, .. } => {
            (format!("address of node {node}, which is in no pool"), "use narrower prefixes")
        }
    };
    format!(
        "{what} overlaps {held} ({is}), which must stay outside the tunnel: {remedy}; until then the prefix is ignored"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(prefix: &str) -> bool {
        let inputs = Inputs { services: ["10.96.0.0/16".parse().expect("a prefix")].into(), ..Default::default() };
        let protected = ProtectedPrefixes::new(&inputs, &[]);
        protected.conflict(prefix.parse().expect("a prefix written in a test"), &"g".into(), Kind::Pod).is_some()
    }

    #[test]
    fn prefixes_that_overlap_a_never_routed_prefix_are_refused() {
        for bad in [
            "0.0.0.0/0",
            "127.0.0.1/32",
            "169.254.169.254/32",
            "224.0.0.0/24",
            "128.0.0.0/1",
            "::/0",
            "fe80::/64",
            "ff02::/16",
            "::/96",
        ] {
            assert!(refused(bad), "{bad}");
        }
        for good in ["10.0.0.0/16", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8", "2001:db8::/32"] {
            assert!(!refused(good), "{good}");
        }
    }

    #[test]
    fn prefixes_that_overlap_the_service_range_are_refused() {
        assert!(
            refused("10.96.5.0/24") && refused("10.96.0.0/12") && refused("10.0.0.0/8") && !refused("10.97.0.0/16")
        );
    }
}
