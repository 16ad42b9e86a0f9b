//! Requests a certificate from the controller through the CertificateSigningRequest API, and renews it before it
//! expires. Open proxy connections are not affected; new ones use the new certificate.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder, Retryable};
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use raven_api::proxy::{SIGNER_CLIENT, SIGNER_SERVER};
use tokio::{sync::watch, time::sleep};
use tracing::Instrument;

use super::identity::{self, Identity};
use crate::names;

/// Requested validity of a certificate in seconds: an edge without an API server for a month keeps working.
const LIFE: i32 = 90 * 24 * 3600;
/// Interval of the check whether the certificate is due for renewal.
const CHECK: Duration = Duration::from_secs(60);
/// Minimum and maximum delay after a failure.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// The purpose of this node's certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Purpose {
    /// None is needed.
    #[default]
    None,
    /// To dial as this node, with the Node's UID where it is known.
    Client(Option<String>),
    /// To be dialled by these names and addresses.
    Server(BTreeSet<String>),
}

/// The purpose, and the CA's certificates (PEM).
pub(super) type Wanted = (Purpose, String);

/// Why this node has no certificate.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("cannot request a certificate: {0}; check the agent's permissions in deploy/rbac.yaml")]
    Api(kube::Error),
    #[error("CertificateSigningRequest {name} was denied: {reason}")]
    Denied { name: String, reason: String },
    #[error("CertificateSigningRequest {0} is not signed yet; check that raven-controller runs")]
    Pending(String),
    #[error("ConfigMap raven-proxy-ca contains no CA yet; check that raven-controller runs")]
    NoCa,
    #[error("the issued certificate is not signed by the CA in ConfigMap raven-proxy-ca")]
    Foreign,
}

/// Keeps this node's identity up to date. `identity` is `None` while there is no purpose or no usable certificate.
pub(crate) struct Enrolment {
    pub(crate) node: String,
    /// `None` offline, where only the stored certificate is used.
    pub(crate) client: Option<Client>,
    /// Folder of the agent's state.
    pub(crate) state: PathBuf,
    pub(crate) wanted: watch::Receiver<Wanted>,
    pub(crate) identity: watch::Sender<Option<Arc<Identity>>>,
    /// Why there is no certificate, for the status.
    pub(crate) problem: watch::Sender<Option<String>>,
}

