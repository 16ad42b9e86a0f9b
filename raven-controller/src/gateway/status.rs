//! What a Gateway's status says: nodes, elected endpoints, and three conditions in words.
//!
//! A [`Draft`] collects what the parts found out about one Gateway; [`Draft::finish`] makes a [`Decision`] of it, which becomes a
//! `GatewayStatus` once the present one (for the transition times) and the time are known. One writer: nobody else writes status.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use raven_api::condition::{self, ConditionType, Verdict};
use raven_api::gateway::{Endpoint, EndpointType, ExposeType, Gateway, GatewayStatus, NodeInfo};
use raven_api::proxy::CONFIG_HOSTNAME;
use raven_api::{ANNOTATION_EXTRA_CIDRS, LABEL_GATEWAY};

use super::elect::Election;
use super::inputs::{GatewayFacts, Inputs, NodeFacts, Switches};
use super::{GatewayName, NodeName};

/// Reason of conditions (and of the Event about it) where no candidate is ready.
pub const NO_READY_NODE: &str = "NoReadyNode";

/// Something that a Gateway claims and does not get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// CamelCase, stable.
    pub reason: &'static str,
    /// Which object, what is wrong, what to do.
    pub message: String,
    /// What another Gateway should know of it.
    pub notice: Option<Notice>,
}

/// Word to the Gateway that stands in the way of another one's claim. It keeps what it has, so its status says nothing of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whom to tell.
    pub to: GatewayName,
    /// CamelCase, stable.
    pub reason: &'static str,
    /// Who claims what, and what to do.
    pub note: String,
}

impl Refusal {
    /// A refusal in words.
    pub fn new(reason: &'static str, message: String) -> Self {
        Self { reason, message, notice: None }
    }

    /// The same, and another Gateway is told.
    pub fn told(self, notice: Notice) -> Self {
        Self { notice: Some(notice), ..self }
    }
}

/// What is known of one Gateway while the decision is being made.
#[derive(Debug)]
pub struct Draft<'a> {
    /// The Gateway.
    pub gateway: &'a GatewayFacts,
    /// Its nodes that have an address, sorted by name, each with the prefixes that it carries.
    pub nodes: Vec<(&'a NodeFacts, Vec<IpNet>)>,
    /// Its nodes that have none: they cannot take part.
    pub unaddressed: Vec<NodeName>,
    /// L3.
    pub tunnel: Election,
    /// L7.
    pub proxy: Election,
    /// What was refused.
    pub refusals: Vec<Refusal>,
}

/// Beginning of the note about nodes whose address nodes of other pools, or of none, have, too: the Event about it is found by it.
pub const BY_NAME_ONLY: &str = "kubelets to be reached by name only";

/// What one Gateway has to know of the others.
#[derive(Debug, Default)]
pub struct ClusterView {
    /// Exposed Gateways, and whether others find an elected tunnel node there.
    exposed: Vec<(GatewayName, bool)>,
    /// InternalIPs that nodes of several pools, or of a pool and of none, have, and who has them.
    shared: Owners,
}

type Owners = BTreeMap<IpAddr, Vec<(Option<GatewayName>, NodeName)>>;

impl ClusterView {
    /// From all drafts, and the nodes in none of them.
    pub fn of(inputs: &Inputs, drafts: &[Draft<'_>]) -> Self {
        let exposed = drafts.iter().filter(|d| d.is_exposed());
        let mut exposed: Vec<_> = exposed.map(|d| (d.gateway.name.clone(), !d.tunnel.elected.is_empty())).collect();
        exposed.sort();
        Self { exposed, shared: shared_addresses(inputs, drafts) }
    }
}

/// What a Gateway's status should say, but for times.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The pool's nodes, sorted by name.
    pub nodes: Vec<NodeInfo>,
    /// The elected, tunnel before proxy.
    pub active_endpoints: Vec<Endpoint>,
    /// Ready, Elected, Accepted.
    pub verdicts: Vec<Verdict>,
    /// What condition Accepted is made of.
    pub refusals: Vec<Refusal>,
}

