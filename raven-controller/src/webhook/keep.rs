//! Keeps the Secret filled, the certificate served, and the CRD in the know.
//!
//! Follows both objects. Whatever is not as it should be is put right when an object changes, when this replica begins to lead, and by
//! the hour (certificates age without an event).

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use raven_api::MANAGER_CONTROLLER;
use raven_api::schema::GATEWAY_CRD;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Place;
use super::certificate::{self, Material};
use super::serve::{self, Identity};
use crate::lead::{Mandate, jittered};

// All of it, for us.
const KEY_MATERIAL: &str = "material.json";
// The same for people and tools.
const KEY_CA: &str = "ca.crt";
const KEY_CERTIFICATE: &str = "tls.crt";

const LOOK: Duration = Duration::from_secs(3600);
const AGAIN: Duration = Duration::from_secs(5);

/// Why something could not be put right.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("fill Secret {name}: {source} (does RBAC allow it? see deploy/rbac.yaml)")]
    Secret { name: String, source: Box<kube::Error> },
    #[error("put the webhook's CA into CRD {GATEWAY_CRD}: {source} (does RBAC allow it? see deploy/rbac.yaml)")]
    Crd { source: Box<kube::Error> },
    #[error(transparent)]
    Certificate(#[from] certificate::Error),
    #[error(transparent)]
    Serve(#[from] serve::Error),
    #[error("write the webhook's certificate as JSON: {0}")]
    Encode(#[from] serde_json::Error),
}

/// Keeps Secret, certificate and CRD.
pub struct Keeper {
    place: Place,
    secrets: Api<Secret>,
    crds: Api<CustomResourceDefinition>,
    mandate: Mandate,
    identity: watch::Sender<Identity>,
    // As they were seen last.
    secret: Option<Secret>,
    crd: Option<CustomResourceDefinition>,
    served: Option<Material>,
}

// === impl Keeper ===

impl Keeper {
    /// A keeper that knows nothing yet. `identity` is what the server serves.
    pub fn new(client: Client, place: Place, mandate: Mandate, identity: watch::Sender<Identity>) -> Self {
        let secrets = Api::namespaced(client.clone(), &place.namespace);
        Self { place, secrets, crds: Api::all(client), mandate, identity, secret: None, crd: None, served: None }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let mut secrets = pin!(only(self.secrets.clone(), &self.place.service));
        let mut crds = pin!(only(self.crds.clone(), GATEWAY_CRD));
        let mut due = Instant::now() + LOOK;
        loop {
            tokio::select! {
                Some(seen) = secrets.next() => {
                    if seen.is_none() {
                        tracing::warn!(secret = %self.place.service, namespace = %self.place.namespace, "there is no such Secret to keep the conversion webhook's certificate in: Gateways of v1alpha1 cannot be read or written (apply deploy/webhook.yaml)");
                    }
                    self.secret = seen;
                }
                Some(seen) = crds.next() => self.crd = seen,
                changed = self.mandate.leads.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep_until(due) => {}
            }
            due = Instant::now() + LOOK;
            if let Err(e) = self.put_right().await {
                tracing::warn!(error = %e, "conversion webhook: will be tried again");
                due = Instant::now() + jittered(AGAIN);
            }
        }
    }

    async fn put_right(&mut self) -> Result<(), Error> {
        let Some(secret) = self.secret.clone() else { return Ok(()) };
        let Some(material) = self.material(secret).await? else { return Ok(()) };
        if self.served.as_ref() != Some(&material) {
            self.identity.send_replace(serve::identity(&material)?);
            tracing::info!(names = ?material.names, not_after = %material.not_after, "conversion webhook: certificate is served");
            self.served = Some(material.clone());
        }
        self.announce(&material).await
    }

    // What the Secret holds, or what it holds from now on; none if another replica was faster: then the watch tells.
    async fn material(&mut self, mut secret: Secret) -> Result<Option<Material>, Error> {
        let present = read(&secret);
        let Some((next, why)) = Material::next(present.as_ref(), &self.place.names(), Timestamp::now())? else {
            return Ok(present);
        };
        let text = |text: String| ByteString(text.into_bytes());
        let data = [
            (KEY_MATERIAL, text(serde_json::to_string(&next)?)),
            (KEY_CA, text(next.bundle())),
            (KEY_CERTIFICATE, text(next.certificate.clone())),
        ];
        secret.data = Some(data.map(|(key, value)| (key.to_owned(), value)).into());
        let params = PostParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        match self.secrets.replace(&self.place.service, &params, &secret).await {
            Ok(written) => {
                tracing::info!(secret = %self.place.service, ?why, not_after = %next.not_after, "conversion webhook: certificate made");
                self.secret = Some(written);
                Ok(Some(next))
            }
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(None),
            Err(source) => Err(Error::Secret { name: self.place.service.clone(), source: Box::new(source) }),
        }
    }

    async fn announce(&mut self, material: &Material) -> Result<(), Error> {
        let Some(crd) = self.crd.as_ref().filter(|_| self.mandate.holds()) else { return Ok(()) };
        let Some(patch) = crd_patch(crd, &self.place, material)? else { return Ok(()) };
        let params = PatchParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..Default::default() };
        match self.crds.patch(GATEWAY_CRD, &params, &Patch::Merge(&patch)).await {
            Ok(written) => {
                tracing::info!(crd = GATEWAY_CRD, "conversion webhook: the API server knows where it is and whom to trust");
                self.crd = Some(written);
                Ok(())
            }
            // It has changed or gone meanwhile: the watch tells.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(()),
            Err(source) => Err(Error::Crd { source: Box::new(source) }),
        }
    }
}

// The one object of this name, whenever it changes; none when it is gone, or was never there.
fn only<K>(api: Api<K>, name: &str) -> impl Stream<Item = Option<K>> + use<K>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let events = watcher(api, watcher::Config::default().fields(&format!("metadata.name={name}"))).default_backoff();
    let listed: Arc<std::sync::Mutex<Option<K>>> = Arc::default();
    events.filter_map(move |event| {
        let seen = match event {
            Ok(Event::Apply(object)) => Some(Some(object)),
            Ok(Event::Delete(_)) => Some(None),
            Ok(Event::Init) => None,
            Ok(Event::InitApply(object)) => {
                if let Ok(mut listed) = listed.lock() {
                    *listed = Some(object);
                }
                None
            }
            Ok(Event::InitDone) => Some(listed.lock().ok().and_then(|mut listed| listed.take())),
            Err(e) => {
                tracing::warn!(kind = %std::any::type_name::<K>(), error = %e, "watch for the conversion webhook (does RBAC allow it?)");
                None
            }
        };
        std::future::ready(seen)
    })
}

