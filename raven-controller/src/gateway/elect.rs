//! Elects the gateway nodes of a pool: ready candidates in order of preference; an elected node stays elected.
//!
//! The election is sticky because each change of a gateway node breaks the flows that it carries: a preferred node that
//! becomes ready again does not replace the elected one. A node that is cut off from all other pools
//! ([`links`](super::links)) or on which no agent works ([`agents`](super::agents)) is replaced.
//!
//! If no candidate is ready, the previously elected nodes stay elected. A site that loses only its connection to the
//! API server looks like this: all its nodes become NotReady at once, while its tunnel may still carry traffic, and no
//! node could replace them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use raven_api::gateway::{CONFIG_PUBLIC_KEY, Endpoint, EndpointType, ExposeType};
use raven_api::names::{LABEL_GATEWAY, SWITCH_L3, SWITCH_L7};
use raven_api::proxy::{CONFIG_HOSTNAME, CONFIG_NODE_UID, CONFIG_PROXY_READY};

use super::facts::{BalancerFacts, Family, GatewayFacts, NodeFacts, NodeName};
use super::inputs::Inputs;
use super::keys::{self, KeyHolders};
use super::links::Links;
use super::refusal::Refusal;

/// Result of the election for one endpoint type.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Election {
    /// Type of the elected endpoints.
    pub(crate) type_: EndpointType,
    /// Number of endpoints to elect.
    pub(crate) wanted: usize,
    /// Number of candidates, ready or not.
    pub(crate) candidates: usize,
    /// Elected endpoints in order of preference.
    pub(crate) elected: Vec<Endpoint>,
    /// True if no candidate is ready and the previously elected nodes stay elected.
    pub(crate) kept: bool,
    /// Elected nodes on which no agent works: no candidate with an agent is left.
    pub(crate) without_agent: Vec<String>,
}

impl Election {
    /// Returns the number of elected nodes that are ready.
    pub(crate) fn ready(&self) -> usize {
        if self.kept { 0 } else { self.elected.len() }
    }

    /// True if gateway nodes of other pools can dial one of an exposed Gateway's elected nodes.
    pub(crate) fn can_relay(&self, gateway: &GatewayFacts) -> bool {
        let balanced = gateway.resource.spec.expose_type == ExposeType::LoadBalancer;
        let addressed = |e: &Endpoint| e.public_ip.is_some() || e.config.contains_key(CONFIG_HOSTNAME);
        self.elected.iter().any(|endpoint| !balanced || addressed(endpoint))
    }

    /// Publishes the elected nodes as nodes that are not dialled.
    pub(crate) fn be_relayed(&mut self) {
        self.elected.iter_mut().for_each(|endpoint| endpoint.under_nat = true);
    }

    /// Adds the address of the load balancer to each elected endpoint without `publicIP`, if the Gateway is exposed
    /// by load balancers.
    pub(crate) fn add_load_balancers(&mut self, inputs: &Inputs, gateway: &GatewayFacts) {
        if gateway.resource.spec.expose_type != ExposeType::LoadBalancer {
            return;
        }
        for endpoint in self.elected.iter_mut().filter(|e| e.public_ip.is_none()) {
            let of = |b: &&BalancerFacts| {
                b.gateway == gateway.name && b.type_ == self.type_ && b.node.as_str() == endpoint.node_name
            };
            let Some(balancer) = inputs.balancers.iter().find(of) else { continue };
            if balancer.host.parse::<IpAddr>().is_ok() {
                endpoint.public_ip = Some(balancer.host.clone());
            } else {
                endpoint.config.insert(CONFIG_HOSTNAME.to_owned(), balancer.host.clone());
            }
        }
    }
}

/// Elects endpoints of one type among `nodes`, the pool's nodes sorted by name.
pub(crate) fn elect(
    inputs: &Inputs,
    gateway: &GatewayFacts,
    type_: EndpointType,
    nodes: &[&NodeFacts],
    links: &Links<'_>,
    holders: &KeyHolders<'_>,
) -> Election {
    let wanted = replicas(gateway, type_);
    let candidates = candidates(gateway, type_, nodes);
    let count = candidates.len();
    let before = elected_before(gateway, type_);
    let was_elected = |endpoint: &Endpoint| before.contains(endpoint.node_name.as_str());
    let none_ready = candidates.iter().all(|(_, node)| !node.ready);
    let eligible = candidates.into_iter().filter(|(endpoint, node)| node.ready || none_ready && was_elected(endpoint));
    let eligible: Vec<(Endpoint, &NodeFacts)> = eligible.collect();

    // Nodes without an agent and nodes that are cut off come last, so they stay elected if no other candidate is left.
    let without_agent = |name: &NodeName| inputs.without_agent.contains(name);
    let mut by_preference: Vec<usize> = (0..eligible.len()).collect();
    by_preference.sort_by_key(|&i| {
        let (endpoint, node) = &eligible[i];
        (without_agent(&node.name), links.is_cut_off(gateway, &node.name, type_), !was_elected(endpoint))
    });
    let chosen: BTreeSet<usize> = by_preference.into_iter().take(wanted).collect();

    let elected = eligible.into_iter().enumerate().filter(|(i, _)| chosen.contains(i));
    let elected: Vec<Endpoint> =
        elected.map(|(_, (endpoint, node))| complete(inputs, gateway, endpoint, node, holders)).collect();
    let silent = elected.iter().map(|e| e.node_name.as_str()).filter(|name| without_agent(&(*name).into()));
    let without_agent = silent.map(str::to_owned).collect();
    Election { type_, wanted, candidates: count, kept: none_ready && !elected.is_empty(), elected, without_agent }
}

