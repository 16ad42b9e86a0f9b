//! The Gateway, version v1beta1 (the stored one): one resource per pool of nodes that reach each other directly.
//!
//! A person writes `spec`. The controller alone writes `status`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{DEFAULT_PROXY_PORT, DEFAULT_TUNNEL_PORT};

/// What a person asks for: who belongs to the pool, which nodes may carry its traffic, and how others reach them.
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
        .message("an exposed gateway (exposeType is set) is dialled by others: no endpoint of it may be underNAT"),
    validation = Rule::new("!has(self.endpoints) || self.endpoints.all(e, (has(e.underNAT) && e.underNAT) == (has(self.endpoints[0].underNAT) && self.endpoints[0].underNAT))")
        .message("underNAT must be the same for all endpoints of a gateway: they sit behind the same site"),
    validation = Rule::new("!has(self.proxyConfig) || !has(self.proxyConfig.Replicas) || !has(self.endpoints) || !self.endpoints.exists(e, e.type == 'proxy') || self.proxyConfig.Replicas <= self.endpoints.filter(e, e.type == 'proxy').size()")
        .message("proxyConfig.Replicas is larger than the number of endpoints of type proxy (list more of them, or none: then every node is a candidate)")
)]
pub struct GatewaySpec {
    /// Which nodes belong to the pool, besides those labelled `raven.openyurt.io/gateway=<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// `PublicIP` or `LoadBalancer`: an exposed ('cloud') gateway, which others dial. Empty: an edge gateway, which dials.
    #[serde(default, skip_serializing_if = "ExposeType::is_edge")]
    pub expose_type: ExposeType,
    /// The L7 proxy: replicas and ports. Left out: one replica with the default ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_config: Option<ProxyConfig>,
    /// The L3 tunnel. Left out: one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_config: Option<TunnelConfig>,
    /// Candidates for the election, in order of preference. Empty: every node of the pool is a candidate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub endpoints: Vec<Endpoint>,
}

/// How others reach an exposed gateway.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExposeType {
    /// Not exposed: an edge gateway, which dials.
    #[default]
    #[serde(rename = "")]
    Edge,
    /// By `endpoints[].publicIP` (or the node's own address where that is left out).
    PublicIP,
    /// By a Service of type LoadBalancer that the controller makes.
    LoadBalancer,
}

impl ExposeType {
    /// True for an edge gateway: nobody dials it.
    pub fn is_edge(&self) -> bool {
        *self == Self::Edge
    }
}

/// The L7 proxy of a pool.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
pub struct ProxyConfig {
    /// How many proxy endpoints to elect; left out: 1. 0 switches L7 off for this pool. (Capital R, as upstream has it.)
    #[serde(rename = "Replicas", default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: i32,
    /// Comma list of plain-HTTP ports published on the internal Service, e.g. `10255,9445`.
    #[serde(rename = "proxyHTTPPort", default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^([0-9]{1,5}(,[0-9]{1,5})*)?$"))]
    pub proxy_http_port: Option<String>,
    /// Comma list of TLS ports published on the internal Service, e.g. `10250,9100`.
    #[serde(rename = "proxyHTTPSPort", default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^([0-9]{1,5}(,[0-9]{1,5})*)?$"))]
    pub proxy_https_port: Option<String>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self { replicas: one(), proxy_http_port: None, proxy_https_port: None }
    }
}

/// The L3 tunnel of a pool.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
pub struct TunnelConfig {
    /// How many tunnel endpoints to elect, all of them active; left out: 1. 0 switches L3 off for this pool. (Capital R, as upstream has it.)
    #[serde(rename = "Replicas", default = "one")]
    #[schemars(range(min = 0, max = 16))]
    pub replicas: i32,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self { replicas: one() }
    }
}

// A config that is given without replicas was given for something else in it: only a zero that somebody wrote switches off.
fn one() -> i32 {
    1
}

/// What an endpoint carries.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum EndpointType {
    /// L3: WireGuard.
    #[default]
    Tunnel,
    /// L7: kubelet traffic.
    Proxy,
}

/// A candidate (in `spec`) or elected (in `status`) gateway node.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.publicIP) || size(self.publicIP) == 0 || (isIP(self.publicIP) && ip(self.publicIP).isGlobalUnicast())")
        .message("publicIP must be an IPv4 or IPv6 address that others can dial, not a name or a prefix, and not a loopback, link-local or multicast address"))]
pub struct Endpoint {
    /// The node, by its Kubernetes name.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// What it carries.
    #[serde(rename = "type", default)]
    pub type_: EndpointType,
    /// Port that others dial; see [`Endpoint::port_or_default`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<i32>,
    /// True if nobody can dial this node from outside its site.
    #[serde(rename = "underNAT", default)]
    pub under_nat: bool,
    /// What upstream's agents observed of the NAT; kept, not used.
    #[serde(rename = "natType", default, skip_serializing_if = "Option::is_none")]
    pub nat_type: Option<String>,
    /// Port by which others reach `port` from outside, where the site's router maps it to another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub public_port: Option<i32>,
    /// Address by which others reach this node from outside.
    // 45: the longest text of an IPv6 address. Without a bound here and on both lists of endpoints the API server refuses the CRD,
    // since the rule above could cost too much.
    #[serde(rename = "publicIP", default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub public_ip: Option<String>,
    /// Free settings. `publicKey`: a WireGuard key that a person set by hand.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
}

impl Endpoint {
    /// The port, or the default of its type. Out-of-range values (the schema refuses them) count as unset.
    pub fn port_or_default(&self) -> u16 {
        let default = match self.type_ {
            EndpointType::Tunnel => DEFAULT_TUNNEL_PORT,
            EndpointType::Proxy => DEFAULT_PROXY_PORT,
        };
        port(self.port).unwrap_or(default)
    }

    /// The port that a peer outside the site dials.
    pub fn dialled_port(&self) -> u16 {
        port(self.public_port).unwrap_or_else(|| self.port_or_default())
    }
}

fn port(value: Option<i32>) -> Option<u16> {
    value.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0)
}

/// What the controller found and decided.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// The pool's nodes, sorted by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeInfo>,
    /// How many there are (for `kubectl get`).
    #[serde(default)]
    pub node_count: i32,
    /// The elected gateway nodes, sorted by type, then in order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub active_endpoints: Vec<Endpoint>,
    /// What works and what is missing, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Generation of `spec` that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// One node of a pool.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Kubernetes name.
    pub node_name: String,
    /// First InternalIP (IPv4 before IPv6): the outer address of overlay packets.
    #[serde(rename = "privateIP", default)]
    pub private_ip: String,
    /// Pod prefixes of the node, both families.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<String>,
}

impl Gateway {
    /// How many tunnel endpoints are wanted.
    pub fn tunnel_replicas(&self) -> usize {
        self.spec.tunnel_config.as_ref().map_or(1, |c| c.replicas.max(0) as usize)
    }

    /// How many proxy endpoints are wanted.
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
    fn replicas_are_one_unless_somebody_wrote_a_number() {
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
