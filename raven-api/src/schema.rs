//! The CRDs as `cargo xtask crds` writes them.
//!
//! The Gateway's two versions have different schemas, so between them objects are converted by the controller's webhook
//! ([`crate::conversion`]). That strategy stands in the manifest from the beginning, and v1alpha1 is served from the beginning: there is no
//! moment at which the API server would serve v1alpha1 with strategy `None`, which drops every field that the schemas do not share. What
//! the manifest cannot have is the webhook's CA: the controller adds `caBundle`, a field that nobody else owns, so applying the manifest
//! again takes nothing away and meets no conflict. Until then, and whenever the webhook is away, requests for v1alpha1 fail with an error
//! that names it; v1beta1, which is what is stored, needs no conversion.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceConversion, CustomResourceDefinition, ServiceReference, WebhookClientConfig, WebhookConversion,
};
use kube::CustomResourceExt;
use kube::core::crd::{MergeError, merge_crds};

use crate::{DEFAULT_NAMESPACE, gateway, gateway_node, gateway_v1alpha1};

/// The CRD of the Gateway.
pub const GATEWAY_CRD: &str = "gateways.raven.openyurt.io";
/// Service of the conversion webhook; the Secret with its certificate bears the same name.
pub const WEBHOOK_SERVICE: &str = "raven-controller-webhook";
/// Path that the API server posts to.
pub const WEBHOOK_PATH: &str = "/convert";
/// Port of the Service.
pub const WEBHOOK_SERVICE_PORT: i32 = 443;

/// All CRDs, by name. Fails only if two versions of one kind disagree about scope or names, which a test would show.
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
