//! Answers certificate requests of proxies according to [`policy`](super::policy), and publishes the CA certificates
//! in a ConfigMap.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::{certificates::v1::CertificateSigningRequest, core::v1::ConfigMap},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        events::{Event, EventType, Recorder, Reporter},
        watcher,
    },
};
use raven_api::{
    Guarded, MANAGER_CONTROLLER,
    guarded::UnreadableLog,
    proxy::{CA_KEY, CA_NAME, SIGNER_CLIENT, SIGNER_SERVER},
};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::interval;
use tracing::Instrument;

use super::{
    authorities::Authorities,
    policy::{Facts, Refusal, Signer, evaluate},
};
use crate::ca::{self, CaSecret, Rotation};
use crate::cluster::Snapshot;
use crate::lead::Leadership;
use crate::watch::guarded;

/// Interval of checks whether the CA is due for rotation.
const ROTATION_INTERVAL: Duration = Duration::from_secs(3600);
/// Delay after a failure, or while the state of the cluster is incomplete.
const RETRY: Duration = Duration::from_secs(3);
/// The API's limit for the note of an Event is 1 kB.
const NOTE_MAX: usize = 1000;

/// A request could not be answered, or the CA could not be published.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot {what}: {source} (check that RBAC allows it, see deploy/rbac.yaml)")]
    Api { what: String, source: Box<kube::Error> },
    #[error("cannot sign the certificate: {0}")]
    Sign(#[from] rcgen::Error),
    #[error(transparent)]
    Ca(#[from] ca::Error),
}

fn api_error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error::Api { what, source: Box::new(source) }
}

/// Signs certificates of proxies.
pub(crate) struct CertificateSigner {
    client: Client,
    namespace: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    leadership: Leadership,
    reporter: Reporter,
    secret: CaSecret,
    // `None`: to be loaded.
    authorities: Option<Authorities>,
}

impl CertificateSigner {
    /// Creates a signer. `identity` is the reporter of Events.
    pub(crate) fn new(
        client: Client,
        namespace: String,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        leadership: Leadership,
        identity: &str,
    ) -> Self {
        let reporter = Reporter { controller: MANAGER_CONTROLLER.to_owned(), instance: Some(identity.to_owned()) };
        let secret = CaSecret::new(client.clone(), &namespace, CA_NAME);
        Self { client, namespace, snapshots, leadership, reporter, secret, authorities: None }
    }

