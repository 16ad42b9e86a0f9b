//! Grants certificate requests, or refuses them, by what [`sign`](super::sign) says; keeps the CA in its Secret and publishes its
//! certificates in a ConfigMap.

use std::{pin::pin, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::CertificateSigningRequest,
        core::v1::{ConfigMap, Secret},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams},
    runtime::{
        WatchStreamExt,
        events::{Event, EventType, Recorder, Reporter},
        watcher,
    },
};
use raven_api::{
    Guarded, MANAGER_CONTROLLER,
    proxy::{CA_KEY, CA_NAME, SIGNER_CLIENT, SIGNER_SERVER},
};
use serde_json::json;
use tokio::time::interval;

use super::{
    ca::Authorities,
    follow::Cluster,
    sign::{Facts, Refusal, Signer, judge},
};
use crate::lead::Mandate;
use crate::watch::guarded;

/// How often the CA is looked at.
const LOOK: Duration = Duration::from_secs(3600);
/// After a failure, or while not everything is known.
const AGAIN: Duration = Duration::from_secs(3);
/// Of the Secret: all of it.
const KEY_MATERIAL: &str = "authorities.json";

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{what}: {source} (does RBAC allow it? see deploy/rbac.yaml)")]
    Api { what: String, source: Box<kube::Error> },
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("write the CA as JSON: {0}")]
    Encode(#[from] serde_json::Error),
    #[error("there is no Secret {CA_NAME} in namespace {0} to keep the CA in (apply deploy/proxy.yaml)")]
    NoSecret(String),
}

/// Grants requests.
pub struct Granter {
    client: Client,
    namespace: String,
    cluster: Cluster,
    mandate: Mandate,
    reporter: Reporter,
    authorities: Option<Authorities>,
}

