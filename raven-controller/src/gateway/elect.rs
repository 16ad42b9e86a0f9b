//! Picks a pool's gateway nodes: ready ones, in order of preference, and an elected one stays.
//!
//! Receives the pool's nodes and what the Gateway's own status says was elected before; gives the endpoints to announce. Sticky because
//! every move of a gateway breaks the flows it carries: a preferred node that comes back waits for its turn. One that is cut off from all
//! other pools ([`links`](super::links)) gives way.
//!
//! Where no candidate is ready, those elected before stay: a site that lost only its way to the API server looks so (all its nodes turn
//! NotReady at once), its tunnel may well carry traffic, and taking it down would help nobody, since there is no one to replace it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use raven_api::gateway::{Endpoint, EndpointType, ExposeType};
use raven_api::proxy::{CONFIG_HOSTNAME, CONFIG_NODE_UID};

use super::NodeName;
use super::inputs::{BalancerFacts, GatewayFacts, Inputs, NodeFacts};
use super::links::Links;
use super::status::Refusal;

/// Key in an elected tunnel endpoint's `config`: the ConfigMap's switch, as upstream's agents read it.
pub const CONFIG_L3: &str = "enable-l3-tunnel";
/// The same for a proxy endpoint.
pub const CONFIG_L7: &str = "enable-l7-proxy";

/// The outcome for one endpoint type.
#[derive(Clone, Debug, PartialEq)]
pub struct Election {
    /// What was elected for.
    pub type_: EndpointType,
    /// How many were wanted.
    pub wanted: usize,
    /// How many nodes could be elected if they were ready.
    pub candidates: usize,
    /// The elected, in order of preference.
    pub elected: Vec<Endpoint>,
    /// They are not ready, nobody is, and they stay because they were elected before.
    pub kept: bool,
}

// === impl Election ===

impl Election {
    /// How many of the elected are ready.
    pub fn ready(&self) -> usize {
        if self.kept { 0 } else { self.elected.len() }
    }
}

impl Election {
    /// Gives each of the elected the address of its load balancer, where the Gateway is exposed by one and nobody wrote an address.
    pub fn balance(&mut self, inputs: &Inputs, gateway: &GatewayFacts) {
        if gateway.resource.spec.expose_type != ExposeType::LoadBalancer {
            return;
        }
        for endpoint in self.elected.iter_mut().filter(|e| e.public_ip.as_deref().is_none_or(str::is_empty)) {
            let of = |b: &&BalancerFacts| b.gateway == gateway.name && b.type_ == self.type_ && b.node.as_str() == endpoint.node_name;
            let Some(balancer) = inputs.balancers.iter().find(of) else { continue };
            if balancer.host.parse::<IpAddr>().is_ok() {
                endpoint.public_ip = Some(balancer.host.clone());
            } else {
                endpoint.config.insert(CONFIG_HOSTNAME.to_owned(), balancer.host.clone());
            }
        }
    }
}

/// Elects for one type among `nodes`, the pool's nodes sorted by name.
pub fn elect(gateway: &GatewayFacts, type_: EndpointType, nodes: &[&NodeFacts], links: &Links<'_>, switch: bool) -> Election {
    let wanted = replicas(gateway, type_);
    let candidates = candidates(gateway, type_, nodes);
    let count = candidates.len();
    let before = elected_before(gateway, type_);
    let was_elected = |endpoint: &Endpoint| before.contains(endpoint.node_name.as_str());
    let dark = candidates.iter().all(|(_, node)| !node.ready);
    let eligible = candidates.into_iter().filter(|(endpoint, node)| node.ready || dark && was_elected(endpoint));
    let eligible: Vec<(Endpoint, &NodeFacts)> = eligible.collect();

    // Whoever is cut off comes last: where nobody else is to be had, it stays.
    let mut by_preference: Vec<usize> = (0..eligible.len()).collect();
    by_preference.sort_by_key(|&i| (links.is_cut_off(gateway, &eligible[i].1.name, type_), !was_elected(&eligible[i].0)));
    let chosen: BTreeSet<usize> = by_preference.into_iter().take(wanted).collect();

    let elected = eligible.into_iter().enumerate().filter(|(i, _)| chosen.contains(i));
    let elected: Vec<Endpoint> = elected.map(|(_, (endpoint, node))| announced(endpoint, node, switch)).collect();
    Election { type_, wanted, candidates: count, kept: dark && !elected.is_empty(), elected }
}

