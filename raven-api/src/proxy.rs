//! Names and ports of the L7 half, the ports of nodes that it reaches, and which cloud proxies count as ready.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::condition::ConditionType;
use crate::gateway::{EndpointType, Gateway, GatewayStatus};
use crate::gateway_node::GatewayNode;

/// Port of a cloud gateway node for requests over TLS. SNI names the target node.
pub const INTERNAL_SECURE_PORT: u16 = 10263;
/// Port of a cloud gateway node for plain-HTTP requests. The Host header or `?nodeName=` names the target node.
pub const INTERNAL_INSECURE_PORT: u16 = 10264;

/// TLS port of the kubelet; always reachable.
pub const KUBELET_PORT: u16 = 10250;
/// Read-only port of the kubelet; always reachable.
pub const KUBELET_READ_ONLY_PORT: u16 = 10255;

/// Signer of the client certificates of edge gateway nodes.
pub const SIGNER_CLIENT: &str = "raven.openyurt.io/proxy-client";
/// Signer of the server certificates of cloud gateway nodes.
pub const SIGNER_SERVER: &str = "raven.openyurt.io/proxy-server";
/// Name of two objects: the ConfigMap with the certificates of the signers' CA, readable by all agents, and the Secret
/// with the CA's key, readable by the controller only.
pub const CA_NAME: &str = "raven-proxy-ca";
/// Key in the CA's ConfigMap: PEM certificates, the newest first. Old certificates stay until they expire.
pub const CA_KEY: &str = "ca.crt";

/// Service without a selector in front of all cloud gateway nodes whose proxy is ready.
pub const INTERNAL_SERVICE: &str = "x-raven-proxy-internal-svc";
/// Name prefix of the Services of type LoadBalancer, one per elected proxy node.
pub const LOAD_BALANCER_PREFIX: &str = "x-raven-proxy-svc";
/// Name prefix of the Services of type LoadBalancer, one per elected tunnel node.
pub const TUNNEL_LOAD_BALANCER_PREFIX: &str = "x-raven-tunnel-svc";
/// ConfigMap with a hosts file of all nodes, mounted into CoreDNS.
pub const DNS_CONFIG_MAP: &str = "edge-tunnel-nodes";
/// Key of the hosts file in [`DNS_CONFIG_MAP`].
pub const DNS_KEY: &str = "tunnel-nodes";

/// Label on a Service: endpoint type, `proxy` or `tunnel`.
pub const LABEL_GATEWAY_TYPE: &str = "raven.openyurt.io/gateway-type";
/// Label on a Service or EndpointSlice: name of the gateway node behind it.
pub const LABEL_ENDPOINTS_NAME: &str = "raven.openyurt.io/endpoints-name";
/// Label on a Service: OpenYurt hides it from edge nodes.
pub const LABEL_DISCARD: &str = "svc.openyurt.io/discard";

/// Key in an elected endpoint's `config`: host name of a load balancer that has no address.
pub const CONFIG_HOSTNAME: &str = "hostname";

/// Key in an elected proxy endpoint's `config`: UID of the Node object. Certificates are bound to the UID: deleting the
/// Node revokes them, even if a later Node has the same name.
pub const CONFIG_NODE_UID: &str = "node-uid";

/// URI scheme of the Node UID in a proxy certificate's subject alternative name (RFC 9562, section 4).
pub const UID_URI: &str = "urn:uuid:";

/// Ports of nodes that the L7 half reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Ports that serve plain HTTP.
    pub http: BTreeSet<u16>,
    /// Ports that serve TLS.
    pub https: BTreeSet<u16>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { http: BTreeSet::from([KUBELET_READ_ONLY_PORT]), https: BTreeSet::from([KUBELET_PORT]) }
    }
}

impl Ports {
    /// Returns the two ports of the kubelet and those listed by exposed Gateways. A port listed as both HTTP and
    /// HTTPS serves TLS.
    pub fn of<'a>(gateways: impl IntoIterator<Item = &'a Gateway>) -> Self {
        let mut ports = Self::default();
        for config in gateways.into_iter().filter(|g| g.is_exposed()).filter_map(|g| g.spec.proxy_config.as_ref()) {
            ports.http.extend(listed(config.proxy_http_port.as_deref()));
            ports.https.extend(listed(config.proxy_https_port.as_deref()));
        }
        // A listener cannot distinguish two ports: the first port keeps it.
        let mut listeners = BTreeSet::new();
        ports.https.retain(|port| listeners.insert(secure_listener(*port)));
        ports.http.retain(|port| !ports.https.contains(port));
        ports
    }

    /// True if the L7 half reaches the port.
    pub fn contains(&self, port: u16) -> bool {
        self.http.contains(&port) || self.https.contains(&port)
    }
}