impl Granter {
    /// A granter that knows no CA yet.
    pub fn new(client: Client, namespace: String, cluster: Cluster, mandate: Mandate, identity: &str) -> Self {
        let reporter = Reporter { controller: MANAGER_CONTROLLER.to_owned(), instance: Some(identity.to_owned()) };
        Self { client, namespace, cluster, mandate, reporter, authorities: None }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let requests: Api<Guarded<CertificateSigningRequest>> = Api::all(self.client.clone());
        let of = |signer: &str| {
            let only = watcher::Config::default().fields(&format!("spec.signerName={signer}"));
            guarded("CertificateSigningRequest", requests.clone(), only).touched_objects()
        };
        let all = || futures::stream::select(of(SIGNER_CLIENT), of(SIGNER_SERVER));
        let mut seen = pin!(all());
        let (mut look, mut again) = (interval(LOOK), interval(AGAIN));
        let mut waiting: Vec<CertificateSigningRequest> = Vec::new();
        loop {
            tokio::select! {
                Some(request) = seen.next() => match request {
                    Ok(Guarded(Ok(request))) if is_open(&request) => waiting.push(request),
                    Ok(_) => {}
                    Err(e) => tracing::warn!(error = %e, "watch CertificateSigningRequests (does RBAC allow it?)"),
                },
                changed = self.mandate.leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    seen.set(all());
                }
                _ = look.tick() => self.authorities = None,
                _ = again.tick(), if !waiting.is_empty() || self.authorities.is_none() => {}
            }
            if !self.mandate.holds() {
                // Another one answers; whoever leads next lists what is open then.
                waiting.clear();
                continue;
            }
            if !self.cluster.complete() {
                continue;
            }
            if self.authorities.is_none()
                && let Err(e) = self.keep().await
            {
                tracing::warn!("{e}");
                continue;
            }
            let mut left = Vec::new();
            for request in std::mem::take(&mut waiting) {
                if let Err(e) = self.answer(&request).await {
                    tracing::warn!(request = request.name_any(), "{e}");
                    left.push(request);
                }
            }
            waiting = left;
        }
    }

    /// Reads the CA, makes or renews it, and publishes its certificates.
    async fn keep(&mut self) -> Result<(), Error> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let error = |what: &'static str| move |source| Error::Api { what: what.to_owned(), source: Box::new(source) };
        let mut secret = secrets
            .get_opt(CA_NAME)
            .await
            .map_err(error("read Secret raven-proxy-ca"))?
            .ok_or_else(|| Error::NoSecret(self.namespace.clone()))?;
        let present: Option<Authorities> =
            secret.data.as_ref().and_then(|data| data.get(KEY_MATERIAL)).and_then(|bytes| serde_json::from_slice(&bytes.0).ok());
        let authorities = match (Authorities::next(present.as_ref(), Timestamp::now())?, present) {
            (None, Some(present)) => present,
            (None, None) => return Ok(()),
            (Some(next), _) => {
                secret.data = Some([(KEY_MATERIAL.to_owned(), ByteString(serde_json::to_vec(&next)?))].into());
                let params = PostParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..PostParams::default() };
                secrets.replace(CA_NAME, &params, &secret).await.map_err(error("fill Secret raven-proxy-ca"))?;
                tracing::info!("a CA for the proxies' certificates was made");
                next
            }
        };
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map =
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": CA_NAME }, "data": { CA_KEY: authorities.bundle() } });
        let params = PatchParams::apply(MANAGER_CONTROLLER).force();
        maps.patch(CA_NAME, &params, &Patch::Apply(&map)).await.map_err(error("publish ConfigMap raven-proxy-ca"))?;
        self.authorities = Some(authorities);
        Ok(())
    }

    async fn answer(&self, request: &CertificateSigningRequest) -> Result<(), Error> {
        let (Some(signer), Some(authorities)) = (Signer::of(&request.spec.signer_name), &self.authorities) else { return Ok(()) };
        // As it is now: our own approval comes back by the watch, too.
        let requests: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let name = request.name_any();
        let now = requests.get_opt(&name).await;
        let now = now.map_err(|source| Error::Api { what: format!("read CertificateSigningRequest {name}"), source: Box::new(source) })?;
        let Some(request) = now.as_ref().filter(|request| is_open(request)) else { return Ok(()) };
        let (nodes, gateways) = (self.cluster.node_uids(), self.cluster.gateways());
        let facts = Facts { namespace: &self.namespace, nodes: &nodes, gateways: &gateways };
        match judge(&request.spec, signer, &facts) {
            Ok(granted) => {
                let node = granted.node.clone();
                self.decide(request, "Approved", "RavenProxyNode", &format!("asked for by the agent on node {node}")).await?;
                let certificate = authorities.sign(granted, Timestamp::now())?;
                let patch = json!({ "status": { "certificate": ByteString(certificate.into_bytes()) } });
                self.patch(request, "status", &patch).await?;
                tracing::info!(request = request.name_any(), node, "certificate signed");
                Ok(())
            }
            Err(refusal) => self.refuse(request, &refusal).await,
        }
    }

    async fn refuse(&self, request: &CertificateSigningRequest, refusal: &Refusal) -> Result<(), Error> {
        let why = refusal.to_string();
        self.decide(request, "Denied", refusal.reason(), &why).await?;
        tracing::warn!(request = request.name_any(), reason = refusal.reason(), "certificate refused: {why}");
        let event = Event {
            type_: EventType::Warning,
            reason: refusal.reason().to_owned(),
            note: Some(why.chars().take(1000).collect()),
            action: "Sign".to_owned(),
            secondary: None,
        };
        // The condition says the same.
        let published = Recorder::new(self.client.clone(), self.reporter.clone()).publish(&event, &request.object_ref(&())).await;
        if let Err(e) = published {
            tracing::warn!(error = %e, "publish an Event (does RBAC allow it?)");
        }
        Ok(())
    }

    async fn decide(&self, request: &CertificateSigningRequest, type_: &str, reason: &str, message: &str) -> Result<(), Error> {
        let condition = json!({ "type": type_, "status": "True", "reason": reason, "message": message });
        self.patch(request, "approval", &json!({ "status": { "conditions": [condition] } })).await
    }

    async fn patch(&self, request: &CertificateSigningRequest, part: &'static str, patch: &serde_json::Value) -> Result<(), Error> {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let name = request.name_any();
        let params = PatchParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..PatchParams::default() };
        match api.patch_subresource(part, &name, &params, &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            // The requester went away.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(source) => Err(Error::Api { what: format!("write {part} of CertificateSigningRequest {name}"), source: Box::new(source) }),
        }
    }
}

/// Nobody has decided yet, or the certificate is still to come.
fn is_open(request: &CertificateSigningRequest) -> bool {
    let status = request.status.clone().unwrap_or_default();
    let refused = status.conditions.iter().flatten().any(|c| c.type_ == "Denied" || c.type_ == "Failed");
    status.certificate.is_none() && !refused
}
