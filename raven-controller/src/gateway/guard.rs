//! What must never go into the tunnel, whatever a Gateway claims: a node that cut itself off could not be told to stop.
//!
//! Receives the surroundings and the drafts with their nodes elected; answers whether a prefix would take along something that must stay
//! outside. A refused prefix is in no status, so no dataplane ever sees it. (Agents check the same for themselves, against what they see
//! on their node.)
//!
//! Node addresses count against what a person wishes (the annotation), not against pod prefixes. A node's address is what its kubelet
//! says: did it count there, one stolen box could say that it lives in another pool's pod prefix and have that taken off the network.
//! [`subnets`](super::subnets) tells such a node's own Gateway instead.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use raven_api::gateway::Endpoint;

use super::claims::Kind;
use super::inputs::{Inputs, NodeFacts};
use super::status::Draft;
use super::{GatewayName, NodeName};

/// Reason of a refusal for this.
pub const PREFIX_PROTECTED: &str = "PrefixProtected";

// RFC 6890 and the IANA registries it names: what no router forwards.
const NEVER_ROUTED: [(&str, &str); 9] = [
    ("0.0.0.0/8", "'this network'"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("::/128", "the unspecified address"),
    ("::1/128", "loopback"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// Why a prefix is kept out of the tunnel. Sorted: the first that applies is the one that is told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// No router forwards it.
    NeverRouted(&'static str),
    /// Service addresses: every node has them.
    Services,
    /// The API server.
    ApiServer,
    /// `publicIP` of an endpoint.
    Public(GatewayName, NodeName),
    /// The InternalIP of an elected node of an exposed Gateway, where there is no `publicIP`.
    Dialled(GatewayName, NodeName),
    /// The InternalIP of any node.
    Node {
        /// Its pool, if any.
        gateway: Option<GatewayName>,
        /// The node.
        node: NodeName,
        /// It is elected and not behind NAT: others see its packets come from this address and answer there.
        dials: bool,
    },
}

/// All that is kept out.
pub struct Guard {
    held: JointPrefixMap<IpNet, BTreeSet<Keep>>,
}

// === impl Guard ===

impl Guard {
    /// From the whole cluster.
    pub fn new(inputs: &Inputs, drafts: &[Draft<'_>]) -> Self {
        let mut guard = Self { held: JointPrefixMap::new() };
        for (text, why) in NEVER_ROUTED {
            guard.keep(text.parse().expect("a prefix of the table above, see the tests"), Keep::NeverRouted(why));
        }
        inputs.services.iter().for_each(|range| guard.keep(*range, Keep::Services));
        inputs.api_servers.iter().for_each(|address| guard.keep(IpNet::from(*address), Keep::ApiServer));
        let mut members = BTreeSet::new();
        for draft in drafts {
            guard.endpoints(draft);
            for (node, _) in &draft.nodes {
                members.insert(&node.name);
                guard.node(draft, node);
            }
        }
        for node in inputs.nodes.values().filter(|node| !members.contains(&node.name)) {
            let keep = Keep::Node { gateway: None, node: node.name.clone(), dials: false };
            node.addresses().for_each(|address| guard.keep(address.into(), keep.clone()));
        }
        guard
    }

    /// What `prefix` would take along if `gateway` had it; none if nothing stands in the way.
    pub fn refuses(&self, prefix: IpNet, gateway: &GatewayName, kind: Kind) -> Option<(IpNet, &Keep)> {
        let overlapping = self.held.cover(&prefix).chain(self.held.children(&prefix));
        let keeps = overlapping.flat_map(|(held, keeps)| keeps.iter().map(move |keep| (held, keep)));
        keeps.filter(|(_, keep)| applies(keep, gateway, kind)).min_by(|a, b| (a.1, a.0).cmp(&(b.1, b.0)))
    }

    fn keep(&mut self, prefix: IpNet, keep: Keep) {
        self.held.entry(prefix).or_default().insert(keep);
    }

    // Listed ones, elected or not: whoever is elected next must be reachable, too.
    fn endpoints(&mut self, draft: &Draft<'_>) {
        for endpoint in &draft.gateway.resource.spec.endpoints {
            if let Some(address) = public_address(endpoint) {
                self.keep(address.into(), Keep::Public(draft.gateway.name.clone(), endpoint.node_name.as_str().into()));
            }
        }
    }

    fn node(&mut self, draft: &Draft<'_>, node: &NodeFacts) {
        let gateway = &draft.gateway.name;
        let elected = draft.tunnel.elected.iter().chain(&draft.proxy.elected);
        let elected: Vec<&Endpoint> = elected.filter(|e| e.node_name == node.name.as_str()).collect();
        let dialled = draft.is_exposed() && elected.iter().any(|e| public_address(e).is_none());
        let dials = elected.iter().any(|e| !e.under_nat);
        for address in node.addresses().map(IpNet::from) {
            if dialled {
                self.keep(address, Keep::Dialled(gateway.clone(), node.name.clone()));
            }
            self.keep(address, Keep::Node { gateway: Some(gateway.clone()), node: node.name.clone(), dials });
        }
    }
}

// A site's own LAN, with its nodes in it, is what the annotation is for: other pools may send there through the tunnel, as long as that
// does not take the tunnel's own packets along.
fn applies(keep: &Keep, gateway: &GatewayName, kind: Kind) -> bool {
    match keep {
        Keep::Node { .. } if kind == Kind::Pod => false,
        Keep::Node { gateway: Some(own), dials, .. } if own == gateway => *dials,
        _ => true,
    }
}

fn public_address(endpoint: &Endpoint) -> Option<IpAddr> {
    endpoint.public_ip.as_deref()?.parse().ok()
}

/// In words, for the Gateway that claims `what`.
pub fn message(what: &str, prefix: IpNet, held: IpNet, keep: &Keep, gateway: &GatewayName) -> String {
    if prefix.prefix_len() == 0 {
        return format!(
            "{what} is the whole address space, the way to the API server included: name the prefixes that are really behind this pool; until then it is left out"
        );
    }
    let (is, remedy) = match keep {
        Keep::NeverRouted(why) => (format!("{why}, which no router forwards"), "write the pool's own prefixes"),
        Keep::Services => {
            ("the range of Service addresses, which every node serves by itself".to_owned(), "give the pool prefixes outside of it")
        }
        Keep::ApiServer => ("the API server's address".to_owned(), "write narrower prefixes"),
        Keep::Public(other, node) => {
            (format!("publicIP of node {node} in Gateway {other}, by which others reach its tunnel"), "write narrower prefixes")
        }
        Keep::Dialled(other, node) => (
            format!("address of gateway node {node} in Gateway {other}, which others dial"),
            "write narrower prefixes, or set publicIP in its endpoint",
        ),
        Keep::Node { gateway: Some(own), node, .. } if own == gateway => (
            format!("address of gateway node {node} of this pool, from which its tunnel's packets come"),
            "if the site is behind NAT, list its nodes as endpoints with underNAT: true, else write narrower prefixes",
        ),
        Keep::Node { gateway: Some(other), node, .. } => (format!("address of node {node} in Gateway {other}"), "write narrower prefixes"),
        Keep::Node { gateway: None, node, .. } => (format!("address of node {node}, which is in no pool"), "write narrower prefixes"),
    };
    format!("{what} would take along {held} ({is}), which must never go into the tunnel: {remedy}; until then it is left out")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(prefix: &str) -> bool {
        let inputs = Inputs { services: ["10.96.0.0/16".parse().expect("a prefix")].into(), ..Default::default() };
        let guard = Guard::new(&inputs, &[]);
        guard.refuses(prefix.parse().expect("a prefix written in a test"), &"g".into(), Kind::Pod).is_some()
    }

    #[test]
    fn what_no_router_forwards_is_refused_and_all_that_contains_it() {
        for bad in
            ["0.0.0.0/0", "127.0.0.1/32", "169.254.169.254/32", "224.0.0.0/24", "128.0.0.0/1", "::/0", "fe80::/64", "ff02::/16", "::/96"]
        {
            assert!(refused(bad), "{bad}");
        }
        for good in ["10.0.0.0/16", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8", "2001:db8::/32"] {
            assert!(!refused(good), "{good}");
        }
    }

    #[test]
    fn the_service_range_is_refused_whole_and_in_part() {
        assert!(refused("10.96.5.0/24") && refused("10.96.0.0/12") && refused("10.0.0.0/8") && !refused("10.97.0.0/16"));
    }
}
