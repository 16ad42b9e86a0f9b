//! The Gateway, version v1beta1 (the storage version): one resource per pool of nodes that reach each other directly.
//!
//! Users write `spec`. The controller is the only writer of `status`.

#![allow(unreachable_pub, reason = "kube's derive macros generate public items in private modules")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{DEFAULT_PROXY_PORT, DEFAULT_TUNNEL_PORT};

/// Desired pool: its nodes, the candidates for gateway nodes, and how gateway nodes of other pools reach them.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "raven.openyurt.io",
    version = "v1beta1",
    kind = "Gateway",
    plural = "gateways",
    shortname = "gw",
    category = "yurt",
    status = "GatewayStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Expose","type":"string","jsonPath":".spec.exposeType"}"#,
    printcolumn = r#"{"name":"Nodes","type":"integer","jsonPath":".status.nodeCount","description":"nodes in the pool"}"#,
    printcolumn = r#"{"name":"Tunnel","type":"string","jsonPath":".status.activeEndpoints[?(@.type==\"tunnel\")].nodeName","description":"elected gateway nodes of the L3 tunnel"}"#,
    printcolumn = r#"{"name":"Proxy","type":"string","jsonPath":".status.activeEndpoints[?(@.type==\"proxy\")].nodeName","description":"elected gateway nodes of the L7 proxy","priority":1}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.exposeType) || size(self.exposeType) == 0 || !has(self.endpoints) || self.endpoints.all(e, !has(e.underNAT) || !e.underNAT)")
        .message("gateway nodes of other pools dial an exposed gateway (exposeType is set): no endpoint of it may be underNAT"),
    validation = Rule::new("!has(self.endpoints) || self.endpoints.all(e, (has(e.underNAT) && e.underNAT) == (has(self.endpoints[0].underNAT) && self.endpoints[0].underNAT))")
        .message("underNAT must be the same for all endpoints of a gateway: they are behind the same site"),
    validation = Rule::new("!has(self.proxyConfig) || !has(self.proxyConfig.Replicas) || !has(self.endpoints) || !self.endpoints.exists(e, e.type == 'proxy') || self.proxyConfig.Replicas <= self.endpoints.filter(e, e.type == 'proxy').size()")
        .message("proxyConfig.Replicas is larger than the number of endpoints of type proxy (list more of them, or none: then every node is a candidate)")
)]
pub struct GatewaySpec {
    /// Selects nodes of the pool, in addition to those labelled `raven.openyurt.io/gateway=<name>`. An empty selector
    /// matches no node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// `PublicIP` or `LoadBalancer`: an exposed ('cloud') gateway, dialled by gateway nodes of other pools. Empty: an
    /// edge gateway, which dials.
    #[serde(default, skip_serializing_if = "ExposeType::is_edge")]
    pub expose_type: ExposeType,
    /// Replicas and ports of the L7 proxy. Default: one replica with the default ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_config: Option<ProxyConfig>,
    /// Replicas of the L3 tunnel. Default: one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_config: Option<TunnelConfig>,
    /// `pool`: WireGuard also encrypts packets between the nodes of the pool and its gateway nodes, for LANs that are not
    /// trusted. Empty: WireGuard encrypts between gateway nodes only.
    #[serde(default, skip_serializing_if = "Encryption::is_default")]
    pub encryption: Encryption,
    /// Candidates for the election of gateway nodes, in order of preference. Empty: every node of the pool
    /// is a candidate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub endpoints: Vec<Endpoint>,
}

/// Which packets to and from other pools WireGuard encrypts.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Encryption {
    /// Those between gateway nodes.
    #[default]
    #[serde(rename = "")]
    Gateways,
    /// Those between a gateway node and the other nodes of its pool, too.
    #[serde(rename = "pool")]
    Pool,
}

impl Encryption {
    /// True if WireGuard encrypts between gateway nodes only.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How gateway nodes of other pools reach this gateway.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExposeType {
    /// Not exposed: an edge gateway, which dials.
    #[default]
    #[serde(rename = "")]
    Edge,
    /// Reached at `endpoints[].publicIP`, or at the node's own address if `publicIP` is not set.
    PublicIP,
    /// Reached through a Service of type LoadBalancer that the controller creates.
    LoadBalancer,
}

