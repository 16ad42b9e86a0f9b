//! Names and ports of the L7 half, and the ports of nodes that it reaches.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::gateway::Gateway;

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

/// Key in an elected proxy endpoint's `config`: `true` if the proxy of an exposed Gateway works, as the controller and edges
/// observe it.
pub const CONFIG_PROXY_READY: &str = "proxy-ready";

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
    use crate::gateway::{ExposeType, GatewaySpec, ProxyConfig};

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
}