impl Enrolment {
    pub(crate) async fn run(mut self) {
        let delays = || {
            ExponentialBuilder::default()
                .with_min_delay(RETRY.0)
                .with_max_delay(RETRY.1)
                .with_jitter()
                .without_max_times()
                .build()
        };
        let mut retries = delays();
        let mut pending = None;
        loop {
            let (purpose, ca) = self.wanted.borrow_and_update().clone();
            let span = tracing::info_span!("enrol", node = %self.node);
            let wait = match self.renew(&purpose, &ca, &mut pending).instrument(span).await {
                Ok(()) => {
                    self.problem.send_replace(None);
                    retries = delays();
                    CHECK
                }
                Err(e) => {
                    let error = e.to_string();
                    if self.problem.borrow().as_ref() != Some(&error) {
                        tracing::warn!(error, "cannot get or renew the proxy's certificate; retrying with backoff");
                    }
                    self.problem.send_replace(Some(error));
                    retries.next().unwrap_or(RETRY.1)
                }
            };
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    retries = delays();
                }
                () = sleep(wait) => {}
            }
        }
    }

    async fn renew(&self, purpose: &Purpose, ca: &str, pending: &mut Option<Requested>) -> Result<(), Error> {
        let (signer, names, uid, folder) = match purpose {
            Purpose::None => {
                self.identity.send_replace(None);
                return Ok(());
            }
            Purpose::Client(uid) => {
                (SIGNER_CLIENT, BTreeSet::from([self.node.clone()]), uid.as_ref(), names::PROXY_CLIENT_DIR)
            }
            Purpose::Server(names) => (SIGNER_SERVER, names.clone(), None, names::PROXY_SERVER_DIR),
        };
        if ca.is_empty() {
            return Err(Error::NoCa);
        }
        let path = self.state.join(folder).join("pki/identity.pem");
        let now = Timestamp::now();
        let stored = match identity::load(&path)? {
            // A stored identity that does not parse is replaced.
            Some(pem) => Identity::parse(&pem, ca).ok().flatten(),
            None => None,
        };
        let due = stored.as_ref().is_none_or(|identity| identity.is_due(&names, uid, now));
        if let Some(stored) = stored.filter(|identity| !identity.is_expired(now)) {
            self.offer(stored);
        }
        let Some(client) = self.client.as_ref().filter(|_| due) else { return Ok(()) };
        // A pending request is not repeated: the controller may be unavailable for days.
        let requested = match pending.take().filter(|requested| requested.signer == signer && requested.names == names)
        {
            Some(requested) => requested,
            None => {
                let (key, request) = identity::request(&self.node, &names)?;
                Requested { signer, names, key, name: create(client, &self.node, signer, request).await? }
            }
        };
        let certificate = match signed(client, &requested.name).await {
            Ok(certificate) => certificate,
            Err(e @ (Error::Pending(_) | Error::Api(_))) => {
                // The API server deletes unanswered requests after a day; then a new one is created.
                let deleted = matches!(&e, Error::Api(kube::Error::Api(status)) if status.code == 404);
                *pending = Some(requested).filter(|_| !deleted);
                return Err(e);
            }
            Err(e) => return Err(e),
        };
        let pem = requested.key + &certificate;
        let identity = Identity::parse(pem.as_bytes(), ca)?.ok_or(Error::Foreign)?;
        identity::save(&path, &pem)?;
        let names = identity.names.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        tracing::info!(names, not_after = %identity.life.1, "received a certificate for the proxy");
        self.offer(identity);
        Ok(())
    }

    fn offer(&self, identity: Identity) {
        self.identity.send_if_modified(|have| {
            let changed = have.as_deref() != Some(&identity);
            if changed {
                *have = Some(Arc::new(identity));
            }
            changed
        });
    }
}

/// A request that was created.
struct Requested {
    signer: &'static str,
    names: BTreeSet<String>,
    /// The private key (PEM).
    key: String,
    /// Name of the CertificateSigningRequest.
    name: String,
}

/// Creates a CertificateSigningRequest; returns its name.
async fn create(client: &Client, node: &str, signer: &str, request: String) -> Result<String, Error> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let usage = if signer == SIGNER_CLIENT { "client auth" } else { "server auth" };
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some(format!("raven-proxy-{node}-")), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: signer.to_owned(),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            expiration_seconds: Some(LIFE),
            ..CertificateSigningRequestSpec::default()
        },
        ..CertificateSigningRequest::default()
    };
    let created = api.create(&PostParams::default(), &object).await.map_err(Error::Api)?;
    Ok(created.metadata.name.unwrap_or_default())
}

/// Polls for the signed certificate (PEM) for about half a minute.
async fn signed(client: &Client, name: &str) -> Result<String, Error> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let signed = || async {
        let status = api.get(name).await.map_err(Error::Api)?.status.unwrap_or_default();
        if let Some(certificate) = status.certificate {
            return Ok(String::from_utf8_lossy(&certificate.0).into_owned());
        }
        let conditions = status.conditions.unwrap_or_default();
        let denied = conditions.iter().find(|c| c.type_ == "Denied" || c.type_ == "Failed");
        match denied {
            Some(condition) => Err(Error::Denied {
                name: name.to_owned(),
                reason: condition.message.clone().unwrap_or_else(|| condition.type_.clone()),
            }),
            None => Err(Error::Pending(name.to_owned())),
        }
    };
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(2))
        .with_max_times(15);
    signed.retry(backoff).when(|e| matches!(e, Error::Pending(_))).await
}
