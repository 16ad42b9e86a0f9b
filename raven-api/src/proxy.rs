//! Names and numbers of the L7 path, where users have them already (`API.md`), and which ports of a kubelet it reaches.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::{Gateway, GatewayNode, GatewayStatus, gateway::EndpointType};

/// Where a cloud gateway node listens for requests over TLS, which name their node by SNI.
pub const INTERNAL_SECURE_PORT: u16 = 10263;
/// Where a cloud gateway node listens for requests in plain HTTP, which name their node by Host header or `?nodeName=`.
pub const INTERNAL_INSECURE_PORT: u16 = 10264;

/// The kubelet's TLS port, always reachable.
pub const KUBELET_PORT: u16 = 10250;
/// The kubelet's read-only port, always reachable.
pub const KUBELET_READ_ONLY_PORT: u16 = 10255;

/// Signer of the certificates that edge gateway nodes dial with.
pub const SIGNER_CLIENT: &str = "raven.openyurt.io/proxy-client";
/// Signer of the certificates that cloud gateway nodes answer with.
pub const SIGNER_SERVER: &str = "raven.openyurt.io/proxy-server";
/// ConfigMap with the certificates of the signers' CA, for everybody; and Secret with its key, for the controller alone.
pub const CA_NAME: &str = "raven-proxy-ca";
/// Key in that ConfigMap: PEM, the newest first; old ones stay until they expire.
pub const CA_KEY: &str = "ca.crt";

/// Service without a selector that stands for all cloud gateway nodes whose proxy is ready.
pub const INTERNAL_SERVICE: &str = "x-raven-proxy-internal-svc";
/// First part of the names of the Services of type LoadBalancer, one per elected proxy node.
pub const LOAD_BALANCER_PREFIX: &str = "x-raven-proxy-svc";
/// The same for the L3 tunnel.
pub const TUNNEL_LOAD_BALANCER_PREFIX: &str = "x-raven-tunnel-svc";
/// ConfigMap with a hosts file of all nodes, mounted into CoreDNS.
pub const DNS_CONFIG_MAP: &str = "edge-tunnel-nodes";
/// Key in that ConfigMap.
pub const DNS_KEY: &str = "tunnel-nodes";

/// Label on a Service: `proxy` or `tunnel`.
pub const LABEL_GATEWAY_TYPE: &str = "raven.openyurt.io/gateway-type";
/// Label on a Service or EndpointSlice: the gateway node behind it.
pub const LABEL_ENDPOINTS_NAME: &str = "raven.openyurt.io/endpoints-name";
/// Label on a Service that edge nodes should not see.
pub const LABEL_DISCARD: &str = "svc.openyurt.io/discard";

/// Key in an elected endpoint's `config`: the name by which a load balancer is reached that has no address.
pub const CONFIG_HOSTNAME: &str = "hostname";

/// Key in an elected proxy endpoint's `config`: UID of the node's Node object. A node that is deleted takes its certificate with it, also
/// where another one gets its name.
pub const CONFIG_NODE_UID: &str = "node-uid";

/// How a certificate of a proxy names that UID: a URI (RFC 9562, section 4).
pub const UID_URI: &str = "urn:uuid:";

/// Ports of nodes that the L7 path reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Spoken to in plain HTTP.
    pub http: BTreeSet<u16>,
    /// Spoken to over TLS.
    pub https: BTreeSet<u16>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { http: BTreeSet::from([KUBELET_READ_ONLY_PORT]), https: BTreeSet::from([KUBELET_PORT]) }
    }
}

impl Ports {
    /// The kubelet's two, and what exposed Gateways list besides. A port that is listed as both is spoken to over TLS.
    pub fn of<'a>(gateways: impl IntoIterator<Item = &'a Gateway>) -> Self {
        let mut ports = Self::default();
        for config in gateways.into_iter().filter(|g| !g.spec.expose_type.is_edge()).filter_map(|g| g.spec.proxy_config.as_ref()) {
            ports.http.extend(listed(config.proxy_http_port.as_deref()));
            ports.https.extend(listed(config.proxy_https_port.as_deref()));
        }
        // A listener for two ports would hand the one's requests to the other: the first keeps it.
        let mut listeners = BTreeSet::new();
        ports.https.retain(|port| listeners.insert(secure_listener(*port)));
        ports.http.retain(|port| !ports.https.contains(port));
        ports
    }

    /// True if the port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        self.http.contains(&port) || self.https.contains(&port)
    }
}