impl Decision {
    /// As a status. Conditions that did not change keep their transition time, so an unchanged decision gives an unchanged status.
    pub fn status(&self, gateway: &Gateway, now: Timestamp) -> GatewayStatus {
        let old = gateway.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
        let generation = gateway.metadata.generation;
        GatewayStatus {
            nodes: self.nodes.clone(),
            node_count: i32::try_from(self.nodes.len()).unwrap_or(i32::MAX),
            active_endpoints: self.active_endpoints.clone(),
            conditions: condition::merge(old, &self.verdicts, generation, now),
            observed_generation: generation,
        }
    }
}

fn shared_addresses(inputs: &Inputs, drafts: &[Draft<'_>]) -> Owners {
    let mut by_address = Owners::new();
    let mut members = BTreeSet::new();
    for draft in drafts {
        for (node, address) in draft.nodes.iter().filter_map(|(node, _)| Some((node, node.address?))) {
            members.insert(&node.name);
            by_address.entry(address).or_default().push((Some(draft.gateway.name.clone()), node.name.clone()));
        }
    }
    for node in inputs.nodes.values().filter(|node| !members.contains(&node.name)) {
        node.addresses().for_each(|address| by_address.entry(address).or_default().push((None, node.name.clone())));
    }
    by_address.retain(|_, owners| owners.iter().any(|(gateway, _)| *gateway != owners[0].0));
    by_address.values_mut().for_each(|owners| owners.sort());
    by_address
}

// === impl Draft ===

impl Draft<'_> {
    /// The decision, now that all the others are known.
    pub fn finish(self, cluster: &ClusterView, switches: Switches) -> Decision {
        let verdicts = vec![self.ready(cluster, switches), self.elected(), self.accepted()];
        let nodes = self.nodes.iter().map(|(node, subnets)| NodeInfo {
            node_name: node.name.to_string(),
            private_ip: node.address.map(|a| a.to_string()).unwrap_or_default(),
            subnets: subnets.iter().map(IpNet::to_string).collect(),
        });
        let active_endpoints = [self.tunnel.elected, self.proxy.elected].concat();
        Decision { nodes: nodes.collect(), active_endpoints, verdicts, refusals: self.refusals }
    }

    /// Others dial it.
    pub fn is_exposed(&self) -> bool {
        !self.gateway.resource.spec.expose_type.is_edge()
    }

    fn accepted(&self) -> Verdict {
        let Some(first) = self.refusals.first() else {
            return verdict(ConditionType::Accepted, true, "Accepted", "everything that this Gateway claims is in force".to_owned());
        };
        let messages: Vec<&str> = self.refusals.iter().map(|r| r.message.as_str()).collect();
        verdict(ConditionType::Accepted, false, first.reason, join_capped(&messages, "; "))
    }

    fn elected(&self) -> Verdict {
        let elections: Vec<&Election> = [&self.tunnel, &self.proxy].into_iter().filter(|e| e.wanted > 0).collect();
        let message = elections.iter().map(|e| tally(e)).collect::<Vec<_>>().join("; ");
        if elections.is_empty() {
            let message = "tunnelConfig.Replicas and proxyConfig.Replicas are 0: this pool is left alone".to_owned();
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
        let l3 = switches.l3 && self.tunnel.wanted > 0;
        let l7 = switches.l7 && self.proxy.wanted > 0;
        let notes = self.notes(cluster, switches);
        let say = |ok, reason, first: String| {
            let all: Vec<&str> = std::iter::once(first.as_str()).chain(notes.iter().map(String::as_str)).collect();
            verdict(ConditionType::Ready, ok, reason, join_capped(&all, "; "))
        };
        if !l3 && !l7 {
            return say(true, "Disabled", "neither the L3 tunnel nor the L7 proxy is switched on for this pool".to_owned());
        }
        if let Some((reason, message)) = self.obstacle(cluster, l3, l7) {
            return say(false, reason, message);
        }
        let lacking = self.tunnel.elected.len() < self.tunnel.wanted || self.proxy.elected.len() < self.proxy.wanted;
        if lacking || !self.refusals.is_empty() || !self.unaddressed.is_empty() {
            return say(true, "Degraded", format!("works, but not as asked: {}", self.complaint()));
        }
        say(true, "Ready", format!("{} in the pool, gateway: {}", count(self.nodes.len(), "node"), self.gateway_nodes()))
    }

    // One of several: the other two conditions have all.
    fn complaint(&self) -> String {
        match self.refusals.as_slice() {
            [] if self.tunnel.elected.len() < self.tunnel.wanted => tally(&self.tunnel),
            [] if self.proxy.elected.len() < self.proxy.wanted => tally(&self.proxy),
            [] => "not every node takes part".to_owned(),
            [only] => only.message.clone(),
            [first, more @ ..] => format!("{} (and {} more, see condition Accepted)", first.message, more.len()),
        }
    }

    // The first thing that keeps traffic from flowing, in the order in which a person would put it right.
    fn obstacle(&self, cluster: &ClusterView, l3: bool, l7: bool) -> Option<(&'static str, String)> {
        let name = &self.gateway.name;
        if self.nodes.is_empty() && self.unaddressed.is_empty() {
            return Some((
                "NoNode",
                format!(
                    "no node in the pool: label its nodes {LABEL_GATEWAY}={name} (kubectl label node NODE {LABEL_GATEWAY}={name}), or write a nodeSelector that matches them"
                ),
            ));
        }
        if self.nodes.is_empty() {
            return Some((
                "NoNodeAddress",
                "no node of the pool has an InternalIP: see --node-ip of the kubelet, or the cloud provider".to_owned(),
            ));
        }
        for (on, election) in [(l3, &self.tunnel), (l7, &self.proxy)] {
            if on && election.ready() == 0 {
                let what = if election.kept { "no gateway node is ready" } else { "no gateway node" };
                return Some((NO_READY_NODE, format!("{what}: {}", tally(election))));
            }
        }
        if l3 && self.nodes.iter().all(|(_, subnets)| subnets.is_empty()) {
            return Some(("NoPodPrefix", self.no_prefix()));
        }
        if self.is_exposed() { self.unreachable() } else { nobody_to_dial(cluster, l3) }
    }

    fn no_prefix(&self) -> String {
        if !self.refusals.is_empty() {
            return "no prefix of the pool was accepted: see condition Accepted".to_owned();
        }
        format!(
            "no node of the pool has a pod prefix (Node.spec.podCIDRs is empty): run kube-controller-manager with --allocate-node-cidrs, or, if the CNI gives out addresses by itself, \
             name the pool's prefixes in annotation {ANNOTATION_EXTRA_CIDRS}"
        )
    }

    fn unreachable(&self) -> Option<(&'static str, String)> {
        let without = self.without_public_ip();
        if self.gateway.resource.spec.expose_type != ExposeType::LoadBalancer || without.is_empty() {
            return None;
        }
        let message = format!(
            "exposeType is LoadBalancer and there is no address yet for {}: wait for the load balancer, or set publicIP in its endpoint",
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
            .filter(|e| e.public_ip.as_deref().is_none_or(str::is_empty) && !e.config.contains_key(CONFIG_HOSTNAME));
        let mut names: Vec<&str> = without.map(|e| e.node_name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    // Things that stop nothing and explain much.
    fn notes(&self, cluster: &ClusterView, switches: Switches) -> Vec<String> {
        let mut notes = Vec::new();
        let without = self.without_public_ip();
        if self.gateway.resource.spec.expose_type == ExposeType::PublicIP && !without.is_empty() {
            notes.push(format!("no publicIP is set for {}: others dial its InternalIP", enumerate(&without)));
        }
        if !self.unaddressed.is_empty() {
            notes.push(format!("left out, since they have no InternalIP: {}", enumerate(&self.unaddressed)));
        }
        let bare: Vec<&NodeName> = self.nodes.iter().filter(|(_, s)| s.is_empty()).map(|(n, _)| &n.name).collect();
        if !bare.is_empty() && bare.len() < self.nodes.len() {
            notes.push(format!("without a pod prefix: {}", enumerate(&bare)));
        }
        notes.extend(self.by_name_only(cluster).filter(|_| switches.l7));
        for (on, key) in [(switches.l3, super::elect::CONFIG_L3), (switches.l7, super::elect::CONFIG_L7)] {
            if !on {
                notes.push(format!("ConfigMap {} says {key}=false", crate::config::CONFIG_MAP));
            }
        }
        notes
    }

    // Sites that are clones of one image have the same addresses: which of them is meant by such an address is never guessed.
    fn by_name_only(&self, cluster: &ClusterView) -> Option<String> {
        if self.is_exposed() {
            return None;
        }
        let shared: Vec<String> = self
            .nodes
            .iter()
            .filter_map(|(node, _)| {
                let address = node.address?;
                let own = Some(&self.gateway.name);
                let (gateway, other) = cluster.shared.get(&address)?.iter().find(|(gateway, _)| gateway.as_ref() != own)?;
                let whose = gateway.as_ref().map_or_else(|| "no Gateway".to_owned(), |gateway| format!("Gateway {gateway}"));
                Some(format!("{} ({address}, which node {other} of {whose} has, too)", node.name))
            })
            .collect();
        (!shared.is_empty()).then(|| format!("{BY_NAME_ONLY}: {}", enumerate(&shared)))
    }

    fn gateway_nodes(&self) -> String {
        let mut names: Vec<&str> = self.tunnel.elected.iter().chain(&self.proxy.elected).map(|e| e.node_name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        enumerate(&names)
    }
}

fn nobody_to_dial(cluster: &ClusterView, l3: bool) -> Option<(&'static str, String)> {
    if cluster.exposed.is_empty() {
        let message = "no Gateway of the cluster is exposed, so this one has nobody to dial: set exposeType: PublicIP (or LoadBalancer) on the Gateway that others can reach, usually the cloud's";
        return Some(("NoExposedGateway", message.to_owned()));
    }
    if l3 && cluster.exposed.iter().all(|(_, elected)| !elected) {
        let names: Vec<&GatewayName> = cluster.exposed.iter().map(|(name, _)| name).collect();
        return Some((
            "NoExposedGateway",
            format!("nobody to dial: no tunnel node is elected in the exposed Gateway {}", enumerate(&names)),
        ));
    }
    None
}

fn tally(election: &Election) -> String {
    let Election { type_, wanted, candidates, elected, kept } = election;
    let what = type_name(*type_);
    let names: Vec<&str> = elected.iter().map(|e| e.node_name.as_str()).collect();
    if *kept {
        let why = if *candidates == 1 {
            "the one candidate is not ready".to_owned()
        } else {
            format!("of {candidates} candidates none is ready")
        };
        return format!("{what}: {why}, keeping {}, elected before", enumerate(&names));
    }
    if elected.len() == *wanted {
        return format!("{what}: {}", enumerate(&names));
    }
    let why = match candidates {
        0 => "no node of the pool is a candidate".to_owned(),
        1 => "the one candidate is not ready".to_owned(),
        n => format!("of {n} candidates no other is ready"),
    };
    match elected.len() {
        0 => format!("{what}: none of {wanted} ({})", why.replace("no other", "none")),
        n if n == *candidates => format!("{what}: {n} of {wanted} ({}), there are no more candidates", enumerate(&names)),
        n => format!("{what}: {n} of {wanted} ({}), {why}", enumerate(&names)),
    }
}

/// `tunnel` or `proxy`.
pub fn type_name(type_: EndpointType) -> &'static str {
    match type_ {
        EndpointType::Tunnel => "tunnel",
        EndpointType::Proxy => "proxy",
    }
}

fn verdict(type_: ConditionType, ok: bool, reason: &'static str, message: String) -> Verdict {
    Verdict { type_, ok, reason, message }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

// A pool may have thousands of nodes; a message is for a person, and an API object has a size.
pub(super) const SHOWN: usize = 5;

/// The first few names, and how many more there are.
pub fn enumerate<T: Display>(names: &[T]) -> String {
    let shown: Vec<String> = names.iter().take(SHOWN).map(ToString::to_string).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn join_capped(messages: &[&str], separator: &str) -> String {
    let shown = messages[..messages.len().min(SHOWN)].join(separator);
    match messages.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown}{separator}and {more} more"),
    }
}
