//! Keeps the webhook's certificate valid: rotates it in its Secret, hands it to the server, and publishes the CA
//! in the CRD.
//!
//! Watches Secret and CRD. Both are checked after each change, when this replica starts to lead, and every hour,
//! because certificates expire without an event.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use raven_api::MANAGER_CONTROLLER;
use raven_api::schema::GATEWAY_CRD;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument;

use super::WebhookConfig;
use super::certificate::Material;
use super::serve::{self, ServingIdentity};
use crate::ca::{self, CaSecret, Rotation, watch_one};
use crate::lead::{Leadership, jittered};

const CHECK_INTERVAL: Duration = Duration::from_secs(3600);
const RETRY: Duration = Duration::from_secs(5);

/// The webhook's certificate could not be rotated, served or published.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "cannot set the webhook's CA in CRD {GATEWAY_CRD}: {source} (check that RBAC allows it, see deploy/rbac.yaml)"
    )]
    Crd { source: Box<kube::Error> },
    #[error(transparent)]
    Secret(#[from] ca::Error),
    #[error(transparent)]
    Serve(#[from] serve::Error),
    #[error("cannot encode the webhook's CA as JSON: {0}")]
    Encode(#[from] serde_json::Error),
}

/// Maintains Secret, served certificate and CRD.
pub(crate) struct CertificateRotation {
    config: WebhookConfig,
    ca: CaSecret,
    crds: Api<CustomResourceDefinition>,
    leadership: Leadership,
    identity: watch::Sender<ServingIdentity>,
    // Last observed objects.
    secret: Option<Secret>,
    crd: Option<CustomResourceDefinition>,
    served: Option<Material>,
}

impl CertificateRotation {
    /// Creates the task. The server reads its certificate from `identity`.
    pub(crate) fn new(
        client: Client,
        config: WebhookConfig,
        leadership: Leadership,
        identity: watch::Sender<ServingIdentity>,
    ) -> Self {
        let ca = CaSecret::new(client.clone(), &config.namespace, &config.service);
        Self { config, ca, crds: Api::all(client), leadership, identity, secret: None, crd: None, served: None }
    }

    /// Runs until the elector ends.
    pub(crate) async fn run(mut self) {
        let mut secrets = pin!(self.ca.watch());
        let mut crds = pin!(watch_one("CustomResourceDefinition", self.crds.clone(), GATEWAY_CRD));
        let mut due = Instant::now() + CHECK_INTERVAL;
        loop {
            tokio::select! {
                Some(secret) = secrets.next() => {
                    if secret.is_none() {
                        tracing::warn!(
                            secret = %self.config.service,
                            namespace = %self.config.namespace,
                            "the Secret of the conversion webhook does not exist; Gateways of v1alpha1 cannot be read or written (apply deploy/webhook.yaml)"
                        );
                    }
                    self.secret = secret;
                }
                Some(crd) = crds.next() => self.crd = crd,
                changed = self.leadership.leads.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep_until(due) => {}
            }
            due = Instant::now() + CHECK_INTERVAL;
            let span = tracing::info_span!("webhook_certificate");
            if let Err(e) = self.reconcile().instrument(span.clone()).await {
                span.in_scope(|| tracing::warn!(error = %e, "cannot maintain the conversion webhook; retrying"));
                due = Instant::now() + jittered(RETRY);
            }
        }
    }

    async fn reconcile(&mut self) -> Result<(), Error> {
        let Some(secret) = self.secret.clone() else { return Ok(()) };
        let Some(material) = self.material(secret).await? else { return Ok(()) };
        if self.served.as_ref() != Some(&material) {
            self.identity.send_replace(serve::identity(&material)?);
            tracing::info!(names = material.names.join(", "), not_after = %material.not_after, "the conversion webhook serves a new certificate");
            self.served = Some(material.clone());
        }
        self.publish_ca(&material).await
    }

    // Returns the material of the Secret, rotated if due. `None` if a different replica changed the Secret: the watch
    // reports its content.
    async fn material(&mut self, secret: Secret) -> Result<Option<Material>, Error> {
        let mut renewal = None;
        let rotation = self.ca.rotate(secret, |present| {
            let next = Material::next(present, &self.config.names(), Timestamp::now())?;
            Ok(next.map(|(material, what)| {
                renewal = Some(what);
                material
            }))
        });
        match rotation.await? {
            Rotation::Unchanged(material) => Ok(Some(material)),
            Rotation::Rotated(material, written) => {
                let renewed = renewal.map_or("", |what| what.as_str());
                tracing::info!(secret = %self.config.service, renewed, not_after = %material.not_after, "rotated the conversion webhook's certificates");
                self.secret = Some(*written);
                Ok(Some(material))
            }
            Rotation::Conflict => Ok(None),
        }
    }

    async fn publish_ca(&mut self, material: &Material) -> Result<(), Error> {
        let Some(crd) = self.crd.as_ref().filter(|_| self.leadership.is_valid()) else { return Ok(()) };
        let Some(patch) = crd_patch(crd, &self.config, material)? else { return Ok(()) };
        let params = PatchParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        match self.crds.patch(GATEWAY_CRD, &params, &Patch::Merge(&patch)).await {
            Ok(written) => {
                tracing::info!(crd = GATEWAY_CRD, "published the conversion webhook's CA in the CRD");
                self.crd = Some(written);
                Ok(())
            }
            // The CRD was changed or deleted: the watch reports it.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(()),
            Err(source) => Err(Error::Crd { source: Box::new(source) }),
        }
    }
}

// Returns the patch that makes the CRD use this webhook and CA; `None` if it does already.
fn crd_patch(
    crd: &CustomResourceDefinition,
    config: &WebhookConfig,
    material: &Material,
) -> Result<Option<Value>, serde_json::Error> {
    let mut client_config = config.client_config();
    client_config["caBundle"] = serde_json::to_value(ByteString(material.bundle().into_bytes()))?;
    let conversion = serde_json::to_value(&crd.spec.conversion)?;
    let present = &conversion["webhook"]["clientConfig"];
    let same = ["service", "url", "caBundle"].iter().all(|key| present[key] == client_config[key]);
    let reviews = &conversion["webhook"]["conversionReviewVersions"];
    let v1 = reviews.as_array().is_some_and(|list| list.contains(&json!("v1")));
    if same && v1 && conversion["strategy"] == "Webhook" {
        return Ok(None);
    }
    Ok(Some(json!({
        "metadata": {"resourceVersion": crd.metadata.resource_version},
        "spec": {"conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": client_config}}},
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{CaMaterial, read};

    fn config() -> WebhookConfig {
        WebhookConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            namespace: raven_api::DEFAULT_NAMESPACE.to_owned(),
            service: raven_api::schema::WEBHOOK_SERVICE.to_owned(),
            url: None,
        }
    }

    fn material() -> Material {
        Material::next(None, &config().names(), Timestamp::now()).expect("created").expect("there was nothing").0
    }

    #[test]
    fn shipped_crd_lacks_only_the_ca() {
        let mut crd = raven_api::schema::crds().expect("our own CRDs").remove(0);
        let (config, material) = (config(), material());
        let patch = crd_patch(&crd, &config, &material).expect("JSON").expect("no CA yet");
        let webhook =
            crd.spec.conversion.as_mut().and_then(|c| c.webhook.as_mut()).and_then(|w| w.client_config.as_mut());
        let before = serde_json::to_value(webhook.as_deref().expect("it names the webhook")).expect("JSON");
        assert_eq!(before["service"], patch["spec"]["conversion"]["webhook"]["clientConfig"]["service"]);
        webhook.expect("it names the webhook").ca_bundle = Some(ByteString(material.bundle().into_bytes()));
        assert_eq!(crd_patch(&crd, &config, &material).expect("JSON"), None);
        // A CRD without conversion was applied.
        crd.spec.conversion = None;
        assert!(crd_patch(&crd, &config, &material).expect("JSON").is_some());
    }

    #[test]
    fn unreadable_secret_counts_as_empty() {
        let mut secret = Secret::default();
        assert_eq!(read::<Material>(&secret), None);
        secret.data = Some([(Material::KEY.to_owned(), ByteString(b"{}".to_vec()))].into());
        assert_eq!(read::<Material>(&secret), None);
        let material = material();
        let text = serde_json::to_vec(&material).expect("JSON");
        secret.data = Some([(Material::KEY.to_owned(), ByteString(text))].into());
        assert_eq!(read(&secret), Some(material));
    }
}
