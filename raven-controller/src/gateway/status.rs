//! Status of a Gateway: nodes, elected endpoints and three conditions.
//!
//! A [`Draft`] collects the results for one Gateway; [`Draft::finish`] turns it into a [`Decision`].
//! [`Decision::status`] adds the transition times from the present status. The controller is the only writer
//! of the status.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use raven_api::condition::{self, ConditionType, Verdict};
use raven_api::gateway::{Endpoint, ExposeType, Gateway, GatewayStatus, NodeInfo};
use raven_api::names::{AGENT_PODS, ANNOTATION_EXTRA_CIDRS, LABEL_GATEWAY, SWITCH_L3, SWITCH_L7, SWITCHES_CONFIG_MAP};
use raven_api::proxy::CONFIG_HOSTNAME;

use super::elect::Election;
use super::facts::{Family, GatewayFacts, GatewayName, NodeFacts, NodeName, Switches};
use super::inputs::Inputs;
use super::keys::MemberKey;
use super::refusal::Refusal;
use super::text::{count, enumerate, join_capped, type_name};

/// Reason of conditions and Events if no candidate is ready.
pub(crate) const NO_READY_NODE: &str = "NoReadyNode";
/// Reason of condition Ready and of Events if no agent works on the elected nodes of a half.
pub(crate) const AGENT_NOT_READY: &str = "AgentNotReady";

/// Intermediate results for one Gateway.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    /// Facts of the Gateway.
    pub(crate) gateway: &'a GatewayFacts,
    /// Address family of the packets between its nodes.
    pub(crate) family: Family,
    /// Nodes with an address of that family, sorted by name, each with the prefixes that it carries.
    pub(crate) nodes: Vec<(&'a NodeFacts, Vec<IpNet>)>,
    /// Nodes without one, which are ignored.
    pub(crate) unaddressed: Vec<NodeName>,
    /// Public keys of the nodes of a pool with encryption; empty for other pools.
    pub(crate) keys: BTreeMap<NodeName, MemberKey>,
    /// Election for the L3 tunnel.
    pub(crate) tunnel: Election,
    /// Election for the L7 proxy.
    pub(crate) proxy: Election,
    /// Claims that are not accepted.
    pub(crate) refusals: Vec<Refusal>,
    /// Gateway nodes of other pools dial this pool; see [`exposure`](super::exposure).
    pub(crate) exposed: bool,
}

/// First words of the note about nodes that share their address with nodes of other pools, or of no pool. The Event is
/// derived from that note.
pub(crate) const BY_NAME_ONLY: &str = "kubelets reachable by name only";

/// Properties of the cluster that affect the status of each Gateway.
#[derive(Debug, Default)]
pub(crate) struct ClusterView {
    /// Exposed Gateways, and whether a tunnel node is elected there.
    exposed: Vec<(GatewayName, bool)>,
    /// InternalIPs that several pools share, or a pool and nodes without a pool, with their owners.
    shared: Owners,
}

type Owners = BTreeMap<IpAddr, Vec<(Option<GatewayName>, NodeName)>>;

impl ClusterView {
    /// Collects the properties from all drafts and from the nodes without a pool.
    pub(crate) fn of(inputs: &Inputs, drafts: &[Draft<'_>]) -> Self {
        let exposed = drafts.iter().filter(|d| d.exposed);
        let mut exposed: Vec<_> = exposed.map(|d| (d.gateway.name.clone(), !d.tunnel.elected.is_empty())).collect();
        exposed.sort();
        Self { exposed, shared: shared_addresses(inputs, drafts) }
    }
}

/// Desired status of a Gateway without transition times.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Decision {
    /// Nodes of the pool, sorted by name.
    pub(crate) nodes: Vec<NodeInfo>,
    /// Elected endpoints, tunnel before proxy.
    pub(crate) active_endpoints: Vec<Endpoint>,
    /// Gateway nodes of other pools dial this pool.
    pub(crate) exposed: bool,
    /// Conditions Ready, Elected and Accepted.
    pub(crate) verdicts: Vec<Verdict>,
    /// Refused claims, the content of condition Accepted.
    pub(crate) refusals: Vec<Refusal>,
}