/// Returns refusals for endpoints of the spec that name a node outside the pool or a node without an address.
pub(crate) fn refused_endpoints(
    inputs: &Inputs,
    gateway: &GatewayFacts,
    family: Family,
    pool: &[&NodeFacts],
    unaddressed: &[&NodeFacts],
) -> Vec<Refusal> {
    let names: BTreeSet<&str> = gateway.resource.spec.endpoints.iter().map(|e| e.node_name.as_str()).collect();
    let unknown = names.into_iter().filter(|name| pool.iter().all(|node| node.name.as_str() != *name));
    let unaddressed = names_without_address(gateway, family, unaddressed);
    unknown
        .map(|name| {
            let message = if inputs.nodes.contains_key(&NodeName::from(name)) {
                format!(
                    "endpoint names node {name}, which is not a node of this pool: label the node {LABEL_GATEWAY}={}, or remove the endpoint",
                    gateway.name
                )
            } else {
                format!("endpoint names node {name}, which does not exist: correct the name (kubectl get nodes), or remove the endpoint")
            };
            Refusal::new("EndpointNodeUnknown", message)
        })
        .chain(unaddressed)
        .chain(without_valid_address(gateway))
        .collect()
}

fn without_valid_address(gateway: &GatewayFacts) -> impl Iterator<Item = Refusal> {
    let endpoints: BTreeSet<(&str, &str)> = gateway
        .resource
        .spec
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.public_address().is_none())
        .filter_map(|endpoint| Some((endpoint.node_name.as_str(), endpoint.public_ip.as_deref()?)))
        .filter(|(_, ip)| !ip.is_empty())
        .collect();
    endpoints.into_iter().map(|(node, ip)| {
        let message = format!(
            "publicIP {ip} of the endpoint of node {node} is ignored, because other pools cannot dial it: set an IPv4 or IPv6 address, or \
             config.hostname for a DNS name, or remove it"
        );
        Refusal::new("EndpointAddressInvalid", message)
    })
}

fn names_without_address(gateway: &GatewayFacts, family: Family, unaddressed: &[&NodeFacts]) -> Vec<Refusal> {
    let listed = |node: &&&NodeFacts| gateway.resource.spec.endpoints.iter().any(|e| e.node_name == node.name.as_str());
    let bare = unaddressed.iter().filter(listed);
    bare.map(|node| {
        let message = format!(
            "endpoint names node {}, which cannot be elected: it has no {family} InternalIP, and {family} is the address family of this pool; \
             set --node-ip of its kubelet, or check the cloud provider",
            node.name,
            family = family.as_str()
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

// In order of preference: as listed, or by name if no endpoint of this type is listed.
fn candidates<'a>(
    gateway: &GatewayFacts,
    type_: EndpointType,
    nodes: &[&'a NodeFacts],
) -> Vec<(Endpoint, &'a NodeFacts)> {
    let listed = &gateway.resource.spec.endpoints;
    if !listed.iter().any(|e| e.type_ == type_) {
        return nodes.iter().map(|node| (implied(listed, type_, node), *node)).collect();
    }
    let mut seen = BTreeSet::new();
    let of_type = listed.iter().filter(|e| e.type_ == type_ && seen.insert(e.node_name.as_str()));
    of_type.filter_map(|e| nodes.iter().find(|n| n.name.as_str() == e.node_name).map(|n| (e.clone(), *n))).collect()
}

// Endpoints listed for the other type still determine whether the site is behind NAT and the node's public address.
// Ports differ by type.
fn implied(listed: &[Endpoint], type_: EndpointType, node: &NodeFacts) -> Endpoint {
    Endpoint {
        node_name: node.name.to_string(),
        type_,
        under_nat: listed.iter().any(|e| e.under_nat),
        public_ip: listed.iter().find(|e| e.node_name == node.name.as_str()).and_then(|e| e.public_ip.clone()),
        ..Default::default()
    }
}

// Adds what agents need to know of an elected node.
fn complete(
    inputs: &Inputs,
    gateway: &GatewayFacts,
    mut endpoint: Endpoint,
    node: &NodeFacts,
    holders: &KeyHolders<'_>,
) -> Endpoint {
    endpoint.port = Some(i32::from(endpoint.port_or_default()));
    // The API server would refuse the whole status because of a value that it stored before Raven's CRD was installed.
    endpoint.public_ip = endpoint.public_address().map(|ip| ip.to_string());
    endpoint.public_port = endpoint.public_port.filter(|port| (1..=i32::from(u16::MAX)).contains(port));
    // Always observed, never values from the spec.
    endpoint.config.remove(CONFIG_NODE_UID);
    endpoint.config.remove(CONFIG_PROXY_READY);
    match endpoint.type_ {
        EndpointType::Tunnel => {
            endpoint.config.insert(SWITCH_L3.to_owned(), inputs.switches.l3.to_string());
            let known = keys::in_status(gateway).find(|(node, _)| *node == endpoint.node_name).map(|(_, key)| key);
            let listed = endpoint.config.remove(CONFIG_PUBLIC_KEY);
            let key = holders.key_of(inputs, &node.name, [listed.as_deref(), known]);
            key.map(|key| endpoint.config.insert(CONFIG_PUBLIC_KEY.to_owned(), key));
        }
        EndpointType::Proxy => {
            endpoint.config.insert(SWITCH_L7.to_owned(), inputs.switches.l7.to_string());
            node.uid.clone().map(|uid| endpoint.config.insert(CONFIG_NODE_UID.to_owned(), uid));
            if inputs.ready_proxies.contains(&node.name) {
                endpoint.config.insert(CONFIG_PROXY_READY.to_owned(), true.to_string());
            }
        }
    }
    endpoint
}