impl ExposeType {
    /// True for an edge gateway, which no peer dials.
    pub fn is_edge(&self) -> bool {
        *self == Self::Edge
    }
}

/// Configuration of a pool's L7 proxy.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
pub struct ProxyConfig {
    /// Number of proxy endpoints to elect. Default: 1. 0 turns L7 off for this pool. (Capital R for
    /// compatibility with upstream.)
    #[serde(rename = "Replicas", default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: i32,
    /// Comma-separated plain-HTTP ports published on the internal Service, for example `10255,9445`.
    #[serde(rename = "proxyHTTPPort", default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^ *([0-9]{1,5} *(, *[0-9]{1,5} *)*)?$"))]
    pub proxy_http_port: Option<String>,
    /// Comma-separated TLS ports published on the internal Service, for example `10250,9100`.
    #[serde(rename = "proxyHTTPSPort", default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^ *([0-9]{1,5} *(, *[0-9]{1,5} *)*)?$"))]
    pub proxy_https_port: Option<String>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self { replicas: one(), proxy_http_port: None, proxy_https_port: None }
    }
}

/// Configuration of a pool's L3 tunnel.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
pub struct TunnelConfig {
    /// Number of tunnel endpoints to elect; all of them are active. Default: 1. 0 turns L3 off for this pool. (Capital
    /// R for compatibility with upstream.)
    #[serde(rename = "Replicas", default = "one")]
    #[schemars(range(min = 0, max = 16))]
    pub replicas: i32,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self { replicas: one() }
    }
}

// Only an explicit zero turns a half off: a config without `Replicas` was written for its other fields.
fn one() -> i32 {
    1
}

/// Kind of traffic that an endpoint carries.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum EndpointType {
    /// L3: the WireGuard tunnel.
    #[default]
    Tunnel,
    /// L7: requests to kubelets.
    Proxy,
}

/// Key in a tunnel endpoint's `config`: WireGuard public key, base64 of 32 bytes. In the status, the key that the node has
/// published in its GatewayNode, so that agents need to watch only Gateways.
pub const CONFIG_PUBLIC_KEY: &str = "publicKey";

/// CEL: `publicIP` looks like an address that can be dialled. The functions for addresses exist only from Kubernetes 1.31 on,
/// so this admits some IPv6 addresses that are malformed; the controller refuses those ([`Endpoint::public_address`]).
pub(crate) const PUBLIC_IP_RULE: &str = "!has(self.publicIP) || size(self.publicIP) == 0 || (\
    self.publicIP.matches(r'^(((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])[.]){3}(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])|[0-9a-fA-F]*:[0-9a-fA-F:]*:[0-9a-fA-F]*)$') && \
    !self.publicIP.matches(r'^(0[.]0[.]0[.]0$|127[.]|169[.]254[.]|22[4-9][.]|23[0-9][.]|255[.]255[.]255[.]255$|::1?$|[fF][eE][89abAB][0-9a-fA-F]:|[fF][fF][0-9a-fA-F][0-9a-fA-F]:)'))";

/// A gateway node: a candidate in `spec`, elected in `status`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(PUBLIC_IP_RULE)
        .message("publicIP must be an IPv4 or IPv6 address that other pools can dial, not a name or a prefix, and not a loopback, link-local or multicast address"))]
pub struct Endpoint {
    /// Kubernetes name of the node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Kind of traffic that the endpoint carries.
    #[serde(rename = "type", default)]
    pub type_: EndpointType,
    /// Port that the endpoint listens on. Default: 4500 for a tunnel, 10262 for a proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<i32>,
    /// True if this node cannot be dialled from outside its site.
    #[serde(rename = "underNAT", default)]
    pub under_nat: bool,
    /// NAT type as observed by upstream's agents. Stored, not used.
    #[serde(rename = "natType", default, skip_serializing_if = "Option::is_none")]
    pub nat_type: Option<String>,
    /// Port at which peers outside the site reach `port`, if the site's router maps it to a different one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub public_port: Option<i32>,
    /// Address at which peers outside the site reach this node.
    // 45 is the length of the longest textual IPv6 address. Without a bound here and on both lists of endpoints the API
    // server rejects the CRD because the estimated cost of the rule exceeds its budget.
    #[serde(rename = "publicIP", default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub public_ip: Option<String>,
    /// Additional settings. `publicKey`: a WireGuard public key set by the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
}