impl Decision {
    /// Returns the complete status. Unchanged conditions keep their transition time, so an unchanged decision yields
    /// an unchanged status.
    pub(crate) fn status(&self, gateway: &Gateway, now: Timestamp) -> GatewayStatus {
        let old = gateway.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
        let generation = gateway.metadata.generation;
        GatewayStatus {
            nodes: self.nodes.clone(),
            node_count: i32::try_from(self.nodes.len()).unwrap_or(i32::MAX),
            active_endpoints: self.active_endpoints.clone(),
            exposed: self.exposed,
            conditions: condition::merge(old, &self.verdicts, generation, now),
            observed_generation: generation,
        }
    }
}

/// The InternalIPs of a node that has several. A kubelet reports at most one per family, a cloud provider more; the
/// number is limited because each agent receives them.
fn several(node: &NodeFacts, family: Family) -> Vec<String> {
    let first = node.address_of(family);
    let others = node.addresses().filter(|address| Some(*address) != first);
    let addresses: Vec<String> = first.into_iter().chain(others).take(8).map(|address| address.to_string()).collect();
    if addresses.len() > 1 { addresses } else { Vec::new() }
}

fn shared_addresses(inputs: &Inputs, drafts: &[Draft<'_>]) -> Owners {
    let mut by_address = Owners::new();
    let mut members = BTreeSet::new();
    for draft in drafts {
        for (node, _) in &draft.nodes {
            members.insert(&node.name);
            for address in node.addresses() {
                by_address.entry(address).or_default().push((Some(draft.gateway.name.clone()), node.name.clone()));
            }
        }
    }
    for node in inputs.nodes.values().filter(|node| !members.contains(&node.name)) {
        node.addresses().for_each(|address| by_address.entry(address).or_default().push((None, node.name.clone())));
    }
    by_address.retain(|_, owners| owners.iter().any(|(gateway, _)| *gateway != owners[0].0));
    by_address.values_mut().for_each(|owners| owners.sort());
    by_address
}

impl Draft<'_> {
    /// Computes the conditions and returns the decision.
    pub(crate) fn finish(self, cluster: &ClusterView, switches: Switches) -> Decision {
        let verdicts = vec![self.ready(cluster, switches), self.elected(), self.accepted()];
        let nodes = self.nodes.iter().map(|(node, subnets)| NodeInfo {
            node_name: node.name.to_string(),
            private_ip: node.address_of(self.family).map(|a| a.to_string()).unwrap_or_default(),
            private_ips: several(node, self.family),
            subnets: subnets.iter().map(IpNet::to_string).collect(),
            public_key: self.keys.get(&node.name).map(|member| member.key.clone()),
        });
        let active_endpoints = [self.tunnel.elected, self.proxy.elected].concat();
        Decision { nodes: nodes.collect(), active_endpoints, exposed: self.exposed, verdicts, refusals: self.refusals }
    }

    // Elected nodes on which no agent works.
    fn without_agent(&self) -> Vec<&str> {
        let names: BTreeSet<&String> = self.tunnel.without_agent.iter().chain(&self.proxy.without_agent).collect();
        names.into_iter().map(String::as_str).collect()
    }

    // L3 is on for this pool.
    fn l3(&self, switches: Switches) -> bool {
        switches.l3 && self.tunnel.wanted > 0
    }

    // Nodes of a pool with encryption that cannot exchange packets with other pools.
    fn without_key(&self, switches: Switches) -> Vec<&str> {
        let l3 = self.l3(switches);
        let without = self.keys.iter().filter(|(_, member)| l3 && !member.published);
        without.map(|(name, _)| name.as_str()).collect()
    }

    fn accepted(&self) -> Verdict {
        let Some(first) = self.refusals.first() else {
            return verdict(
                ConditionType::Accepted,
                true,
                "Accepted",
                "every claim of this Gateway is in force".to_owned(),
            );
        };
        let messages: Vec<&str> = self.refusals.iter().map(|r| r.message.as_str()).collect();
        verdict(ConditionType::Accepted, false, first.reason, join_capped(&messages, "; "))
    }

    fn elected(&self) -> Verdict {
        let elections: Vec<&Election> = [&self.tunnel, &self.proxy].into_iter().filter(|e| e.wanted > 0).collect();
        let message = elections.iter().map(|e| tally(e)).collect::<Vec<_>>().join("; ");
        if elections.is_empty() {
            let message = "tunnelConfig.Replicas and proxyConfig.Replicas are 0: Raven is off for this pool".to_owned();
            return verdict(ConditionType::Elected, true, "Disabled", message);
        }
        if elections.iter().any(|e| e.ready() == 0) {
            return verdict(ConditionType::Elected, false, NO_READY_NODE, message);
        }
        if elections.iter().any(|e| e.elected.len() < e.wanted) {
            return verdict(ConditionType::Elected, false, "NotEnoughReadyNodes", message);
        }
        verdict(ConditionType::Elected, true, "Elected", message)
    }

    fn ready(&self, cluster: &ClusterView, switches: Switches) -> Verdict {
        let l3 = self.l3(switches);
        let l7 = switches.l7 && self.proxy.wanted > 0;
        let notes = self.notes(cluster, switches);
        let verdict_with_notes = |ok, reason, first: String| {
            let all: Vec<&str> = std::iter::once(first.as_str()).chain(notes.iter().map(String::as_str)).collect();
            verdict(ConditionType::Ready, ok, reason, join_capped(&all, "; "))
        };
        if !l3 && !l7 {
            return verdict_with_notes(
                true,
                "Disabled",
                "the L3 tunnel and the L7 proxy are both off for this pool".to_owned(),
            );
        }
        if let Some((reason, message)) = self.obstacle(cluster, l3, l7) {
            return verdict_with_notes(false, reason, message);
        }
        let incomplete = self.tunnel.elected.len() < self.tunnel.wanted || self.proxy.elected.len() < self.proxy.wanted;
        let silent = !self.without_agent().is_empty();
        let deficient = incomplete || silent || !self.without_key(switches).is_empty();
        if deficient || !self.refusals.is_empty() || !self.unaddressed.is_empty() {
            return verdict_with_notes(
                true,
                "Degraded",
                format!("works, but not as specified: {}", self.first_deficiency(switches)),
            );
        }
        verdict_with_notes(
            true,
            "Ready",
            format!("{} in the pool, gateway: {}", count(self.nodes.len(), "node"), self.gateway_nodes()),
        )
    }

    // One deficiency only: conditions Elected and Accepted list all of them.
    fn first_deficiency(&self, switches: Switches) -> String {
        match self.refusals.as_slice() {
            [] if self.tunnel.elected.len() < self.tunnel.wanted => tally(&self.tunnel),
            [] if self.proxy.elected.len() < self.proxy.wanted => tally(&self.proxy),
            [] if !self.without_agent().is_empty() => no_agent(&self.without_agent()),
            [] if !self.without_key(switches).is_empty() => "some nodes have no WireGuard key".to_owned(),
            [] => "some nodes of the pool are ignored".to_owned(),
            [only] => only.message.clone(),
            [first, more @ ..] => format!("{} (and {} more, see condition Accepted)", first.message, more.len()),
        }
    }

    // Returns the first problem that stops traffic, in the order in which a user fixes them.
    fn obstacle(&self, cluster: &ClusterView, l3: bool, l7: bool) -> Option<(&'static str, String)> {
        let name = &self.gateway.name;
        if self.nodes.is_empty() && self.unaddressed.is_empty() {
            return Some((
                "NoNode",
                format!(
                    "no node in the pool: label its nodes {LABEL_GATEWAY}={name} (kubectl label node NODE {LABEL_GATEWAY}={name}), or set a nodeSelector that matches them"
                ),
            ));
        }
        if self.nodes.is_empty() {
            return Some((
                "NoNodeAddress",
                "no node of the pool has an InternalIP, so they cannot exchange packets: set --node-ip of the kubelets, or check the cloud provider"
                    .to_owned(),
            ));
        }
        for (on, election) in [(l3, &self.tunnel), (l7, &self.proxy)] {
            if on && election.ready() == 0 {
                let what = if election.kept { "no gateway node is ready" } else { "no gateway node" };
                return Some((NO_READY_NODE, format!("{what}: {}", tally(election))));
            }
        }
        for (on, election) in [(l3, &self.tunnel), (l7, &self.proxy)] {
            if on && election.without_agent.len() == election.elected.len() {
                return Some((
                    AGENT_NOT_READY,
                    format!("{}: {}", type_name(election.type_), no_agent(&self.without_agent())),
                ));
            }
        }
        if l3 && self.nodes.iter().all(|(_, subnets)| subnets.is_empty()) {
            return Some(("NoPodPrefix", self.no_prefix()));
        }
        if self.exposed { self.missing_load_balancer() } else { missing_peer(cluster, l3) }
    }

    fn no_prefix(&self) -> String {
        if !self.refusals.is_empty() {
            return "no prefix of the pool was accepted: see condition Accepted".to_owned();
        }
        format!(
            "no node of the pool has a pod prefix (Node.spec.podCIDRs is empty): run kube-controller-manager with --allocate-node-cidrs, or, if the CNI assigns addresses itself, \
             list the pool's prefixes in annotation {ANNOTATION_EXTRA_CIDRS}"
        )
    }

    fn missing_load_balancer(&self) -> Option<(&'static str, String)> {
        let without = self.without_public_ip();
        if self.gateway.resource.spec.expose_type != ExposeType::LoadBalancer || without.is_empty() {
            return None;
        }
        let message = format!(
            "exposeType is LoadBalancer, and the load balancer of {} has no address yet: check its Service, or set publicIP in its endpoint",
            enumerate(&without)
        );
        Some(("NoLoadBalancerAddress", message))
    }

    fn without_public_ip(&self) -> Vec<&str> {
        let without = self
            .tunnel
            .elected
            .iter()
            .chain(&self.proxy.elected)
            .filter(|e| e.public_ip.is_none() && !e.config.contains_key(CONFIG_HOSTNAME));
        let mut names: Vec<&str> = without.map(|e| e.node_name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    // Notes that explain the state without being errors.
    fn notes(&self, cluster: &ClusterView, switches: Switches) -> Vec<String> {
        let mut notes = Vec::new();
        let without = self.without_public_ip();
        let expose_type = self.gateway.resource.spec.expose_type;
        if self.exposed && expose_type.is_edge() {
            let names: Vec<&GatewayName> = cluster.exposed.iter().map(|(name, _)| name).collect();
            notes.push(format!(
                "no Gateway has an exposeType; those whose endpoints are cloud nodes and not underNAT count as exposed: set \
                 exposeType: PublicIP on all of them at once ({})",
                enumerate(&names)
            ));
        }
        if self.exposed && expose_type != ExposeType::LoadBalancer && !without.is_empty() {
            notes.push(format!("no publicIP is set for {}: other pools dial its InternalIP", enumerate(&without)));
        }
        if !self.unaddressed.is_empty() {
            let family = self.family.as_str();
            notes.push(format!("nodes without an {family} InternalIP are ignored: {}", enumerate(&self.unaddressed)));
        }
        let without_prefix: Vec<&NodeName> =
            self.nodes.iter().filter(|(_, s)| s.is_empty()).map(|(n, _)| &n.name).collect();
        if !without_prefix.is_empty() && without_prefix.len() < self.nodes.len() {
            notes.push(format!("without a pod prefix: {}", enumerate(&without_prefix)));
        }
        let without_key = self.without_key(switches);
        if !without_key.is_empty() {
            notes.push(format!(
                "the pool has encryption, and these nodes publish no WireGuard key, so their packets to and from other pools may be dropped: {}; check that their agents are Ready and of a release that supports encryption: {}",
                enumerate(&without_key),
                find_agents(&without_key)
            ));
        }
        notes.extend(self.by_name_only(cluster).filter(|_| switches.l7));
        for (on, key) in [(switches.l3, SWITCH_L3), (switches.l7, SWITCH_L7)] {
            if !on {
                notes.push(format!("ConfigMap {SWITCHES_CONFIG_MAP} sets {key}=false"));
            }
        }
        notes
    }

    // Sites that are clones of one image have the same addresses. Such an address does not identify a node, so the
    // proxy refuses it.
    fn by_name_only(&self, cluster: &ClusterView) -> Option<String> {
        if self.exposed {
            return None;
        }
        let shared: Vec<String> = self
            .nodes
            .iter()
            .filter_map(|(node, _)| {
                let own = Some(&self.gateway.name);
                let owner_of = |address: IpAddr| cluster.shared.get(&address)?.iter().find(|(g, _)| g.as_ref() != own);
                let (address, (gateway, other)) =
                    node.addresses().find_map(|address| Some((address, owner_of(address)?)))?;
                let pool =
                    gateway.as_ref().map_or_else(|| "no Gateway".to_owned(), |gateway| format!("Gateway {gateway}"));
                Some(format!("{} ({address} is also the address of node {other} of {pool})", node.name))
            })
            .collect();
        (!shared.is_empty()).then(|| format!("{BY_NAME_ONLY}: {}", enumerate(&shared)))
    }

    fn gateway_nodes(&self) -> String {
        let mut names: Vec<&str> =
            self.tunnel.elected.iter().chain(&self.proxy.elected).map(|e| e.node_name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        enumerate(&names)
    }
}

fn missing_peer(cluster: &ClusterView, l3: bool) -> Option<(&'static str, String)> {
    if cluster.exposed.is_empty() {
        let message = "no Gateway of the cluster is exposed, so this pool has no peer to dial: set exposeType: PublicIP (or LoadBalancer) on a Gateway that this pool can reach, usually the cloud's";
        return Some(("NoExposedGateway", message.to_owned()));
    }
    if l3 && cluster.exposed.iter().all(|(_, elected)| !elected) {
        let names: Vec<&GatewayName> = cluster.exposed.iter().map(|(name, _)| name).collect();
        return Some((
            "NoExposedGateway",
            format!("no peer to dial: no tunnel node is elected in the exposed Gateway {}", enumerate(&names)),
        ));
    }
    None
}

/// Returns the command that shows the agents' Pods on these nodes.
pub(crate) fn find_agents(nodes: &[&str]) -> String {
    let field = if let [only] = nodes { format!(" --field-selector spec.nodeName={only}") } else { String::new() };
    format!("kubectl describe pods -A -l {AGENT_PODS}{field}")
}

fn no_agent(nodes: &[&str]) -> String {
    format!(
        "the agent of gateway node {} is not Ready, and no other candidate has a Ready agent: {}",
        enumerate(nodes),
        find_agents(nodes)
    )
}

fn tally(election: &Election) -> String {
    let Election { type_, wanted, candidates, elected, kept, .. } = election;
    let what = type_name(*type_);
    let names: Vec<&str> = elected.iter().map(|e| e.node_name.as_str()).collect();
    if *kept {
        let reason = if *candidates == 1 {
            "the one candidate is not ready".to_owned()
        } else {
            format!("of {candidates} candidates none is ready")
        };
        return format!("{what}: {reason}, keeping {}, elected before", enumerate(&names));
    }
    if elected.len() == *wanted {
        return format!("{what}: {}", enumerate(&names));
    }
    let reason = match candidates {
        0 => "no node of the pool is a candidate".to_owned(),
        1 => "the one candidate is not ready".to_owned(),
        n => format!("of {n} candidates no other is ready"),
    };
    match elected.len() {
        0 => format!("{what}: none of {wanted} ({})", reason.replace("no other", "none")),
        n if n == *candidates => {
            format!("{what}: {n} of {wanted} ({}), there are no more candidates", enumerate(&names))
        }
        n => format!("{what}: {n} of {wanted} ({}), {reason}", enumerate(&names)),
    }
}

fn verdict(type_: ConditionType, ok: bool, reason: &'static str, message: String) -> Verdict {
    Verdict { type_, ok, reason, message }
}