/// Endpoints of the spec that name a node outside of the pool, or one without an address: neither can be elected.
pub fn unknown_nodes(inputs: &Inputs, gateway: &GatewayFacts, pool: &[&NodeFacts]) -> Vec<Refusal> {
    let names: BTreeSet<&str> = gateway.resource.spec.endpoints.iter().map(|e| e.node_name.as_str()).collect();
    let unknown = names.into_iter().filter(|name| pool.iter().all(|node| node.name.as_str() != *name));
    let unaddressed = names_without_address(gateway, pool);
    unknown
        .map(|name| {
            let message = if inputs.nodes.contains_key(&NodeName::from(name)) {
                let label = raven_api::LABEL_GATEWAY;
                format!(
                    "endpoint names node {name}, which is not a node of this pool: label it {label}={}, or take it off the list",
                    gateway.name
                )
            } else {
                format!("endpoint names node {name}, which does not exist: correct the name (kubectl get nodes), or take it off the list")
            };
            Refusal::new("EndpointNodeUnknown", message)
        })
        .chain(unaddressed)
        .collect()
}

fn names_without_address(gateway: &GatewayFacts, pool: &[&NodeFacts]) -> Vec<Refusal> {
    let listed = |node: &&&NodeFacts| gateway.resource.spec.endpoints.iter().any(|e| e.node_name == node.name.as_str());
    let bare = pool.iter().filter(|node| node.address.is_none()).filter(listed);
    bare.map(|node| {
        let message = format!(
            "endpoint names node {}, which has no InternalIP, so it cannot be elected: see --node-ip of its kubelet, or the cloud provider",
            node.name
        );
        Refusal::new("EndpointNodeUnaddressed", message)
    })
    .collect()
}

fn replicas(gateway: &GatewayFacts, type_: EndpointType) -> usize {
    match type_ {
        EndpointType::Tunnel => gateway.resource.tunnel_replicas(),
        EndpointType::Proxy => gateway.resource.proxy_replicas(),
    }
}

fn elected_before(gateway: &GatewayFacts, type_: EndpointType) -> BTreeSet<&str> {
    let status = gateway.resource.status.as_ref();
    let before = status.into_iter().flat_map(|s| &s.active_endpoints);
    before.filter(|e| e.type_ == type_).map(|e| e.node_name.as_str()).collect()
}

// In order of preference: as listed, or by name where nothing of this type is listed.
fn candidates<'a>(gateway: &GatewayFacts, type_: EndpointType, nodes: &[&'a NodeFacts]) -> Vec<(Endpoint, &'a NodeFacts)> {
    let listed = &gateway.resource.spec.endpoints;
    if !listed.iter().any(|e| e.type_ == type_) {
        return nodes.iter().map(|node| (implied(listed, type_, node), *node)).collect();
    }
    let mut seen = BTreeSet::new();
    let of_type = listed.iter().filter(|e| e.type_ == type_ && seen.insert(e.node_name.as_str()));
    of_type.filter_map(|e| nodes.iter().find(|n| n.name.as_str() == e.node_name).map(|n| (e.clone(), *n))).collect()
}

// What is listed for the other type still tells about the site (behind NAT or not) and the node (its public address); ports are the type's own.
fn implied(listed: &[Endpoint], type_: EndpointType, node: &NodeFacts) -> Endpoint {
    Endpoint {
        node_name: node.name.to_string(),
        type_,
        under_nat: listed.iter().any(|e| e.under_nat),
        public_ip: listed.iter().find(|e| e.node_name == node.name.as_str()).and_then(|e| e.public_ip.clone()),
        ..Default::default()
    }
}

fn announced(mut endpoint: Endpoint, node: &NodeFacts, switch: bool) -> Endpoint {
    endpoint.port = Some(i32::from(endpoint.port_or_default()));
    let key = match endpoint.type_ {
        EndpointType::Tunnel => CONFIG_L3,
        EndpointType::Proxy => CONFIG_L7,
    };
    endpoint.config.insert(key.to_owned(), switch.to_string());
    // Never what a person wrote there.
    endpoint.config.remove(CONFIG_NODE_UID);
    if let (EndpointType::Proxy, Some(uid)) = (endpoint.type_, &node.uid) {
        endpoint.config.insert(CONFIG_NODE_UID.to_owned(), uid.clone());
    }
    endpoint
}