impl Endpoint {
    /// Port that the endpoint listens on, or the default of its type. Out-of-range values (the schema rejects them)
    /// count as unset.
    pub fn port_or_default(&self) -> u16 {
        let default = match self.type_ {
            EndpointType::Tunnel => DEFAULT_TUNNEL_PORT,
            EndpointType::Proxy => DEFAULT_PROXY_PORT,
        };
        port(self.port).unwrap_or(default)
    }

    /// `publicIP`, if it is set and can be dialled. The schema rejects any other value, but the object may be older.
    pub fn public_address(&self) -> Option<IpAddr> {
        let ip: IpAddr = self.public_ip.as_deref()?.parse().ok()?;
        let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
        let local = match ip {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
        };
        (!special && !local).then_some(ip)
    }

    /// Port that a peer outside the site dials.
    pub fn dialled_port(&self) -> u16 {
        port(self.public_port).unwrap_or_else(|| self.port_or_default())
    }
}

fn port(value: Option<i32>) -> Option<u16> {
    value.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0)
}

/// Observed pool and elected gateway nodes.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// Nodes of the pool, sorted by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeInfo>,
    /// Number of nodes in the pool (for `kubectl get`).
    #[serde(default)]
    pub node_count: i32,
    /// Elected gateway nodes, sorted by type, then in order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub active_endpoints: Vec<Endpoint>,
    /// Gateway nodes of other pools dial this pool, and it relays: exposeType is set, or, in a cluster where no Gateway has
    /// it, the pool is in the cloud and not under NAT.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exposed: bool,
    /// State of the Gateway: conditions Ready, Elected and Accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Generation of `spec` that this status was computed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// A node of a pool.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Kubernetes name of the node.
    pub node_name: String,
    /// First InternalIP of the node in the pool's address family: the outer address of overlay packets. The family is
    /// chosen when the pool first has nodes, and kept: IPv6 if most nodes have only IPv6, otherwise IPv4.
    #[serde(rename = "privateIP", default)]
    pub private_ip: String,
    /// All InternalIPs of a node that has several, privateIP first; at most 8.
    #[serde(rename = "privateIPs", default, skip_serializing_if = "Vec::is_empty")]
    pub private_ips: Vec<String>,
    /// Prefixes that the node carries, both address families.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<String>,
    /// In a pool with encryption: WireGuard public key of the node, base64 of 32 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
}

impl Gateway {
    /// True if gateway nodes of other pools dial this pool.
    pub fn is_exposed(&self) -> bool {
        !self.spec.expose_type.is_edge() || self.status.as_ref().is_some_and(|status| status.exposed)
    }

    /// True if WireGuard also encrypts packets between the nodes of the pool and its gateway nodes.
    pub fn encrypts_pool(&self) -> bool {
        self.spec.encryption == Encryption::Pool
    }

    /// Number of tunnel endpoints to elect.
    pub fn tunnel_replicas(&self) -> usize {
        self.spec.tunnel_config.as_ref().map_or(1, |c| c.replicas.max(0) as usize)
    }

    /// Number of proxy endpoints to elect.
    pub fn proxy_replicas(&self) -> usize {
        self.spec.proxy_config.as_ref().map_or(1, |c| c.replicas.max(0) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn gateway(spec: serde_json::Value) -> Gateway {
        serde_json::from_value(json!({
            "apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway", "metadata": {"name": "g"}, "spec": spec,
        }))
        .expect("a Gateway written in a test")
    }

    #[test]
    fn replicas_default_to_one() {
        for (spec, expected) in [
            (json!({}), (1, 1)),
            (json!({"tunnelConfig": {}, "proxyConfig": {"proxyHTTPPort": "10255"}}), (1, 1)),
            (json!({"tunnelConfig": {"Replicas": 2}, "proxyConfig": {"Replicas": 0}}), (2, 0)),
        ] {
            let gateway = gateway(spec.clone());
            assert_eq!((gateway.tunnel_replicas(), gateway.proxy_replicas()), expected, "{spec}");
        }
        assert_eq!((TunnelConfig::default().replicas, ProxyConfig::default().replicas), (1, 1));
    }
}