fn read(secret: &Secret) -> Option<Material> {
    let bytes = &secret.data.as_ref()?.get(KEY_MATERIAL)?.0;
    serde_json::from_slice(bytes)
        .inspect_err(|e| tracing::warn!(error = %e, "Secret {} is not as we wrote it: made anew", secret.metadata.name.as_deref().unwrap_or_default()))
        .ok()
}

// What the CRD lacks; none if nothing.
fn crd_patch(crd: &CustomResourceDefinition, place: &Place, material: &Material) -> Result<Option<Value>, serde_json::Error> {
    let mut wanted = place.client_config();
    wanted["caBundle"] = serde_json::to_value(ByteString(material.bundle().into_bytes()))?;
    let conversion = serde_json::to_value(&crd.spec.conversion)?;
    let present = &conversion["webhook"]["clientConfig"];
    let same = ["service", "url", "caBundle"].iter().all(|key| present[key] == wanted[key]);
    let reviews = &conversion["webhook"]["conversionReviewVersions"];
    let understood = reviews.as_array().is_some_and(|list| list.contains(&json!("v1")));
    if same && understood && conversion["strategy"] == "Webhook" {
        return Ok(None);
    }
    Ok(Some(json!({
        "metadata": {"resourceVersion": crd.metadata.resource_version},
        "spec": {"conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": wanted}}},
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            listen: ([127, 0, 0, 1], 0).into(),
            namespace: raven_api::DEFAULT_NAMESPACE.to_owned(),
            service: raven_api::schema::WEBHOOK_SERVICE.to_owned(),
            url: None,
        }
    }

    fn material() -> Material {
        Material::next(None, &place().names(), Timestamp::now()).expect("made").expect("there was nothing").0
    }

    #[test]
    fn of_the_crd_as_it_is_shipped_only_the_ca_is_missing() {
        let mut crd = raven_api::schema::crds().expect("our own CRDs").remove(0);
        let (place, material) = (place(), material());
        let patch = crd_patch(&crd, &place, &material).expect("JSON").expect("no CA yet");
        let webhook = crd.spec.conversion.as_mut().and_then(|c| c.webhook.as_mut()).and_then(|w| w.client_config.as_mut());
        let before = serde_json::to_value(webhook.as_deref().expect("it names the webhook")).expect("JSON");
        assert_eq!(before["service"], patch["spec"]["conversion"]["webhook"]["clientConfig"]["service"]);
        webhook.expect("it names the webhook").ca_bundle = Some(ByteString(material.bundle().into_bytes()));
        assert_eq!(crd_patch(&crd, &place, &material).expect("JSON"), None);
        // Somebody applied a CRD without conversion.
        crd.spec.conversion = None;
        assert!(crd_patch(&crd, &place, &material).expect("JSON").is_some());
    }

    #[test]
    fn a_secret_that_is_not_ours_to_read_counts_as_empty() {
        let mut secret = Secret::default();
        assert_eq!(read(&secret), None);
        secret.data = Some([(KEY_MATERIAL.to_owned(), ByteString(b"{}".to_vec()))].into());
        assert_eq!(read(&secret), None);
        let material = material();
        let text = serde_json::to_vec(&material).expect("JSON");
        secret.data = Some([(KEY_MATERIAL.to_owned(), ByteString(text))].into());
        assert_eq!(read(&secret), Some(material));
    }
}