    /// Answers requests while this replica leads. Runs until the elector ends.
    pub(crate) async fn run(mut self) {
        let requests: Api<Guarded<CertificateSigningRequest>> = Api::all(self.client.clone());
        let of = |signer: &str| {
            let only = watcher::Config::default().fields(&format!("spec.signerName={signer}"));
            guarded(UnreadableLog::new("CertificateSigningRequest"), requests.clone(), only).touched_objects()
        };
        let all = || futures::stream::select(of(SIGNER_CLIENT), of(SIGNER_SERVER));
        let mut observed = pin!(all());
        let (mut rotation, mut retry) = (interval(ROTATION_INTERVAL), interval(RETRY));
        let mut open: Vec<CertificateSigningRequest> = Vec::new();
        loop {
            tokio::select! {
                Some(request) = observed.next() => match request {
                    Ok(Guarded(Ok(request))) if is_open(&request) => open.push(request),
                    Ok(_) => {}
                    Err(e) => tracing::warn!(kind = "CertificateSigningRequest", error = %e, "watch failed; retrying (check that RBAC allows list and watch)"),
                },
                changed = self.leadership.leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    observed.set(all());
                }
                _ = rotation.tick() => self.authorities = None,
                _ = retry.tick(), if !open.is_empty() || self.authorities.is_none() => {}
            }
            if !self.leadership.is_valid() {
                // A new leader lists all open requests.
                open.clear();
                continue;
            }
            if !self.snapshots.borrow().proxies_complete {
                continue;
            }
            if self.authorities.is_none()
                && let Err(e) = self.load_authorities().await
            {
                tracing::warn!(error = %e, "the CA of the proxies is unavailable; retrying");
                continue;
            }
            if self.authorities.is_none() {
                // Another replica changed the Secret at the same time. Open requests stay for the retry.
                continue;
            }
            let mut failed = Vec::new();
            for request in std::mem::take(&mut open) {
                let span = tracing::info_span!(
                    "certificate_request",
                    request = request.name_any(),
                    signer = request.spec.signer_name
                );
                if let Err(e) = self.answer(&request).instrument(span.clone()).await {
                    span.in_scope(|| tracing::warn!(error = %e, "cannot answer the certificate request; retrying"));
                    failed.push(request);
                }
            }
            open = failed;
        }
    }

    // Loads the CAs, rotates them if due, and publishes their certificates.
    async fn load_authorities(&mut self) -> Result<(), Error> {
        let secret = self.secret.load().await?;
        let authorities =
            match self.secret.rotate(secret, |present| Authorities::next(present, Timestamp::now())).await? {
                Rotation::Unchanged(authorities) => authorities,
                Rotation::Rotated(authorities, _) => {
                    tracing::info!(secret = CA_NAME, "rotated the CA of the proxies");
                    authorities
                }
                Rotation::Conflict => return Ok(()),
            };
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": CA_NAME }, "data": { CA_KEY: authorities.bundle() } });
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        maps.patch(CA_NAME, &params, &Patch::Apply(&map))
            .await
            .map_err(api_error(format!("publish ConfigMap {CA_NAME}")))?;
        self.authorities = Some(authorities);
        Ok(())
    }

    async fn answer(&self, request: &CertificateSigningRequest) -> Result<(), Error> {
        let (Some(signer), Some(authorities)) = (Signer::of(&request.spec.signer_name), &self.authorities) else {
            return Ok(());
        };
        // Read again: the watch also reports the controller's own approval.
        let requests: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let name = request.name_any();
        let present =
            requests.get_opt(&name).await.map_err(api_error(format!("read CertificateSigningRequest {name}")))?;
        let Some(request) = present.as_ref().filter(|request| is_open(request)) else { return Ok(()) };
        let snapshot = self.snapshots.borrow().clone();
        let (nodes, gateways) = (snapshot.node_uids(), snapshot.gateways());
        let facts = Facts { namespace: &self.namespace, nodes: &nodes, gateways: &gateways };
        match evaluate(&request.spec, signer, &facts) {
            Ok(granted) => {
                let node = granted.node.clone();
                self.set_condition(
                    request,
                    "Approved",
                    "RavenProxyNode",
                    &format!("requested by the agent on node {node}"),
                )
                .await?;
                let certificate = authorities.sign(granted, Timestamp::now())?;
                let patch = json!({ "status": { "certificate": ByteString(certificate.into_bytes()) } });
                self.patch(request, "status", &patch).await?;
                tracing::info!(node, "signed a certificate");
                Ok(())
            }
            Err(refusal) => self.deny(request, &refusal).await,
        }
    }

    async fn deny(&self, request: &CertificateSigningRequest, refusal: &Refusal) -> Result<(), Error> {
        let message = refusal.to_string();
        self.set_condition(request, "Denied", refusal.reason(), &message).await?;
        tracing::warn!(reason = refusal.reason(), error = %message, "denied a certificate request");
        let event = Event {
            type_: EventType::Warning,
            reason: refusal.reason().to_owned(),
            note: Some(message.chars().take(NOTE_MAX).collect()),
            action: "Sign".to_owned(),
            secondary: None,
        };
        // A failure is logged only: the condition has the same content.
        let published =
            Recorder::new(self.client.clone(), self.reporter.clone()).publish(&event, &request.object_ref(&())).await;
        if let Err(e) = published {
            tracing::warn!(error = %e, "cannot publish an Event (check that RBAC allows it)");
        }
        Ok(())
    }

    async fn set_condition(
        &self,
        request: &CertificateSigningRequest,
        type_: &str,
        reason: &str,
        message: &str,
    ) -> Result<(), Error> {
        let condition = json!({ "type": type_, "status": "True", "reason": reason, "message": message });
        self.patch(request, "approval", &json!({ "status": { "conditions": [condition] } })).await
    }

    async fn patch(
        &self,
        request: &CertificateSigningRequest,
        part: &'static str,
        patch: &serde_json::Value,
    ) -> Result<(), Error> {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let name = request.name_any();
        let params = PatchParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..PatchParams::default() };
        match api.patch_subresource(part, &name, &params, &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            // The request was deleted.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(e) => Err(api_error(format!("write {part} of CertificateSigningRequest {name}"))(e)),
        }
    }
}

/// True if the request is neither denied nor failed, and has no certificate.
fn is_open(request: &CertificateSigningRequest) -> bool {
    let status = request.status.clone().unwrap_or_default();
    let closed = status.conditions.iter().flatten().any(|c| c.type_ == "Denied" || c.type_ == "Failed");
    status.certificate.is_none() && !closed
}
