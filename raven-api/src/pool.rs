//! NodePool of OpenYurt (`apps.openyurt.io`): the fields that Raven reads. The CRD is optional.

#![allow(unreachable_pub, reason = "kube's derive macros generate public items in private modules")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Spec of a NodePool.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "apps.openyurt.io",
    version = "v1beta1",
    kind = "NodePool",
    plural = "nodepools",
    status = "NodePoolStatus"
)]
#[serde(rename_all = "camelCase")]
pub struct NodePoolSpec {
    /// Side of the pool: `Edge` or `Cloud`.
    #[serde(rename = "type", default)]
    pub type_: String,
    /// False if the pool's nodes do not reach each other. OpenYurt's own programs store no `false`, so a missing field says
    /// nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inter_connectivity: Option<bool>,
}

/// Status of a NodePool, written by OpenYurt's controller.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodePoolStatus {
    /// Names of the pool's nodes.
    #[serde(default)]
    pub nodes: Vec<String>,
}
