//! NodePool of OpenYurt (`apps.openyurt.io`), as far as Raven reads it: optional, its CRD may be absent.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a NodePool says.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(group = "apps.openyurt.io", version = "v1beta1", kind = "NodePool", plural = "nodepools", status = "NodePoolStatus")]
#[serde(rename_all = "camelCase")]
pub struct NodePoolSpec {
    /// `Edge` or `Cloud`.
    #[serde(rename = "type", default)]
    pub type_: String,
    /// The pool has no CNI.
    #[serde(default)]
    pub host_network: bool,
    /// Its nodes reach each other without help.
    #[serde(default)]
    pub inter_connectivity: bool,
}

/// What OpenYurt's controller found.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodePoolStatus {
    /// Names of its nodes.
    #[serde(default)]
    pub nodes: Vec<String>,
}
