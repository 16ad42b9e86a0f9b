//! The Gateway, version v1alpha1, as the oldest OpenYurt installations have it. Converted from and to v1beta1.
//!
//! The controller's conversion webhook serves it. The schema rejects the same values as v1beta1's: the API server
//! validates an object in the version of the request, not in the storage version.

#![allow(unreachable_pub, reason = "kube's derive macros generate public items in private modules")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gateway::{ExposeType, PUBLIC_IP_RULE};

/// Desired pool in v1alpha1.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "raven.openyurt.io",
    version = "v1alpha1",
    kind = "Gateway",
    plural = "gateways",
    shortname = "gw",
    category = "yurt",
    status = "GatewayStatus",
    storage = false,
    derive = "PartialEq",
    printcolumn = r#"{"name":"ActiveEndpoint","type":"string","jsonPath":".status.activeEndpoint.nodeName"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.exposeType) || size(self.exposeType) == 0 || !has(self.endpoints) || self.endpoints.all(e, !has(e.underNAT) || !e.underNAT)")
        .message("gateway nodes of other pools dial an exposed gateway (exposeType is set): no endpoint of it may be underNAT"),
    validation = Rule::new("!has(self.endpoints) || self.endpoints.all(e, (has(e.underNAT) && e.underNAT) == (has(self.endpoints[0].underNAT) && self.endpoints[0].underNAT))")
        .message("underNAT must be the same for all endpoints of a gateway: they are behind the same site")
)]
pub struct GatewaySpec {
    /// Selects the nodes of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// `LoadBalancer`, or empty for an edge gateway.
    #[serde(default, skip_serializing_if = "ExposeType::is_edge")]
    pub expose_type: ExposeType,
    /// Candidates for the election of the gateway node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub endpoints: Vec<Endpoint>,
}

/// A candidate for the gateway node in v1alpha1.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(PUBLIC_IP_RULE)
        .message("publicIP must be an IPv4 or IPv6 address that other pools can dial, not a name or a prefix, and not a loopback, link-local or multicast address"))]
pub struct Endpoint {
    /// Kubernetes name of the node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// True if this node cannot be dialled from outside its site.
    #[serde(rename = "underNAT", default)]
    pub under_nat: bool,
    /// Address at which peers outside the site reach this node.
    #[serde(rename = "publicIP", default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub public_ip: Option<String>,
    /// Additional settings as key-value pairs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
}

/// Observed pool and elected gateway node in v1alpha1.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// Nodes of the pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<crate::gateway::NodeInfo>,
    /// The elected gateway node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_endpoint: Option<Endpoint>,
}
