//! The CRDs, written to deploy/crds by `cargo xtask crds`.
//!
//! The two versions of the Gateway have different schemas; the controller's webhook converts between them
//! ([`crate::conversion`]). The manifest contains the webhook from the start, so the API server never serves v1alpha1
//! with conversion strategy `None`, which would drop every field that only one schema has. The manifest cannot contain
//! the webhook's CA: the controller adds `caBundle`. No other field manager owns that field, so applying the manifest
//! again neither removes it nor conflicts. Until `caBundle` is set, and while the webhook is unavailable, requests for
//! v1alpha1 fail with an error that names the webhook. v1beta1 is the storage version and needs no conversion.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceConversion, CustomResourceDefinition, ServiceReference, WebhookClientConfig, WebhookConversion,
};
use kube::CustomResourceExt;
use kube::core::crd::{MergeError, merge_crds};

use crate::{DEFAULT_NAMESPACE, gateway, gateway_node, gateway_v1alpha1};

/// Name of the Gateway's CRD.
pub const GATEWAY_CRD: &str = "gateways.raven.openyurt.io";
/// Name of the conversion webhook's Service, and of the Secret with its certificate.
pub const WEBHOOK_SERVICE: &str = "raven-controller-webhook";
/// Path of conversion requests.
pub const WEBHOOK_PATH: &str = "/convert";
/// Port of the conversion webhook's Service.
pub const WEBHOOK_SERVICE_PORT: i32 = 443;

/// Returns all CRDs, sorted by name.
///
/// # Errors
/// If two versions of a kind differ in scope or names, which would be a defect of this crate.
pub fn crds() -> Result<Vec<CustomResourceDefinition>, MergeError> {
    let mut gateway = merge_crds(vec![gateway::Gateway::crd(), gateway_v1alpha1::Gateway::crd()], "v1beta1")?;
    gateway.spec.conversion = Some(conversion());
    Ok(vec![gateway, gateway_node::GatewayNode::crd()])
}

fn conversion() -> CustomResourceConversion {
    let service = ServiceReference {
        name: WEBHOOK_SERVICE.to_owned(),
        namespace: DEFAULT_NAMESPACE.to_owned(),
        path: Some(WEBHOOK_PATH.to_owned()),
        port: Some(WEBHOOK_SERVICE_PORT),
    };
    CustomResourceConversion {
        strategy: "Webhook".to_owned(),
        webhook: Some(WebhookConversion {
            client_config: Some(WebhookClientConfig { service: Some(service), ..Default::default() }),
            conversion_review_versions: vec!["v1".to_owned()],
        }),
    }
}
