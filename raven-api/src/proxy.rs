//! Names and numbers of the L7 path, where users have them already (`API.md`), and which ports of a kubelet it reaches.

use std::collections::BTreeSet;

use crate::{Gateway, GatewayNode};

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
        ports.http.retain(|port| !ports.https.contains(port));
        ports
    }

    /// True if the port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        self.http.contains(&port) || self.https.contains(&port)
    }
}

/// Gateway nodes whose proxy is ready: they say so, and if there are edges with tunnels at all, one of them has a tunnel there. An agent
/// that died says what it said last; its tunnels' other ends know better.
pub fn ready(nodes: &[GatewayNode]) -> BTreeSet<&str> {
    let proxies = nodes.iter().filter_map(|n| Some((n.metadata.name.as_deref()?, n.status.as_ref()?.proxy.as_ref()?)));
    let ready: Vec<_> = proxies.filter(|(_, proxy)| proxy.ready).collect();
    let names: BTreeSet<&str> = ready.iter().map(|(name, _)| *name).collect();
    // Edges are those at the other ends of somebody's tunnels; each end names the other.
    let seen: BTreeSet<&str> = ready.iter().flat_map(|(_, proxy)| proxy.tunnels.iter().map(String::as_str)).collect();
    if seen.is_empty() { names } else { names.intersection(&seen).copied().collect() }
}

/// What is no port is left out: the schema lets nothing else through than digits and commas.
fn listed(text: Option<&str>) -> impl Iterator<Item = u16> {
    text.unwrap_or_default().split(',').filter_map(|port| port.trim().parse().ok()).filter(|port| *port != 0)
}

/// Where a cloud gateway node listens for requests over TLS to `port`. SNI tells a node and no port, so each port has a listener of
/// its own.
pub fn secure_listener(port: u16) -> u16 {
    if port == KUBELET_PORT { INTERNAL_SECURE_PORT } else { 20_000 + port % 10_000 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{ExposeType, GatewaySpec, ProxyConfig};

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
        assert_eq!(Ports::of([&gateway(ExposeType::PublicIP, "", "0,99999")]), Ports::default());
    }
}