/// Returns the elected nodes of exposed Gateways whose proxy is ready.
///
/// A node counts as ready if its own GatewayNode reports so and enough edges report a connection to it. The second
/// condition detects agents that died and left a stale status. Only elected proxy nodes of edge Gateways with condition
/// Elected True count: the status of a site without power is stale, too. "Enough" is at least half as many edges as the
/// best-connected cloud node has. Each edge counts once per cloud node, and only for elected cloud nodes: an edge node
/// may be stolen and report anything.
pub fn ready<'a>(gateways: &'a [Gateway], nodes: &'a [GatewayNode]) -> BTreeSet<&'a str> {
    let elected = |exposed: bool| {
        let of_kind = gateways.iter().filter(move |g| g.is_exposed() == exposed);
        let status = of_kind
            .filter_map(|g| g.status.as_ref())
            .filter(move |s| exposed || condition_holds(s, ConditionType::Elected));
        status
            .flat_map(|s| &s.active_endpoints)
            .filter(|e| e.type_ == EndpointType::Proxy)
            .map(|e| e.node_name.as_str())
    };
    let (clouds, edges): (BTreeSet<&str>, BTreeSet<&str>) = (elected(true).collect(), elected(false).collect());
    let proxies = nodes.iter().filter_map(|n| Some((n.metadata.name.as_deref()?, n.status.as_ref()?.proxy.as_ref()?)));
    let proxies: Vec<_> = proxies.filter(|(_, proxy)| proxy.ready).collect();
    let mut edges_connected: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, edge) in proxies.iter().filter(|(name, _)| edges.contains(name)) {
        let named: BTreeSet<&str> =
            edge.tunnels.iter().map(String::as_str).filter(|name| clouds.contains(name)).collect();
        named.into_iter().for_each(|cloud| *edges_connected.entry(cloud).or_default() += 1);
    }
    let most = edges_connected.values().copied().max().unwrap_or(0);
    let connected = |name: &str| most == 0 || edges_connected.get(name).copied().unwrap_or(0) * 2 >= most;
    proxies.iter().map(|(name, _)| *name).filter(|name| clouds.contains(name) && connected(name)).collect()
}

fn condition_holds(status: &GatewayStatus, type_: ConditionType) -> bool {
    status.conditions.iter().any(|c| c.type_ == type_.as_str() && c.status == "True")
}

/// Ports of a comma-separated list. Numbers that are no port are skipped; the schema admits digits and commas only.
fn listed(text: Option<&str>) -> impl Iterator<Item = u16> {
    text.unwrap_or_default().split(',').filter_map(|port| port.trim().parse().ok()).filter(|port| *port != 0)
}

/// Returns the listening port of a cloud gateway node for TLS requests to `port` of a node.
///
/// SNI names a node but no port, so each port has its own listener. Ports that are equal modulo 10,000 share a
/// listener; [`Ports::of`] then keeps the lower one only.
pub fn secure_listener(port: u16) -> u16 {
    if port == KUBELET_PORT { INTERNAL_SECURE_PORT } else { 20_000 + port % 10_000 }
}

/// Returns a host in the form used in certificates: the canonical text of an address (`2001:DB8:0::1` becomes
/// `2001:db8::1`), a name unchanged.
pub fn canonical_host(host: &str) -> String {
    host.parse::<IpAddr>().map_or_else(|_| host.to_owned(), |address| address.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{Endpoint, ExposeType, GatewaySpec, ProxyConfig};
    use crate::gateway_node::{GatewayNodeSpec, GatewayNodeStatus, ProxyStatus};

    fn gateway(expose_type: ExposeType, http: &str, https: &str) -> Gateway {
        let proxy_config = Some(ProxyConfig {
            replicas: 1,
            proxy_http_port: Some(http.to_owned()),
            proxy_https_port: Some(https.to_owned()),
        });
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
    fn an_edge_counts_once_per_cloud_node_and_only_for_cloud_nodes() {
        let site = |name: &str, expose_type: ExposeType, nodes: &[&str]| {
            let mut gateway = Gateway::new(name, GatewaySpec { expose_type, ..GatewaySpec::default() });
            let elected = nodes.iter().map(|node| Endpoint {
                node_name: (*node).to_owned(),
                type_: EndpointType::Proxy,
                ..Endpoint::default()
            });
            let condition = serde_json::json!({ "type": "Elected", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
            let conditions = vec![serde_json::from_value(condition).expect("a condition")];
            gateway.status =
                Some(GatewayStatus { active_endpoints: elected.collect(), conditions, ..GatewayStatus::default() });
            gateway
        };
        let node = |name: &str, tunnels: Vec<String>| {
            let mut node = GatewayNode::new(name, GatewayNodeSpec::default());
            let proxy = Some(ProxyStatus { ready: true, tunnels, ..ProxyStatus::default() });
            node.status = Some(GatewayNodeStatus { proxy, ..GatewayNodeStatus::default() });
            node
        };
        let gateways = [
            site("cloud", ExposeType::PublicIP, &["a", "b"]),
            site("x", ExposeType::Edge, &["x1"]),
            site("y", ExposeType::Edge, &["y1"]),
        ];
        let ready_with = |stolen: Vec<String>| {
            let both = vec!["a".to_owned(), "b".to_owned()];
            let nodes = [node("a", vec![]), node("b", vec![]), node("x1", both), node("y1", stolen)];
            ready(&gateways, &nodes).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(ready_with(vec!["ghost".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(ready_with(vec!["a".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(ready_with((0..10_000).map(|n| format!("ghost-{n}")).collect()), ["a", "b"]);
    }
}
