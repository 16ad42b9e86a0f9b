//! The webhook through which the API server converts Gateways between v1alpha1 and v1beta1.
//!
//! `certificate` creates a CA and a serving certificate. `rotation` stores both in a Secret, so that all replicas serve
//! the same certificate, and publishes the CA in the CRD. `serve` is the HTTPS server, [`convert`] the conversion.
//!
//! **Installation order.** The CRD manifest contains the webhook without its CA (see `raven_api::schema`). The CRD can
//! therefore be applied before or after the controller, and again at any time; the API server never serves v1alpha1
//! without the webhook. While the webhook is unavailable, requests for v1alpha1 fail and change nothing; v1beta1 is
//! the storage version and needs no webhook. One exception is a property of Kubernetes: if an object was last applied
//! in v1alpha1 by server-side apply, its managedFields contain that version, and a server-side apply in any version
//! needs the webhook.
//!
//! **Field ownership.** The leader patches the CRD by a merge patch with its resource version, and only if it differs.
//! The controller then owns `caBundle` only, unless flags override the address of the manifest. Only the leader
//! patches, so replicas with different flags (a rolling update) do not undo each other's changes. Any replica may
//! rotate the Secret; its resource version prevents concurrent rotations.

use std::net::SocketAddr;

use hyper::Uri;
use raven_api::schema::{WEBHOOK_PATH, WEBHOOK_SERVICE_PORT};
use serde_json::{Value, json};

pub(crate) mod certificate;
pub mod convert;
pub(crate) mod rotation;
pub(crate) mod serve;

/// Addresses and names of the webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WebhookConfig {
    /// Address to listen on.
    pub(crate) listen: SocketAddr,
    /// Namespace of Service and Secret.
    pub(crate) namespace: String,
    /// Name of Service and Secret.
    pub(crate) service: String,
    /// URL that the API server uses instead of the Service.
    pub(crate) url: Option<Uri>,
}

impl WebhookConfig {
    /// Returns the names that the serving certificate must contain.
    pub(crate) fn names(&self) -> Vec<String> {
        let service = format!("{}.{}.svc", self.service, self.namespace);
        let host = self.url.as_ref().and_then(Uri::host).map(|host| host.trim_matches(['[', ']']).to_owned());
        [service].into_iter().chain(host).collect()
    }

    /// Returns `spec.conversion.webhook.clientConfig` of the CRD without caBundle. Fields that must be
    /// absent are `null`.
    pub(crate) fn client_config(&self) -> Value {
        match &self.url {
            Some(url) => {
                json!({"service": null, "url": format!("{}{WEBHOOK_PATH}", url.to_string().trim_end_matches('/'))})
            }
            None => json!({
                "service": {"namespace": self.namespace, "name": self.service, "path": WEBHOOK_PATH, "port": WEBHOOK_SERVICE_PORT},
                "url": null,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: Option<&'static str>) -> WebhookConfig {
        WebhookConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            namespace: "kube-system".to_owned(),
            service: "hook".to_owned(),
            url: url.map(Uri::from_static),
        }
    }

    #[test]
    fn url_replaces_the_service_and_its_host_is_a_name_of_the_certificate() {
        assert_eq!(config(None).names(), ["hook.kube-system.svc"]);
        assert_eq!(config(Some("https://[fd00::5]:9443")).names(), ["hook.kube-system.svc", "fd00::5"]);
        let client_config = config(Some("https://10.0.0.5:9443")).client_config();
        assert_eq!(
            (&client_config["url"], &client_config["service"]),
            (&json!("https://10.0.0.5:9443/convert"), &Value::Null)
        );
    }
}
