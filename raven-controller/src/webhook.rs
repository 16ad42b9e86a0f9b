//! The webhook by which the API server converts Gateways between v1alpha1 and v1beta1.
//!
//! In the order data flows: [`certificate`] makes a CA and a serving certificate of our own; [`keep`] has both in a Secret, so that all
//! replicas serve the same, and puts the CA into the CRD; [`serve`] answers the API server; [`convert`] does the work, purely.
//!
//! **A safe order.** The CRD names the webhook from the moment it is installed (`raven_api::schema` says why); it only lacks our CA. So
//! the CRD can be applied before, after, or again beside a running controller, and at no moment would the API server serve v1alpha1
//! without asking us. Who asks for v1alpha1 while nobody answers gets an error and loses nothing; v1beta1 is what is stored and needs us
//! never. (One exception, which Kubernetes has: an object that was last *applied* in v1alpha1 by server-side apply bears that version in
//! its managedFields, and a server-side apply to it needs the webhook whatever its version.)
//!
//! **Whose fields.** By a merge patch that carries the CRD's version, and only where it differs: the controller comes to own `caBundle`
//! alone, unless it is told by flags to be reached otherwise than the manifest says. Only the leader patches, so replicas with different
//! flags (a rolling update) do not quarrel. The Secret is filled and renewed by whichever replica comes first; the Secret's version
//! makes the second one look again.

use std::net::SocketAddr;

use hyper::Uri;
use raven_api::schema::{WEBHOOK_PATH, WEBHOOK_SERVICE_PORT};
use serde_json::{Value, json};

pub mod certificate;
pub mod convert;
pub mod keep;
pub mod serve;

/// How the API server reaches the webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Namespace of Service and Secret.
    pub namespace: String,
    /// Name of both.
    pub service: String,
    /// Instead of the Service.
    pub url: Option<Uri>,
}

// === impl Place ===

impl Place {
    /// The names that its certificate needs.
    pub fn names(&self) -> Vec<String> {
        let service = format!("{}.{}.svc", self.service, self.namespace);
        let host = self.url.as_ref().and_then(Uri::host).map(|host| host.trim_matches(['[', ']']).to_owned());
        [service].into_iter().chain(host).collect()
    }

    /// `spec.conversion.webhook.clientConfig` of the CRD, without its caBundle; `null` for what must not be there.
    pub fn client_config(&self) -> Value {
        match &self.url {
            Some(url) => json!({"service": null, "url": format!("{}{WEBHOOK_PATH}", url.to_string().trim_end_matches('/'))}),
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

    fn place(url: Option<&'static str>) -> Place {
        Place {
            listen: ([127, 0, 0, 1], 0).into(),
            namespace: "kube-system".to_owned(),
            service: "hook".to_owned(),
            url: url.map(Uri::from_static),
        }
    }

    #[test]
    fn a_url_replaces_the_service_and_its_host_is_a_name_too() {
        assert_eq!(place(None).names(), ["hook.kube-system.svc"]);
        assert_eq!(place(Some("https://[fd00::5]:9443")).names(), ["hook.kube-system.svc", "fd00::5"]);
        let config = place(Some("https://10.0.0.5:9443")).client_config();
        assert_eq!((&config["url"], &config["service"]), (&json!("https://10.0.0.5:9443/convert"), &Value::Null));
    }
}