/// Elected nodes of exposed Gateways whose proxy is ready: they say so, and edges have tunnels there. An agent that died says what it said
/// last; its tunnels' other ends know better.
///
/// Witnesses are the elected nodes of edge Gateways that are Ready (condition Elected says so: a site without power says nothing new, and
/// is not asked). One that has as many witnesses as half of the best has: a gateway node that hardly a site reaches is passed over. Each
/// witness counts once, and for nobody but elected cloud nodes: what it says is its own list, and it may be a stolen box.
pub fn ready<'a>(gateways: &'a [Gateway], nodes: &'a [GatewayNode]) -> BTreeSet<&'a str> {
    let elected = |exposed: bool| {
        let of_kind = gateways.iter().filter(move |g| g.spec.expose_type.is_edge() != exposed);
        let status = of_kind.filter_map(|g| g.status.as_ref()).filter(move |s| exposed || condition_holds(s, "Elected"));
        status.flat_map(|s| &s.active_endpoints).filter(|e| e.type_ == EndpointType::Proxy).map(|e| e.node_name.as_str())
    };
    let (clouds, edges): (BTreeSet<&str>, BTreeSet<&str>) = (elected(true).collect(), elected(false).collect());
    let proxies = nodes.iter().filter_map(|n| Some((n.metadata.name.as_deref()?, n.status.as_ref()?.proxy.as_ref()?)));
    let proxies: Vec<_> = proxies.filter(|(_, proxy)| proxy.ready).collect();
    let mut witnesses: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, edge) in proxies.iter().filter(|(name, _)| edges.contains(name)) {
        let named: BTreeSet<&str> = edge.tunnels.iter().map(String::as_str).filter(|name| clouds.contains(name)).collect();
        named.into_iter().for_each(|cloud| *witnesses.entry(cloud).or_default() += 1);
    }
    let most = witnesses.values().copied().max().unwrap_or(0);
    let seen = |name: &str| most == 0 || witnesses.get(name).copied().unwrap_or(0) * 2 >= most;
    proxies.iter().map(|(name, _)| *name).filter(|name| clouds.contains(name) && seen(name)).collect()
}

fn condition_holds(status: &GatewayStatus, type_: &str) -> bool {
    status.conditions.iter().any(|c| c.type_ == type_ && c.status == "True")
}

/// What is no port is left out: the schema lets nothing else through than digits and commas.
fn listed(text: Option<&str>) -> impl Iterator<Item = u16> {
    text.unwrap_or_default().split(',').filter_map(|port| port.trim().parse().ok()).filter(|port| *port != 0)
}

/// Where a cloud gateway node listens for requests over TLS to `port`. Ports above 10,000 share theirs with the one 10,000 or more below,
/// so not both can be had ([`Ports::of`]). SNI tells a node and no port, so each port has a listener of
/// its own.
pub fn secure_listener(port: u16) -> u16 {
    if port == KUBELET_PORT { INTERNAL_SECURE_PORT } else { 20_000 + port % 10_000 }
}

/// A host as a certificate has it: of the ways in which a person may write an address (`2001:DB8:0::1`) one; a name as it is.
pub fn canonical_host(host: &str) -> String {
    host.parse::<IpAddr>().map_or_else(|_| host.to_owned(), |address| address.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{Endpoint, ExposeType, GatewaySpec, ProxyConfig};
    use crate::gateway_node::{GatewayNodeSpec, GatewayNodeStatus, ProxyStatus};

    fn gateway(expose_type: ExposeType, http: &str, https: &str) -> Gateway {
        let proxy_config =
            Some(ProxyConfig { replicas: 1, proxy_http_port: Some(http.to_owned()), proxy_https_port: Some(https.to_owned()) });
        Gateway::new("g", GatewaySpec { expose_type, proxy_config, ..GatewaySpec::default() })
    }

    #[test]
    fn ports_are_the_kubelets_and_those_of_exposed_gateways() {
        let cloud = gateway(ExposeType::PublicIP, "9445,9100", "10250,9443,9100");
        let edge = gateway(ExposeType::Edge, "80", "443");
        let ports = Ports::of([&cloud, &edge]);
        assert_eq!(ports.http, BTreeSet::from([9445, 10255]));
        assert_eq!(ports.https, BTreeSet::from([9100, 9443, 10250]));
        assert!(!ports.contains(443));
        let colliding = gateway(ExposeType::PublicIP, "", "9443,19443");
        assert_eq!(Ports::of([&colliding]).https, BTreeSet::from([9443, 10250]), "19443 would be 9443's listener");
        assert_eq!(Ports::of([&gateway(ExposeType::PublicIP, "", "0,99999")]), Ports::default());
    }

    #[test]
    fn an_edge_has_one_voice_for_each_cloud_node_and_none_for_what_is_no_cloud_node() {
        let site = |name: &str, expose_type: ExposeType, nodes: &[&str]| {
            let mut gateway = Gateway::new(name, GatewaySpec { expose_type, ..GatewaySpec::default() });
            let elected =
                nodes.iter().map(|node| Endpoint { node_name: (*node).to_owned(), type_: EndpointType::Proxy, ..Endpoint::default() });
            let condition = serde_json::json!({ "type": "Elected", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
            let conditions = vec![serde_json::from_value(condition).expect("a condition")];
            gateway.status = Some(GatewayStatus { active_endpoints: elected.collect(), conditions, ..GatewayStatus::default() });
            gateway
        };
        let node = |name: &str, tunnels: Vec<String>| {
            let mut node = GatewayNode::new(name, GatewayNodeSpec::default());
            let proxy = Some(ProxyStatus { ready: true, tunnels, ..ProxyStatus::default() });
            node.status = Some(GatewayNodeStatus { proxy, ..GatewayNodeStatus::default() });
            node
        };
        let gateways =
            [site("cloud", ExposeType::PublicIP, &["a", "b"]), site("x", ExposeType::Edge, &["x1"]), site("y", ExposeType::Edge, &["y1"])];
        let ready_with = |stolen: Vec<String>| {
            let honest = vec!["a".to_owned(), "b".to_owned()];
            let nodes = [node("a", vec![]), node("b", vec![]), node("x1", honest), node("y1", stolen)];
            ready(&gateways, &nodes).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(ready_with(vec!["ghost".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(ready_with(vec!["a".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(ready_with((0..10_000).map(|n| format!("ghost-{n}")).collect()), ["a", "b"]);
    }
}
