//! Input of [`decide`](super::decide): all facts of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::facts::{
    BalancerFacts, BlockFacts, GatewayFacts, GatewayName, LinkReports, NodeFacts, NodeName, PoolFacts, PublishedKey,
    Switches, UnreadableGateway,
};

/// All facts of the cluster, by name: the result does not depend on the order in which objects arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Inputs {
    /// Gateways that are not being deleted.
    pub(crate) gateways: BTreeMap<GatewayName, Arc<GatewayFacts>>,
    /// Gateways that cannot be parsed. The last known version, if there is one, is among `gateways`.
    pub(crate) unreadable: BTreeMap<GatewayName, Arc<UnreadableGateway>>,
    /// Nodes that are readable.
    pub(crate) nodes: BTreeMap<NodeName, Arc<NodeFacts>>,
    /// NodePools; empty if the CRD is not installed.
    pub(crate) pools: BTreeMap<String, Arc<PoolFacts>>,
    /// Calico's blocks by name of the BlockAffinity; empty if the CRD is not installed.
    pub(crate) blocks: BTreeMap<String, Arc<BlockFacts>>,
    /// Load balancers that have an address.
    pub(crate) balancers: Vec<BalancerFacts>,
    /// Reports of gateway nodes about their connections.
    pub(crate) links: LinkReports,
    /// Nodes on which no agent works; see [`agents`](super::agents).
    pub(crate) without_agent: BTreeSet<NodeName>,
    /// Names of the readable GatewayNodes.
    pub(crate) gateway_nodes: BTreeSet<NodeName>,
    /// WireGuard public keys that nodes have published.
    pub(crate) keys: BTreeMap<NodeName, PublishedKey>,
    /// Nodes of exposed Gateways whose proxy works.
    pub(crate) ready_proxies: BTreeSet<NodeName>,
    /// Ranges of Service addresses.
    pub(crate) services: BTreeSet<IpNet>,
    /// Addresses of the API server.
    pub(crate) api_servers: BTreeSet<IpAddr>,
    /// Switches of ConfigMap `raven-cfg`.
    pub(crate) switches: Switches,
    /// The three pool rules are on. If off, a Gateway that a rule created counts as written by a user.
    pub(crate) rules: bool,
}

impl Inputs {
    /// Returns all Gateways, those with the strongest claims first.
    pub(crate) fn by_seniority(&self) -> Vec<&GatewayFacts> {
        let mut all: Vec<&GatewayFacts> = self.gateways.values().map(Arc::as_ref).collect();
        all.sort_by(|a, b| a.seniority().cmp(&b.seniority()));
        all
    }

    /// True if a rule created this Gateway and the rules are on.
    pub(crate) fn is_ruled(&self, gateway: &GatewayFacts) -> bool {
        self.rules && gateway.generated
    }
}
